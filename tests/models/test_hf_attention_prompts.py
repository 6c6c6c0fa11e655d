# SPDX-License-Identifier: Apache-2.0
"""Keys and values of prompts in attn_implementation="fastprompt": whose they are, and what they do not go with."""

import pytest
import torch
from layouts import close
from transformers.masking_utils import causal_mask_function

from fastprompt import hf_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def test_prompts_are_read_by_their_own_model_alone(pair, batch):
    """Another of its class may run meanwhile, as in a logits processor."""
    (_, first), (_, other) = pair("t5"), pair("t5")
    keys = [tuple(torch.randn(1, 3, 4, 16, device=first.device) for _ in range(2)) for _ in "kv"]
    prompt = hf_attention.PromptKeys(*keys, bias=torch.zeros(4, 25, device=first.device))
    expected, before = (model.encoder(**batch())[0] for model in (other, first))
    with hf_attention.prompt_keys(first, encoder=prompt):
        assert torch.equal(other.encoder(**batch())[0], expected)
        assert not torch.allclose(first.encoder(**batch())[0], before)
    assert torch.equal(first.encoder(**batch())[0], before)


def test_no_mask_of_another_form_goes_with_prompts(pair):
    _, model = pair("t5")
    prompt = hf_attention.PromptKeys((), ())
    given = {"config": model.decoder.config, "mask_function": causal_mask_function, "kv_offset": 2}
    with (
        hf_attention.prompt_keys(model, decoder=prompt),
        pytest.raises(ValueError, match=r"do not go with a mask of another form than \[B, S\]"),
    ):
        hf_attention.allowed_keys(**given)


def test_a_compiled_model_is_refused_while_prompts_are_read(pair, batch):
    """The compiler cannot tell whose they are."""
    _, model = pair("t5")
    compiled = torch.compile(model.encoder, backend="eager", fullgraph=True)
    with (
        hf_attention.prompt_keys(model, decoder=hf_attention.PromptKeys((), ())),
        pytest.raises(Exception, match=r"do not go with generation through torch\.compile"),
    ):
        compiled(**batch())
    close(compiled(**batch())[0], model.encoder(**batch())[0])
    torch._dynamo.reset()
