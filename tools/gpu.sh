#!/usr/bin/env bash
# For a machine with an NVIDIA GPU and no network: builds into build/gpu with the machine's own Python and torch, runs
# the GPU tests and the benchmarks, and writes logs and JSONL to $OUT. Ends within 9 minutes, and says what failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=$(realpath -m "${OUT:-benchmarks/results/gpu}") site=$PWD/build/gpu
mkdir -p "$OUT" "$site"
export FASTPROMPT_CUDA=1 FASTPROMPT_GENCODE=${FASTPROMPT_GENCODE:-90a}

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
    tail -n 25 "$OUT/$name.log"
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    return $status
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv || exit 1
step build 150 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --upgrade --target "$site" . || exit 1
export PYTHONPATH=$site PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1
failed=0
step tests 180 "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops --device cuda || failed=1
step benchmarks 180 "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/bench_*.py --device cuda --results "$OUT" || failed=1
exit $failed
