#!/usr/bin/env bash
# All figures of docs/performance.md that need a GPU, in two commands that take less than ten minutes each on an H200:
#     benchmarks/run_all.sh speed FOLDER      kernels, attention, a profile, steps of 1.3B and 14B
#     benchmarks/run_all.sh memory FOLDER     the longest clip, and 14B on one GPU
# FOLDER gets a JSON of each, and its log. Copy them to benchmarks/results and run benchmarks/report.py. What fails does not stop the rest.
set -u
what=${1:?speed or memory} out=${2:?folder for the results}
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
speed)
    run kernels 120 benchmarks/kernels.py
    run attention 75 benchmarks/attention.py --rounds 5
    run profile 75 benchmarks/profile_step.py
    run step 320 benchmarks/step.py --rounds 5
    ;;
memory)
    run memory_14b 240 benchmarks/memory.py --14b
    run memory 345 benchmarks/memory.py --seconds 300
    ;;
*) echo "run_all.sh: given $what; legal: speed, memory" >&2; exit 2 ;;
esac
[ -z "${failed:-}" ] || { echo "failed:$failed" >&2; exit 1; }
