"""The layout of a job on a cluster that trains fastest: predicted, searched and explained without the cluster.

Six rooms; each imports from those above it, never from those below. A room's own `__init__.py` names its files.

dry_run/    one rank's step on fake devices: its memory, messages and FLOPs; the same numbers as closed forms
search/     all layouts, and the fastest ones that fit; it is handed the cost model
trace/      what a model's blocks compute, move, send and hold, traced once for all layouts
cost/       from traces and a cluster: seconds and bytes of a layout
profile/    measures the machine that it runs on, as a cluster's TOML
report/     what is written of a plan, and what a run's log says of a prediction

The other files are what the rooms share, and the commands:

cluster     what goes in: a machine, read from a TOML; imports no room
candidate   what comes out: a layout, and its predicted cost; imports only dry_run/
plan_file   a candidate as the TOML that the trainer loads, and back; imports only `candidate`
plan        from a job and a cluster to a plan: asks search/ and cost/; only report/ and `__main__` import it
ladder      `python -m titan_video.planner.ladder`: dry runs with each option that saves memory
__main__    `python -m titan_video.planner`: the command of the planner
"""
