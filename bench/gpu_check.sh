#!/usr/bin/env bash
# Every check that needs a GPU, in one command: bash bench/gpu_check.sh [arguments of bench.gpu, such as --smoke]
#
#   tests       pytest -m gpu
#   memcheck    compute-sanitizer over pytest -m gpu -k sanitizer: accesses out of bounds
#   racecheck   the same: races in shared memory
#   ncu         a profile of one gram_select launch
#   bench       python -m bench.gpu
#   sparse      python -m bench.sparse --device cuda
#
# A step goes on if one before it failed; the exit status is 1 if any failed. A step whose tool is missing is skipped.
# PYTHON chooses the interpreter, LOG_DIR where logs go, STEP_LIMIT_S how long a step may take.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
logs=${LOG_DIR:-runs/gpu_check}
limit=${STEP_LIMIT_S:-1200}
export PATH="$PATH:/usr/local/cuda/bin"
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # the tests ask for deterministic algorithms
unset TRITON_INTERPRET                  # it would run the kernels on the CPU

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch of $python sees no CUDA or ROCm device" >&2
    exit 2
fi
mkdir -p "$logs" || exit 1

summary=()
status=0

# step NAME COMMAND...: run it, its output to the terminal and a log
step() {
    local name=$1 code
    shift
    echo "== $name: $*"
    timeout "$limit" "$@" 2>&1 | tee "$logs/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) summary+=("$name: passed, $logs/$name.log") ;;
        124) summary+=("$name: FAILED, stopped after $limit s, $logs/$name.log") ;;
        *) summary+=("$name: FAILED with status $code, $logs/$name.log") ;;
    esac
    [ "$code" -eq 0 ] || status=1
}

# has NAME TOOL: whether the tool is there; else the step is skipped
has() {
    command -v "$2" >/dev/null && return 0
    echo "== $1: skipped, there is no $2"
    summary+=("$1: skipped, there is no $2")
    return 1
}

step tests "$python" -m pytest -m gpu

# without torch's cache of allocations, so that every tensor has its own bounds
for tool in memcheck racecheck; do
    has $tool compute-sanitizer && step $tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool $tool --error-exitcode 99 --target-processes all \
        "$python" -m pytest -m gpu -k sanitizer
done

has ncu ncu && step ncu ncu --kernel-name regex:gram_select --launch-count 1 --set full \
    --force-overwrite --export "$logs/gram_select" \
    "$python" -c '
import torch
from topk_ortho import topk_pairs
topk_pairs(torch.randn(4096, 16384, device="cuda", dtype=torch.bfloat16), backend="triton")
torch.cuda.synchronize()'

step bench "$python" -m bench.gpu "$@"
step sparse "$python" -m bench.sparse --device cuda

echo "== summary"
printf '%s\n' "${summary[@]}"
exit $status
