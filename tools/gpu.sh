#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# For a machine with an NVIDIA GPU and no network: builds into build/gpu with the machine's own Python and torch, runs
# the GPU tests and the benchmarks, and writes logs and JSONL to $OUT. Says what failed.
#
#     tools/gpu.sh [tests] [benchmarks]     they take up to 6 and 14 minutes; without arguments, both
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=$(realpath -m "${OUT:-benchmarks/results/gpu}") site=$PWD/build/gpu
mkdir -p "$OUT" "$site"
export FASTPROMPT_CUDA=1 FASTPROMPT_SPILLS=error FASTPROMPT_GENCODE=${FASTPROMPT_GENCODE:-90a}

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
    tail -n 25 "$OUT/$name.log"
    echo "== $name: exit $status after $((SECONDS - begin)) s"
    return $status
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv || exit 1
step build 150 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps --upgrade --target "$site" . || exit 1
export PYTHONPATH=$site:$PWD/benchmarks PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
parts=${*:-tests benchmarks} failed=0
if [[ $parts == *tests* ]]; then
    # Compiling takes most of the time.
    "$PYTHON" -c 'import xdist' 2> /dev/null && parallel="-n $(($(nproc) < 14 ? $(nproc) : 14))"
    # Names of tests as they end, and why they failed (tests/conftest.py): a run that is cut off has no summary.
    step tests 330 "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider ${parallel:-} \
        tests/models/test_{graphed,graphed_generate,patching,patched_{steps,dropout,generate,dtypes,files,compile},memory}.py \
        tests/models/test_{trained_weights,hooks,changed_layers,adapters,report}.py \
        tests/training/test_by_graphs.py tests/triton tests/ops tests/prompts --device cuda || failed=1
    grep -aoE '(FAILED|ERROR) tests/.*' "$OUT/tests.log" | sort -u
fi
if [[ $parts == *benchmarks* ]]; then
    for limit_of in training_step:260 t5_attention:140 prompt_kinds:150 generate:90 linear_cross_entropy:60 rms_norm:40 \
        gated_act:40 dropout_add:40 relu_dropout:40 prompt_embed:40; do
        name=${limit_of%:*}
        step "$name" "${limit_of#*:}" "$PYTHON" "benchmarks/bench_$name.py" --device cuda --seconds 0.3 --results "$OUT" || failed=1
    done
fi
exit $failed
