#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: builds, tests, compute-sanitizer, measurements; a table
# last.
#
#   bench/gpu.sh              on a machine with a GPU, torch, Triton and nvcc; no network
#   bench/gpu.sh --tune       measures the launch sizes and the choice of the backend as well and writes sizes.json and
#                             choice.json; up to four and a half minutes more
#   bench/gpu.sh --dry-run    says what it would run and why, and runs nothing
#
# PYTHON chooses the interpreter, OUT the folder for logs, JSON and picture; MLKERNELS_CUDA_ARCHS what the CUDA kernels
# are built for (default: the GPU at hand). A step that fails does not stop the next; the exit status says that one did.
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
waiting=() # what runs beside the next steps: name, seconds, process

announce() { # NAME WHEN WHY COMMAND...
    local name=$1 when=$2 why=$3
    shift 3
    echo
    echo "== $name, $when: $why"
    echo "   $*"
}

judge() { # NAME SECONDS STATUS
    [ "$3" -eq 124 ] && echo "== $1: stopped after $2 s"
    [ "$3" -eq 0 ] || failed+=("$1")
}

# step NAME SECONDS WHY COMMAND...: the command's output goes to the terminal and to NAME.log
step() {
    local name=$1 seconds=$2 why=$3
    shift 3
    announce "$name" "up to $seconds s" "$why" "$@"
    [ -n "$dry_run" ] && return
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    judge "$name" "$seconds" "${PIPESTATUS[0]}"
}

# The same, beside the steps that follow; its output comes when it is waited for.
beside() {
    local name=$1 seconds=$2 why=$3
    shift 3
    announce "$name" "up to $seconds s beside the next" "$why" "$@"
    [ -n "$dry_run" ] && return
    timeout --kill-after=10 "$seconds" "$@" > "$out/$name.log" 2>&1 < /dev/null &
    waiting+=("$name $seconds $!")
}

finish() {
    local one name seconds process status
    for one in "${waiting[@]+"${waiting[@]}"}"; do
        read -r name seconds process <<< "$one"
        wait "$process"
        status=$?
        echo
        echo "== $name ended:"
        tail -n 40 "$out/$name.log"
        judge "$name" "$seconds" "$status"
    done
    waiting=()
}

[ -n "$dry_run" ] || mkdir -p "$out"

backends=triton
if [ -n "$dry_run" ] || command -v nvcc > /dev/null || [ -n "${CUDA_HOME:-${CUDA_PATH:-}}" ]; then
    backends=triton,cuda
else
    echo "== the CUDA kernels are left out, there is no nvcc on PATH and no CUDA_HOME"
fi
# Code of an "a" target is for that generation alone; 9.0's has the bulk copies.
of_device='import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))'

# At most 200 s, side by side: the tests of Triton do not need the libraries that are being built. They compile a thousand
# kernels, two seconds each, hence the many processes.
beside build 200 "both compiled libraries" \
    bash -c "MLKERNELS_CUDA_ARCHS=\${MLKERNELS_CUDA_ARCHS:-\$($python -c '$of_device')} exec $python csrc/build.py"
step tests-triton 200 "the property table on the device, sizes past 2^31 elements, CUDA graphs, synchronisations" \
    "$python" -m bench.shards 190 tests/test_gpu.py -k triton
finish

# At most 70 s.
step machine 15 "versions, devices, backends" "$python" -m mlkernels
step smoke 55 "a few tiny launches of every loss; fills Triton's cache for those that follow" \
    "$python" -m bench.gpu --smoke --backends "$backends"

# At most 110 s, side by side. A sanitizer does not watch the workers that compile Triton's kernels. Torch's allocator
# would hide what lies just past a tensor.
if command -v compute-sanitizer > /dev/null || [ -n "$dry_run" ]; then
    beside memcheck 110 "reads and writes out of bounds" \
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        --target-processes application-only "$python" -m bench.gpu --smoke --backends "$backends"
    beside racecheck 110 "accesses to shared memory without a barrier between them" \
        compute-sanitizer --tool racecheck --error-exitcode 1 \
        --target-processes application-only "$python" -m bench.gpu --smoke --backends "$backends"
else
    echo "== memcheck and racecheck are left out, there is no compute-sanitizer on PATH"
fi
beside compile 110 "Triton's kernels for the measurement, which compiles what is missing then" \
    "$python" -m bench.gpu --compile
step tests-cuda 110 "the same on the CUDA kernels, and what is no backend's: copies, optimizers, snapshots" \
    "$python" -m bench.shards 100 --processes 4 tests/test_gpu.py -k "not triton"
finish

if [ -n "$tune" ]; then
    step tune 265 "launch sizes and the faster backend for this architecture, into sizes.json and choice.json" \
        "$python" -m bench.tune
    [ -n "$dry_run" ] || cp mlkernels/backends/triton/sizes.json mlkernels/backends/choice.json "$out"
fi
step schedule 30 "what MILS adds to an iteration, and what an attempt is made of" \
    "$python" -m bench.schedule --seconds 4
step measure 185 "share of the copy bandwidth, peers, small problems, copies, float16; JSON and picture" \
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
