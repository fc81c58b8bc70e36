#!/usr/bin/env bash
# Every check that needs a GPU, in one command of less than 8 minutes, or those that are named:
#
#   bash bench/gpu_check.sh [STEP ...] [options of python -m bench, such as --smoke]
#
# STEP        seconds  what it is
#   tests         185  pytest -m gpu, with pytest-xdist (where it is installed) on up to 16 cores: most is compilation
#   memcheck       60  compute-sanitizer over the test named sanitizer: accesses out of bounds
#   racecheck      95  the same: races in shared memory
#   ncu            35  a profile of one first pass
#   bench          85  python -m bench --device cuda, which begins no case after 55 seconds
#
# The seconds are the longest that a step may take, 460 together; a step that reaches them is interrupted, and fails with
# status 124, or 137 if it would not end. A step goes on if one before it failed; the exit status is 1 if any failed. A
# step whose tool is missing is skipped. Output goes into the log of its step as it comes, results into summary.txt.
# PYTHON chooses the interpreter, LOG_DIR where logs go, STEP_LIMIT_S another limit for every step.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
logs=${LOG_DIR:-runs/gpu_check}
export PATH="$PATH:/usr/local/cuda/bin"
export PYTHONUNBUFFERED=1  # a log is complete whenever its step is stopped
unset TRITON_INTERPRET     # it would run the kernels on the CPU

chosen=()
while [[ $# -gt 0 && $1 != -* ]]; do
    case $1 in
        tests | memcheck | racecheck | ncu | bench) chosen+=("$1") ;;
        *) echo "error: there is no step $1, only tests, memcheck, racecheck, ncu and bench" >&2 && exit 2 ;;
    esac
    shift
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch of $python sees no CUDA or ROCm device" >&2
    exit 2
fi
mkdir -p "$logs" && : >"$logs/summary.txt" || exit 1

status=0

# step NAME SECONDS TOOL COMMAND...: run a command that needs a tool, its output to the terminal and a log
step() {
    local name=$1 limit=${STEP_LIMIT_S:-$2} tool=$3 result=passed start=$SECONDS
    shift 3
    [[ ${#chosen[@]} -eq 0 || " ${chosen[*]} " == *" $name "* ]] || return
    if ! command -v "$tool" >/dev/null; then
        echo "$name: skipped, there is no $tool" >>"$logs/summary.txt"
        return
    fi
    echo "== $name: $*"
    # interrupted, pytest still shows what failed
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { status=1 && result="FAILED with status $code"; }
    echo "$name: $result, $((SECONDS - start)) s, $logs/$name.log" >>"$logs/summary.txt"
}

processes=()
if "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(nproc)
    processes=(-n $((cores < 16 ? cores : 16)))
fi
# those that have tests on a GPU; only the last of them needs the packages that training does
paths=(tests/test_gpu.py tests/kernels tests/backends tests/test_{custom_ops,modules,pairs,validation,functional}.py)
if "$python" -c 'import sae_lens' 2>/dev/null; then paths+=(tests/test_devices.py); fi
step tests 185 "$python" "$python" -m pytest -m gpu -q --tb=short --durations=15 "${processes[@]}" "${paths[@]}"

# without torch's cache of allocations, so that every tensor has its own bounds
sanitizer() {
    local tool=$1 limit=$2
    step "$tool" "$limit" compute-sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
        "$python" -m pytest -q --tb=short tests/test_gpu.py -k sanitizer
}
sanitizer memcheck 60
sanitizer racecheck 95

step ncu 35 ncu ncu --clock-control none --kernel-name regex:survivors --launch-count 1 --set full \
    --force-overwrite --export "$logs/first_pass" \
    "$python" -c '
import torch
from topk_ortho import topk_pairs
topk_pairs(torch.randn(4096, 16384, device="cuda", dtype=torch.bfloat16), backend="triton")
torch.cuda.synchronize()'

step bench 85 "$python" "$python" -m bench --device cuda --time-budget 55 "$@"

echo "== summary"
cat "$logs/summary.txt"
exit $status
