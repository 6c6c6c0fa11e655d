# SPDX-License-Identifier: Apache-2.0
"""What follows a PromptModel's operations: compilers, exporters and tracers see shapes, torch.func sees tensors."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from fastprompt import PromptConfig, PromptModel

KEYED = ["cached", "prefix"]


class Logits(nn.Module):
    """Of inputs that are all positional."""

    def __init__(self, prompted):
        super().__init__()
        self.prompted = prompted

    def forward(self, input_ids, attention_mask, labels):
        given = {"decoder_input_ids": labels.clamp_min(0), "use_cache": False}
        return self.prompted(input_ids, attention_mask, **given).logits


def sizes(make_batch):
    return [tuple(make_batch(B=B, S=S, T=T).values()) for B, S, T in ((4, 9, 5), (6, 12, 7), (3, 5, 2))]


def test_an_exported_program_serves_other_batches(make_prompted, make_batch):
    """Of any size, where one prompt is for all rows."""
    model = Logits(make_prompted()).eval()
    first, *others = sizes(make_batch)
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) * 3
    program = torch.export.export(model, first, dynamic_shapes=dynamic).module()
    for batch in others:
        torch.testing.assert_close(program(*batch), model(*batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["prepend", "cached"])
def test_one_graph_for_batches_of_any_size(make_model, make_batch, kind):
    model = Logits(PromptModel(make_model("ul2"), PromptConfig(5, kind=kind, init="uniform"))).eval()
    graphs = []

    def collect(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=collect, dynamic=True, fullgraph=True)
    for batch in sizes(make_batch):
        torch.testing.assert_close(compiled(*batch), model(*batch), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", KEYED)
def test_an_export_of_other_kinds_is_refused_as_such(make_model, make_batch, kind):
    model = Logits(PromptModel(make_model("ul2"), PromptConfig(5, kind=kind))).eval()
    with pytest.raises(ValueError, match=r"torch\.export takes prompts of kind 'prepend' alone"):
        torch.export.export(model, sizes(make_batch)[0])


def test_gradients_by_torch_func_of_a_ragged_batch(make_prompted, make_batch):
    """Which runs padded there: packed rows are for kernels that no transform sees through."""
    model, batch = make_prompted(), make_batch()
    (prompt,) = (
        model.parameters_to_train() if hasattr(model, "parameters_to_train") else model.prompts.values()
    )

    def loss(rows):
        return torch.func.functional_call(model, {"prompts.p5": rows}, (), batch).loss

    rows = prompt.detach().clone()
    found = torch.func.grad(loss)(rows)
    (expected,) = torch.autograd.grad(model(**batch).loss, prompt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    many = torch.func.vmap(loss)(torch.stack([rows, 2 * rows]))
    torch.testing.assert_close(many, torch.stack([loss(rows), loss(2 * rows)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KEYED)
def test_what_make_fx_records_serves_other_masks(make_model, make_batch, kind):
    model = Logits(PromptModel(make_model("ul2"), PromptConfig(5, kind=kind, init="uniform"))).eval()
    ids, mask, labels = make_batch().values()
    recorded = make_fx(model)(ids, mask, labels)
    other = torch.ones_like(mask)
    other[0, 4:] = 0
    torch.testing.assert_close(recorded(ids, other, labels), model(ids, other, labels), rtol=1e-4, atol=1e-4)
