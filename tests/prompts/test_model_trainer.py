# SPDX-License-Identifier: Apache-2.0
"""PromptModel under transformers' Trainer."""

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

from fastprompt.prompts import PromptConfig


@pytest.fixture
def trainer(make_prompted, tokenizer, device, tmp_path):
    def make(dropout_rate=0.0, **arguments):
        prompted = make_prompted(dropout_rate=dropout_rate)
        generator = torch.Generator().manual_seed(0)
        lengths = [5, 3, 6, 4, 5, 3, 6, 4]
        examples = [
            {
                "input_ids": torch.randint(2, 64, (n,), generator=generator).tolist(),
                "labels": torch.randint(2, 64, (3,), generator=generator).tolist(),
            }
            for n in lengths
        ]
        options = {
            "output_dir": str(tmp_path),
            "max_steps": 1,
            "learning_rate": 0.1,
            "report_to": [],
            "disable_tqdm": True,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "use_cpu": device.type == "cpu",
            "predict_with_generate": True,
            "generation_max_length": 5,
        }
        return Seq2SeqTrainer(
            model=prompted,
            args=Seq2SeqTrainingArguments(**(options | arguments)),
            train_dataset=examples,
            eval_dataset=examples,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=prompted),
        )

    return make


def step(trainer):
    """How far one optimiser step moved the prompt."""
    before = trainer.model.prompts["p5"].detach().clone()
    trainer.train()
    return trainer.model.prompts["p5"].detach() - before


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradients_are_the_mean_of_the_batches(accumulation, trainer):
    whole = step(trainer(per_device_train_batch_size=8))
    parts = step(
        trainer(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert whole.norm() > 1e-3


def test_checkpoints_hold_the_prompt_only_and_resume(trainer, tmp_path):
    first = trainer(max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    (weights,) = (tmp_path / "checkpoint-1").glob("model*")
    assert weights.stat().st_size < 2 * 5 * 32 * 4
    resumed = trainer(max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(resumed.model.prompts["p5"], first.model.prompts["p5"])


def test_a_checkpoint_may_lack_a_prompt_that_was_added_since(trainer, tmp_path):
    trainer(max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    more = trainer(max_steps=2)
    more.model.add_prompt("new", PromptConfig(3))
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert more.state.global_step == 2


def test_prediction_generates_with_the_prompt(trainer):
    seq2seq = trainer()
    predicted = seq2seq.predict(seq2seq.eval_dataset)
    assert predicted.metrics["test_loss"] > 0
    batch = seq2seq.data_collator(seq2seq.eval_dataset).to(seq2seq.model.device)
    expected = seq2seq.model.generate(batch["input_ids"], batch["attention_mask"], max_length=5)
    assert predicted.predictions[:, :5].tolist() == expected.tolist()


def test_gradient_checkpointing_argument(trainer):
    plain = step(trainer())
    checkpointed = step(trainer(gradient_checkpointing=True))
    torch.testing.assert_close(checkpointed, plain)


def test_a_generation_config_is_the_models(trainer):
    config = GenerationConfig(max_new_tokens=3, decoder_start_token_id=0, pad_token_id=0)
    seq2seq = trainer(generation_config=config, generation_max_length=None)
    assert seq2seq.model.model.generation_config is seq2seq.model.generation_config
    assert seq2seq.model.generation_config.max_new_tokens == 3
    predicted = seq2seq.predict(seq2seq.eval_dataset).predictions
    assert predicted[:, 1:4].any()
    assert not predicted[:, 4:].clip(0).any()  # filling
