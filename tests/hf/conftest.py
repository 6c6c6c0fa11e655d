# SPDX-License-Identifier: Apache-2.0
"""Reports on transformers' own tests, and the marks that they carry."""

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
    "slow",
    "hub_test",
)


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: transformers'")
