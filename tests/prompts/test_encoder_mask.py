# SPDX-License-Identifier: Apache-2.0
"""encoder_mask says which rows of the encoder's output are real."""

import pytest
import torch

from fastprompt import PromptConfig, PromptModel


@pytest.mark.parametrize("padding", ["right", "left", None])
@pytest.mark.parametrize("names", ["p2", ["p2", "p5", "p2"], None])
def test_rows_of_prompts_and_tokens(make_prompted, make_batch, padding, names):
    """Its rows are those that a longer, other filling leaves as they are."""
    model, batch = make_prompted(lengths=(2, 5)), make_batch(padding)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = model.encoder_mask(ids, mask if padding else None, prompts=names)
    states = model.encode(ids, mask if padding else None, prompts=names).last_hidden_state
    assert found.dtype == torch.int64
    assert found.shape == states.shape[:2]
    lengths = [
        int(name[1:]) for name in ([names or "p2"] * 3 if names is None or isinstance(names, str) else names)
    ]
    tokens = mask.sum(1) if padding else torch.full((3,), ids.shape[1])
    assert found.sum(1).tolist() == [P + int(n) for P, n in zip(lengths, tokens, strict=True)]
    alone = model.encode(ids[:1, mask[0].bool()], prompts="p2").last_hidden_state[0]
    torch.testing.assert_close(states[0][found[0].bool()], alone, rtol=1e-4, atol=1e-4)


def test_kinds_without_rows_in_the_encoder(make_model, make_batch, monkeypatch):
    model, batch = PromptModel(make_model("ul2"), PromptConfig(5, kind="cached")), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    monkeypatch.setattr(model, "_site_keys", lambda *_: pytest.fail("keys that nobody reads"))
    assert torch.equal(model.encoder_mask(ids, mask.float()), mask)
    assert torch.equal(model.encoder_mask(ids), torch.ones_like(ids))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model.encoder_mask(ids, mask[:, 1:])
    with pytest.raises(ValueError, match="there is no prompt 'b'"):
        model.encoder_mask(ids, mask, prompts="b")
