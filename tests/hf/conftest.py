# SPDX-License-Identifier: Apache-2.0
"""transformers' own tests: the marks that they carry, and a line on how they went."""

import transformers

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


def pytest_terminal_summary(terminalreporter):
    stats = terminalreporter.stats
    passed, failed = (
        [dict(report.user_properties) for report in stats.get(kind, ())] for kind in ("passed", "failed")
    )
    both = [run for run in passed if run.get("stock") == "passes"]
    if both or any("stock" in run for run in failed):
        fused = sum(run["fused"] > 0 for run in both)
        neither = sum(run.get("stock") == "fails" for run in passed)
        worse = sum("stock" in run for run in failed)
        terminalreporter.write_line(
            f"transformers {transformers.__version__}'s model tests: {len(both)} pass on stock T5 and on patched T5"
            f" ({fused} ran fused layers), {worse} on stock T5 only; {neither} fail on both"
        )
