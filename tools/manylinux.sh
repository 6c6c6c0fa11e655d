#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# manylinux.sh WHEEL FOLDER: the wheel into the folder under a name by which pip knows machines that it runs on.
# Without a libgomp of its own: PyTorch brings one along, and two would each start threads.
set -euo pipefail
bin=$(dirname "$(command -v "${PYTHON:-python3}")")
PATH=$bin:$PATH auditwheel repair --exclude libgomp.so.1 -w "$2" "$1"
