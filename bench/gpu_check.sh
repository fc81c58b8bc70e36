#!/usr/bin/env bash
# Every check that needs a GPU, in one command: bash bench/gpu_check.sh [arguments of python -m bench, such as --smoke]
#
#   tests       pytest -m gpu
#   memcheck    compute-sanitizer over pytest -m gpu -k sanitizer: accesses out of bounds
#   racecheck   the same: races in shared memory
#   ncu         a profile of one gram_survivors launch
#   bench       python -m bench --device cuda
#
# A step goes on if one before it failed; the exit status is 1 if any failed. A step whose tool is missing is skipped.
# PYTHON chooses the interpreter, LOG_DIR where logs go, STEP_LIMIT_S how long a step may take.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
logs=${LOG_DIR:-runs/gpu_check}
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

# step NAME TOOL COMMAND...: run a command that needs a tool, its output to the terminal and a log
step() {
    local name=$1 tool=$2 result=passed
    shift 2
    if ! command -v "$tool" >/dev/null; then
        summary+=("$name: skipped, there is no $tool")
        return
    fi
    echo "== $name: $*"
    timeout "${STEP_LIMIT_S:-1200}" "$@" 2>&1 | tee "$logs/$name.log"
    local code=${PIPESTATUS[0]}  # 124: the time was up
    [ "$code" -eq 0 ] || { status=1 && result="FAILED with status $code"; }
    summary+=("$name: $result, $logs/$name.log")
}

step tests "$python" "$python" -m pytest -m gpu

# without torch's cache of allocations, so that every tensor has its own bounds
for tool in memcheck racecheck; do
    step $tool compute-sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool $tool --error-exitcode 99 --target-processes all \
        "$python" -m pytest -m gpu -k sanitizer
done

step ncu ncu ncu --kernel-name regex:gram_survivors --launch-count 1 --set full \
    --force-overwrite --export "$logs/gram_survivors" \
    "$python" -c '
import torch
from topk_ortho import topk_pairs
topk_pairs(torch.randn(4096, 16384, device="cuda", dtype=torch.bfloat16), backend="triton")
torch.cuda.synchronize()'

step bench "$python" "$python" -m bench --device cuda "$@"

echo "== summary"
printf '%s\n' "${summary[@]}"
exit $status
