#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: tests, compute-sanitizer, measurements; a table last.
#
#   bench/gpu.sh              on a machine with a GPU, torch and Triton; no network
#   bench/gpu.sh --tune       measures the launch sizes as well and writes sizes.json; up to four minutes more
#   bench/gpu.sh --dry-run    says what it would run and why, and runs nothing
#
# PYTHON chooses the interpreter, OUT the folder for logs, JSON and picture. A step that fails does not stop the next;
# the exit status says that one did.
set -u
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
out=${OUT:-bench/out}
dry_run=
tune=
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=1 ;;
        --tune) tune=1 ;;
        *) echo "usage: bench/gpu.sh [--dry-run] [--tune]" >&2; exit 2 ;;
    esac
done

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET # the tests set it where there is no GPU
failed=()

# step NAME SECONDS WHY COMMAND...: the command's output goes to the terminal and to NAME.log
step() {
    local name=$1 seconds=$2 why=$3 status
    shift 3
    echo
    echo "== $name, up to $seconds s: $why"
    echo "   $*"
    [ -n "$dry_run" ] && return
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 124 ] && echo "== $name: stopped after $seconds s"
    [ "$status" -eq 0 ] || failed+=("$name")
}

[ -n "$dry_run" ] || mkdir -p "$out"

step machine 60 "builds the CPU library; versions, devices, backends" \
    bash -c "$python csrc/build.py && $python -m mlkernels"
step tests 170 "the property table on the device, sizes past 2^31 elements, CUDA graphs, synchronisations" \
    "$python" -m pytest -q tests/test_gpu.py
if command -v compute-sanitizer > /dev/null || [ -n "$dry_run" ]; then
    # Triton's workers compile outside of it. Torch's allocator would hide what lies just past a tensor.
    step sanitizer 100 "reads and writes out of bounds, over a few tiny launches of every loss" \
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        --target-processes application-only "$python" -m bench.gpu --smoke
else
    echo "== sanitizer: left out, there is no compute-sanitizer on PATH"
    step smoke 60 "a few tiny launches of every loss" "$python" -m bench.gpu --smoke
fi
if [ -n "$tune" ]; then
    step tune 230 "launch sizes for this architecture, into sizes.json" "$python" -m bench.tune
    [ -n "$dry_run" ] || cp mlkernels/backends/triton/sizes.json "$out"
fi
step measure 255 "share of the copy bandwidth, peers, small problems, float16; JSON and picture" \
    "$python" -m bench.gpu --out "$out"

echo
if [ -n "$dry_run" ]; then
    echo "dry run: nothing was run; results would be in $out"
elif [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}; logs in $out"
    exit 1
else
    echo "all steps passed; logs and results in $out"
fi
