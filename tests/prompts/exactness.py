# SPDX-License-Identifier: Apache-2.0
"""Whether two results in float32 are equal, as far as float32 goes."""

import torch

# Of the largest: HF's own gradients in fp32 are up to 7e-6 away from float64's, and so are ours.
GRADIENT = 2e-5


def assert_exact(ours, expected, tolerance=1e-5):
    """Of fp32's precision at the tensor's scale."""
    torch.testing.assert_close(
        ours, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max())
    )
