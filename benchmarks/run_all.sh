#!/usr/bin/env bash
# All figures of docs/performance.md that need a GPU, in commands that take at most eight minutes each on an H200:
#     benchmarks/run_all.sh first FOLDER      are kernels and attention right; kernels, ceilings, a profile of Wan 1.3B
#     benchmarks/run_all.sh step FOLDER       steps of Wan 1.3B: ours beside diffusers tuned
#     benchmarks/run_all.sh modes FOLDER      the same with checkpointing, and beside diffusers
#     benchmarks/run_all.sh variants FOLDER   the same in eager mode, with torch's kernels, in float8
#     benchmarks/run_all.sh blocks FOLDER     blocks of 14B
#     benchmarks/run_all.sh memory FOLDER     the longest clip
#     benchmarks/run_all.sh full FOLDER       all parameters of 14B on one GPU
# FOLDER gets a JSON of each, written after each group of variants or each step, so that a call that is cut off keeps
# what it measured, and its log. Copy the JSONs to benchmarks/results and run benchmarks/report.py. What fails does not
# stop the rest.
set -u
what=${1:?first, step, modes, variants, blocks, memory or full} out=${2:?folder for the results}
cd "$(dirname "$0")/.." && mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
note() {  # name and exit status
    [ "$2" = 0 ] || failed="${failed:-} $1"
}
run() {  # name, seconds at most, script and arguments
    local name=$1 limit=$2 status=0
    shift 2
    echo "== $name"
    timeout "$limit" python3 "$@" --json "$out/$name.json" 2>&1 | tee "$out/$name.log" || status=$?
    note "$name" "$status"
}
set -o pipefail
case $what in
first)  # correct before fast
    status=0
    timeout 100 python3 -m pytest -q -x tests/gpu_tests/test_kernels_gpu.py tests/gpu_tests/test_attention_gpu.py 2>&1 \
        | tee "$out/tests.log" || status=$?
    note tests "$status"
    run kernels 170 benchmarks/kernels.py --rounds 5
    run attention 80 benchmarks/attention.py --rounds 5
    run profile 110 benchmarks/profile_step.py --trace "$out/trace.json.gz"
    ;;
step)
    run step 470 benchmarks/step.py --cases 1.3b --rounds 5 --groups 0
    ;;
modes)
    run step.2 470 benchmarks/step.py --cases 1.3b --rounds 5 --groups 1
    ;;
variants)
    run step.3 470 benchmarks/step.py --cases 1.3b --rounds 3 --groups 2 3 4
    ;;
blocks)
    run step_14b 470 benchmarks/step.py --cases 14b-stack 14b-block --rounds 5
    ;;
memory)
    run memory 470 benchmarks/memory.py --seconds 400
    ;;
full)
    run memory_14b 470 benchmarks/memory.py --14b
    ;;
*) echo "run_all.sh: given $what; legal: first, step, modes, variants, blocks, memory, full" >&2; exit 2 ;;
esac
[ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
