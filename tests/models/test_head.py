# SPDX-License-Identifier: Apache-2.0
"""patch(head=True): the language-model head by frozen_linear, and by nn.Linear where that is not the same."""

import copy
import pickle
import sys

import pytest
import torch
from layouts import LAYOUTS, close, step
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt import explain, patch, unpatch
from fastprompt.modules.head import FastHead
from fastprompt.ops.frozen_linear import BF16_ROWS

pytestmark = pytest.mark.usefixtures("one_thread", "on_a_cpu")
page = sys.modules["fastprompt.ops.frozen_linear"]


@pytest.fixture
def on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("a GPU runs nn.Linear's own forward")


class Heads(TorchDispatchMode):
    """Counts frozen_linear's products with the weight of a model's head."""

    def __init__(self, model):
        super().__init__()
        head = model.get_output_embeddings()
        self.weight, self.count = getattr(head, "base_layer", head).weight, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fastprompt.frozen_linear.default:
            self.count += args[1].data_ptr() == self.weight.data_ptr()
        return function(*args, **(kwargs or {}))


def counted(model, call):
    with Heads(model) as heads:
        return call(), heads.count


def head_row(model):
    return next(row for row in explain(model) if row.path.endswith("lm_head"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients(make, batch, labels, layout):
    expected = step(make(layout), batch(), labels)
    model = patch(make(layout), attention=False, norm=False, ff=False)
    results, count = counted(model, lambda: step(model, batch(), labels))
    for ours, theirs in zip(results, expected, strict=True):
        close(ours, theirs)
    assert count == 1
    assert head_row(model)[1:3] == ("Linear", "frozen_linear")
    assert type(unpatch(model).lm_head) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate(make, batch, options):
    options |= {"max_new_tokens": 5, "min_new_tokens": 5}
    expected, model = make().generate(**batch(B=6), **options), patch(make())
    found, count = counted(model, lambda: model.generate(**batch(B=6), **options))
    assert torch.equal(found, expected)
    assert count == 5


def hooked(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def trained(model):
    model.lm_head.weight.requires_grad_()


def adapted(model):
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hooked, "lm_head has hooks"), (trained, "lm_head.weight is trained"), (adapted, None)],
)
@pytest.mark.parametrize("before", [False, True])
def test_what_something_else_decides_is_stock(make, batch, labels, change, reason, before):
    """What a LoRA layer adds is its own; the product beneath it is the head's as before."""
    plain, model = make(), make()
    change(plain)
    expected = step(plain, batch(), labels)
    for act in (patch, change) if before else (change, patch):
        act(model)
    results, count = counted(model, lambda: step(model, batch(), labels))
    for ours, theirs in zip(results, expected, strict=True):
        close(ours, theirs)
    assert count == (before if reason is None else 0)
    assert head_row(model).reason == (reason or "it computes something else than T5's")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ours_where_torch_is_slow(make, dtype, monkeypatch):
    monkeypatch.setattr(page, "SLOW_HALVES", (dtype,))
    model, x = make(dtype=dtype), torch.randn(8, 48, dtype=dtype)
    found, count = counted(patch(model), lambda: model.lm_head(x))
    torch.testing.assert_close(found, (x.float() @ model.lm_head.weight.float().t()).to(dtype))
    assert count == 1
    assert head_row(model).reason is None


@pytest.mark.parametrize(("rows", "ours"), [(1, 1), (BF16_ROWS, 1), (BF16_ROWS + 1, 0)])
def test_few_rows_of_a_large_head_in_bf16_are_ours_where_they_are_multiplied(make, rows, ours, monkeypatch):
    monkeypatch.setattr(page, "SLOW_HALVES", ())
    monkeypatch.setattr(page, "MULTIPLIES_BF16", True)
    model, x = make(dtype=torch.bfloat16, vocab_size=1500), torch.randn(rows, 48).bfloat16()
    found, count = counted(patch(model), lambda: model.lm_head(x))
    torch.testing.assert_close(found, (x.float() @ model.lm_head.weight.float().t()).bfloat16())
    assert count == ours
    assert head_row(model).reason is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_torchs(make, dtype, monkeypatch):
    monkeypatch.setattr(page, "SLOW_HALVES", ())
    monkeypatch.setattr(page, "MULTIPLIES_BF16", False)
    model, x = make(dtype=dtype), torch.randn(8, 48, dtype=dtype)
    expected = model.lm_head(x)
    found, count = counted(patch(model), lambda: model.lm_head(x))
    assert torch.equal(found, expected)
    assert count == 0
    assert head_row(model).reason == f"lm_head.weight is {dtype} on cpu, which nn.Linear does as fast"


@pytest.mark.parametrize("change", [hooked, trained, adapted])
def test_a_head_of_somebody_else_is_no_error(make, change):
    model = make()
    change(model)
    patch(model, on_unsupported="error")


def test_autocast_is_torchs(make):
    model, x = make(), torch.randn(8, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.lm_head(x)
        assert torch.equal(patch(model).lm_head(x), expected)


def test_one_graph(make):
    model, x = patch(make()), torch.randn(8, 48)
    compiled = torch.compile(model.lm_head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model.lm_head(x))


def test_copies_pickles_and_new_heads(make):
    model = patch(make())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.lm_head) is type(model.lm_head)
        assert issubclass(type(twin.lm_head), FastHead)
    model.resize_token_embeddings(80)
    assert model.lm_head(torch.randn(2, 3, 48)).shape == (2, 3, 80)


def test_a_class_that_others_make_of_the_heads_is_theirs(make):
    model, x = patch(make()), torch.randn(8, 48)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    model.requires_grad_(False)
    expected, theirs = model.lm_head(x), type(model.lm_head)
    assert torch.equal(patch(model).lm_head(x), expected)
    assert type(model.lm_head) is theirs
    torch.testing.assert_close(unpatch(model).lm_head(x), expected)
    assert type(model.lm_head).__bases__ == (nn.Linear,)


def test_other_linear_layers_stay(make):
    model = patch(make())
    model.classifier = nn.Linear(48, 3)
    patch(model)
    assert type(model.classifier) is nn.Linear
    assert [path for path, each in model.named_modules() if isinstance(each, FastHead)] == ["lm_head"]
    with pytest.raises(ValueError, match="must contain a T5"):
        patch(nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
