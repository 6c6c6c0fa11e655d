# SPDX-License-Identifier: Apache-2.0
"""Runs the op tests on every native CPU target of a sanitizer build: `python tools/sanitize.py BUILD_DIR`."""

import os
import subprocess
import sys

build = os.path.abspath(sys.argv[1])
# The C++ library too: AddressSanitizer intercepts exceptions, and looks for the real function when it is loaded.
libraries = [
    subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
    for name in ("libasan.so", "libstdc++.so.6")
]
environment = {
    **os.environ,
    "LD_PRELOAD": " ".join(libraries),
    # Python and torch leave memory to the process's end.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "PYTHONPATH": build,
    "PYTHONSAFEPATH": "1",
}
ask = f"import fastprompt as f; assert f.__file__.startswith({build!r}), f.__file__; print(*f._native.CPU_TARGETS)"
targets = subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True).split()
tests = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/ops",
    "tests/models/test_tape.py",
]
backends = ",".join(f"cpu:{target}" for target in targets)
sys.exit(subprocess.run([*tests, "--backends", backends], env=environment).returncode)
