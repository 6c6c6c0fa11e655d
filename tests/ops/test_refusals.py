# SPDX-License-Identifier: Apache-2.0
"""What every schema refuses of each of its tensors, whoever calls it: kernels are given addresses and trust them."""

import pytest
import torch
from samples import SAMPLES

from fastprompt.dispatch import OPS, direct


def each_changed(arguments, change):
    """The arguments with one of their tensors changed, for each; those in lists too."""
    for i, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            yield (*arguments[:i], change(x.detach()), *arguments[i + 1 :])
        elif isinstance(x, list):
            for j, each in enumerate(x):
                yield (*arguments[:i], [*x[:j], change(each), *x[j + 1 :]], *arguments[i + 1 :])


def tensors(arguments):
    found = [each for x in arguments for each in (x if isinstance(x, list) else [x])]
    return [x for x in found if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_tensor_that_is_not_where_the_others_are(name):
    for member, arguments in SAMPLES[name]():
        for given in each_changed(arguments, lambda x: x.to("meta")):
            if len(tensors(given)) > 1:
                with (
                    torch.no_grad(),
                    pytest.raises(ValueError, match=rf"^fastprompt::{name}\w*: .* must be on "),
                ):
                    getattr(torch.ops.fastprompt, member)(*given)


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_tensor_of_a_dtype_that_no_op_has(name):
    for member, arguments in SAMPLES[name]():
        for given in each_changed(arguments, lambda x: x.to(torch.complex64)):
            with (
                torch.no_grad(),
                pytest.raises(TypeError, match=rf"^fastprompt::{name}\w*: .* must have dtype "),
            ):
                getattr(torch.ops.fastprompt, member)(*given)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", sorted(OPS))
def test_what_is_no_tensor(name, recorded):
    """As the public functions call the schemas, where gradients are recorded and where not."""
    for member, arguments in SAMPLES[name]():
        for given in each_changed(arguments, lambda x: x.tolist()):
            with (
                torch.set_grad_enabled(recorded),
                pytest.raises(
                    TypeError,
                    match=rf"^fastprompt::{name}: \w+ must be a torch\.Tensor, got (list|float|int)$",
                ),
            ):
                getattr(direct, member)(*given)
