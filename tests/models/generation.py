# SPDX-License-Identifier: Apache-2.0
"""What two models generate, to be compared."""

import torch
from layouts import close


def generated(model, batch, **options):
    """Token ids, and the logits [B, V] of every step; the sequences' scores of a beam search."""
    options = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    options = {"max_new_tokens": 16, "min_new_tokens": 16} | options  # beyond the last bucket
    torch.manual_seed(3)
    result = model.generate(
        **batch, **options, output_logits=True, output_scores=True, return_dict_in_generate=True
    )
    if "num_beams" in options:  # the order of beams that do not win is a matter of rounding
        return result.sequences, result.sequences_scores
    return result.sequences, torch.stack(result.logits)


def generates_the_same(eager, ours, batch, **options):
    (ids, numbers), (eager_ids, eager_numbers) = (
        generated(model, batch, **options) for model in (ours, eager)
    )
    assert torch.equal(ids, eager_ids)
    close(numbers, eager_numbers, 1e-4)
