# SPDX-License-Identifier: Apache-2.0
"""A patched model under torch.compile and torch.jit."""

import copy

import pytest
import torch
from layouts import close, no_further, step

from fastprompt import explain, patch

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fullgraph_compile(make, batch, labels):
    stock, inputs = make(), batch()
    truth = step(copy.deepcopy(stock).double(), inputs, labels)
    expected = step(stock, inputs, labels)
    torch._dynamo.reset()
    compiled = torch.compile(patch(stock, memory="balanced"), fullgraph=True, backend="aot_eager")
    no_further(step(compiled, inputs, labels, use_cache=False), expected, truth)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_fullgraph_compile_of_a_stack_by_itself(part, make, batch):
    """As a server compiles it, whose outermost call writes to its keywords."""
    stack, inputs = getattr(patch(make()), part), batch()
    if part == "decoder":
        hidden = torch.randn(3, 17, 48, device=inputs["input_ids"].device)
        inputs = {**inputs, "encoder_hidden_states": hidden, "use_cache": False}
    with torch.no_grad():
        expected = stack(**inputs)[0]
        torch._dynamo.reset()
        close(torch.compile(stack, fullgraph=True, backend="aot_eager")(**inputs)[0], expected)


def test_compiled_layers_write_to_nothing_that_they_return(make, labels, device):
    """PyTorch 2.11's compiler gives a layer that does a gradient of zero."""
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model, embeds = patch(make()), torch.randn(3, 17, 48, device=device, requires_grad=True)
    torch.compile(model, fullgraph=True, backend=collect)(
        inputs_embeds=embeds, labels=labels, use_cache=False
    )
    layers = [each for graph in graphs for name, each in graph.named_modules() if name.startswith("fwd_body")]
    calls = {str(node.target) for each in layers for node in each.graph.nodes if node.op.startswith("call")}
    assert layers
    assert calls
    assert not {call for call in calls if call.endswith("_")}


def test_a_scripted_layer_runs_as_it_is(make, batch, labels):
    model = patch(make())
    expected = step(make(), batch(), labels)
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.q = torch.jit.script(attention.q)
    for ours, theirs in zip(step(model, batch(), labels), expected, strict=True):
        close(ours, theirs)
    assert "q is a RecursiveScriptModule" in str(explain(model))
