#!/usr/bin/env bash
# Everything that needs a GPU, in calls that each end by themselves and leave three or four files in $OUT.
#
#   bench/gpu.sh first       at most 210 s: builds and stops if there is no library; losses and linear heads, tiny,
#                            against float64; the most valuable measurements; the kernel tests in the time that is left
#   bench/gpu.sh second      at most 420 s: all measurements, most valuable first; Triton's tests; memcheck of CUDA
#   bench/gpu.sh linear      at most 300 s: classifiers and losses in one, beside their peers and the three products
#   bench/gpu.sh racecheck   at most 200 s: races on shared memory
#   bench/gpu.sh tune        at most 300 s: launch sizes and the choice of the backend, into sizes.json and choice.json
#   bench/gpu.sh CALL --dry-run    says what it would run and why, and runs nothing
#
# It needs torch, Triton, nvcc and pytest-xdist, and no network. PYTHON chooses the interpreter, OUT the folder for log, JSON and picture;
# MLKERNELS_CUDA_ARCHS what the CUDA kernels are built for (default: the GPU at hand). A step that fails does not stop the
# next, but for the build; a step that is cut off has kept what it had; the exit status says that one failed.
set -u
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
out=${OUT:-bench/out}
call=${1:-}
dry_run=
[ "${2:-}" = --dry-run ] && dry_run=1
case $call in
    first) limit=210 ;;
    second) limit=420 ;;
    linear) limit=300 ;;
    racecheck) limit=200 ;;
    tune) limit=300 ;;
    *) call= ;;
esac
if [ -z "$call" ] || [ $# -gt $((1 + ${dry_run:-0})) ]; then
    echo "usage: bench/gpu.sh first|second|linear|racecheck|tune [--dry-run]" >&2
    exit 2
fi

processes() { echo $(($(nproc) > 16 ? 15 : $(nproc) > 1 ? $(nproc) - 1 : 1)); }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MLKERNELS_CUDA=1
unset TRITON_INTERPRET # the tests set it where there is no GPU
if [ -z "$dry_run" ]; then
    mkdir -p "$out"
    exec > >(tee "$out/$call.log") 2>&1
fi
on="--device cuda"
# bench.spread orders the tests. torch.compile would start as many processes again in each.
tests=(env TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1 "$python" -m pytest -q --tb=short -p no:cacheprovider
    -p no:randomly -p bench.spread -n "$(processes)" --maxschedchunk 1 --max-worker-restart 30 --durations=5
    tests/test_gpu.py)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()
waiting=() # what runs beside the next steps: name, seconds, process
grace=5    # from the signal to the end of a step that does not mind it

# Seconds for a step that may have so many: no step starts, or ends, after the call's limit.
seconds_of() {
    local left=$((limit - SECONDS - grace))
    [ -n "$dry_run" ] && left=$1
    echo $(($1 < left ? $1 : left))
}

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

# step NAME SECONDS WHY COMMAND...
step() {
    local name=$1 asked=$2 seconds why=$3 status
    seconds=$(seconds_of "$2")
    shift 3
    announce "$name" "up to $seconds s" "$why" "$@"
    [ -n "$dry_run" ] && return
    if [ "$seconds" -lt "$asked" ] && [ "$seconds" -le 5 ]; then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    timeout --kill-after=$grace "$seconds" "$@"
    status=$?
    judge "$name" "$seconds" "$status"
    return "$status"
}

# The same, beside the steps that follow; its output comes when it is waited for.
beside() {
    local name=$1 seconds why=$3
    seconds=$(seconds_of "$2")
    shift 3
    announce "$name" "up to $seconds s beside the next" "$why" "$@"
    [ -n "$dry_run" ] && return
    timeout --kill-after=$grace "$seconds" "$@" > "$scratch/$name" 2>&1 < /dev/null &
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
        tail -n 40 "$scratch/$name"
        judge "$name" "$seconds" "$status"
    done
    waiting=()
}

# The library of the GPU at hand, or the end: without it half of the call would be for nothing.
of_device='import torch; print("".join(map(str, torch.cuda.get_device_capability())))'
build() {
    step build 75 "both compiled libraries" \
        bash -c "MLKERNELS_CUDA_ARCHS=\${MLKERNELS_CUDA_ARCHS:-\$($python -c '$of_device')} exec $python csrc/build.py"
    [ -n "$dry_run" ] || { [ ${#failed[@]} -eq 0 ] && [ -e mlkernels/_cuda.abi3.so ]; } && return
    [ -e mlkernels/_cuda.error.txt ] && cat mlkernels/_cuda.error.txt
    for one in "${waiting[@]+"${waiting[@]}"}"; do kill "${one##* }" 2> /dev/null; done
    echo "== no CUDA library, so nothing more is run: mend the build (the lines above say why it failed) and call again"
    exit 1
}

sanitized() { # NAME SECONDS TOOL
    if [ -z "$dry_run" ] && ! command -v compute-sanitizer > /dev/null; then
        echo "== $1 is left out, there is no compute-sanitizer on PATH"
        return
    fi
    # Torch's allocator would hide what lies just past a tensor.
    step "$1" "$2" "every way of the CUDA kernels under a sanitizer" \
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$3" --error-exitcode 1 \
        --target-processes application-only "$python" -m bench.smoke $on --backends cuda --modes step,split \
        --losses cross_entropy,piecewise
}

case $call in
    first)
        beside compile 75 "Triton's kernels for the smoke and the quick measurement" \
            bash -c "$python -m bench.smoke $on --backends triton --compile && $python -m bench $on --compile --quick"
        build
        finish
        step machine 10 "versions, devices, backends" "$python" -m mlkernels
        step smoke-cuda 25 "every loss, tiny, against float64" "$python" -m bench.smoke $on --backends cuda
        step smoke-triton 30 "the same, linear heads cut in every way" "$python" -m bench.smoke $on --backends triton
        step measure-quick 50 "share of the copy bandwidth, smaller problems; JSON kept as it goes" \
            "$python" -m bench $on --quick --seconds 36 --out "$out"
        step tests 60 "the property table and what only a GPU shows, as far as the time goes" \
            "${tests[@]}" --seconds "$(seconds_of 52)" -k "not triton"
        ;;
    second)
        beside compile 75 "Triton's kernels for the measurement, which compiles what is missing then" \
            "$python" -m bench $on --compile
        build
        finish
        step measure 200 "share of the copy bandwidth, peers, small problems, copies; JSON and picture" \
            "$python" -m bench $on --seconds 172 --out "$out"
        step schedule 15 "what MILS adds to an iteration, and what an attempt is made of" \
            "$python" -m bench.schedule --seconds 4
        step tests-triton 80 "the property table on Triton, as far as the time goes" \
            "${tests[@]}" --seconds "$(seconds_of 72)" -k triton
        sanitized memcheck 45 memcheck
        ;;
    linear)
        build
        step measure-linear 205 "time and memory beside eager, torch's chunks and the products; JSON as it goes" \
            "$python" -m bench $on --suites linear --seconds 180 --out "$out"
        ;;
    racecheck)
        build
        sanitized racecheck 110 racecheck
        ;;
    tune)
        build
        step tune 215 "launch sizes and the faster backend for this architecture, into sizes.json and choice.json" \
            "$python" -m bench.tune
        [ -n "$dry_run" ] || cp mlkernels/backends/triton/sizes.json mlkernels/backends/choice.json "$out"
        ;;
esac

echo
if [ -n "$dry_run" ]; then
    echo "dry run: nothing was run; results would be in $out"
elif [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}; the log is $out/$call.log"
    exit 1
else
    echo "all steps passed; log and results in $out"
fi
