# SPDX-License-Identifier: Apache-2.0
"""What transformers' common model tests need to know of T5: tiny models of every class and their inputs."""

import importlib
import sys
import unittest
from pathlib import Path
from types import ModuleType

import transformers

# `make hf-tests` puts the tests of transformers' sdist here.
SDIST = Path(__file__).parents[2] / ".venv" / f"transformers-tests-{transformers.__version__}"


def _common() -> ModuleType:
    """tests/test_modeling_common.py. The two folders that it imports from are not in the sdist: empty mixins."""
    sys.path.append(str(SDIST / "packages"))
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SDIST / "tests")]
    sys.modules["transformers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = ModuleType(f"transformers_tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__] = module
        sys.modules[module.__name__.rpartition(".")[0]] = ModuleType(name)
    return importlib.import_module("transformers_tests.test_modeling_common")


common = _common()


class Inputs:
    """The model tester that the common tests ask for a configuration and inputs."""

    batch_size = 5
    encoder_seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2

    def __init__(self, config_class, changes, is_training, decoder_seq_length):
        self.config_class, self.changes, self.is_training = config_class, changes, is_training
        if decoder_seq_length:
            self.decoder_seq_length = decoder_seq_length
        self.seq_length = decoder_seq_length or self.encoder_seq_length

    def get_config(self):
        return self.config_class(
            vocab_size=99,
            d_model=self.hidden_size,
            d_ff=37,
            d_kv=16,  # a width that the kernels have
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            relative_attention_num_buckets=8,
            eos_token_id=1,
            pad_token_id=0,
            decoder_start_token_id=0,
            **self.changes,
        )

    def prepare_config_and_inputs_for_common(self):
        S, T = self.encoder_seq_length, self.seq_length
        inputs = {
            "input_ids": self.ids(S),
            "attention_mask": common.random_attention_mask([self.batch_size, S]),
        }
        if T != S:
            mask = common.random_attention_mask([self.batch_size, T])
            inputs |= {"decoder_input_ids": self.ids(T), "decoder_attention_mask": mask}
        return self.get_config(), inputs

    def ids(self, length):
        ids = common.ids_tensor([self.batch_size, length], 97) + 2
        ids[:, -1] = 1  # the only </s> of a row, at which a sequence is classified
        return ids


def _cases(
    prefix: str, *names: str, decoder_seq_length: int | None = 9, is_training: bool = True, **changes: object
) -> type[unittest.TestCase]:
    classes = tuple(getattr(transformers, prefix + name) for name in names)
    config_class = classes[0].config_class
    bases = [common.ModelTesterMixin, unittest.TestCase]
    if any(model_class.can_generate() for model_class in classes):  # a common test looks for this class
        bases.insert(1, sys.modules["transformers_tests.generation.test_utils"].GenerationTesterMixin)

    class Cases(*bases):
        all_model_classes = classes
        is_encoder_decoder = decoder_seq_length is not None
        model_split_percents = (0.5, 0.8, 0.9)

        def setUp(self):
            self.model_tester = Inputs(config_class, changes, is_training, decoder_seq_length)

    return Cases


SEQ2SEQ = ("Model", "ForConditionalGeneration", "ForQuestionAnswering")
ENCODER = {"decoder_seq_length": None, "is_encoder_decoder": False}
CASES = {
    "t5": _cases("T5", *SEQ2SEQ, feed_forward_proj="relu"),
    "t5-classifier": _cases("T5", "ForSequenceClassification", decoder_seq_length=Inputs.encoder_seq_length),
    "t5-encoder": _cases("T5", "EncoderModel", is_training=False, **ENCODER),
    "t5-tagger": _cases("T5", "ForTokenClassification", **ENCODER),
    "v1_1": _cases("T5", *SEQ2SEQ, feed_forward_proj="gated-gelu"),
    "mt5": _cases("MT5", *SEQ2SEQ),
    "umt5": _cases("UMT5", *SEQ2SEQ),
    "umt5-encoder": _cases("UMT5", "EncoderModel", is_training=False, **ENCODER),
}
