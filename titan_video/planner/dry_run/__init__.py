"""One rank's training step without the machine: `python -m titan_video.planner.dry_run`, which runs `run`.

step_tracker   counts what a step allocates, sends and computes, operator by operator
describe       the categories of memory, and the printed report
fake           ranks, operators and batches that stand in for those of a machine
run            builds the rank, runs its step, and counts; `--cluster` asks report/step_time, named by a string
memory         closed forms of the memory; tests compare them with what is counted
traffic        closed forms of what parallelism sends; tests compare them, too
"""
