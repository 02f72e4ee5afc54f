#!/usr/bin/env bash
# All figures of docs/performance.md that need a GPU, in three commands that take less than ten minutes each on an H200:
#     benchmarks/run_all.sh step FOLDER       a profile and steps of Wan 1.3B
#     benchmarks/run_all.sh parts FOLDER      kernels, attention, blocks of 14B
#     benchmarks/run_all.sh memory FOLDER     the longest clip, and 14B on one GPU
# FOLDER gets a JSON of each, and its log. Copy them to benchmarks/results and run benchmarks/report.py. What fails does not stop the rest.
set -u
what=${1:?step, parts or memory} out=${2:?folder for the results}
cd "$(dirname "$0")/.." && mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
run() {  # name, seconds at most, script and arguments
    local name=$1 limit=$2 status=0
    shift 2
    echo "== $name"
    timeout "$limit" python3 "$@" --json "$out/$name.json" 2>&1 | tee "$out/$name.log" || status=$?
    [ "$status" = 0 ] || failed="${failed:-} $name"
}
set -o pipefail
case $what in
step)
    run profile 90 benchmarks/profile_step.py
    run step 500 benchmarks/step.py --cases 1.3b --rounds 7
    ;;
parts)
    run kernels 240 benchmarks/kernels.py
    run attention 80 benchmarks/attention.py --rounds 5
    run step_14b 260 benchmarks/step.py --cases 14b-stack 14b-block --rounds 5
    ;;
memory)
    run memory_14b 240 benchmarks/memory.py --14b
    run memory 345 benchmarks/memory.py --seconds 300
    ;;
*) echo "run_all.sh: given $what; legal: step, parts, memory" >&2; exit 2 ;;
esac
[ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
