"""What is said of a plan, and of a prediction.

table        the ranked table of plans
page         plan.html
files        all that `--out` writes: plan.toml with its reasons, tables, page and time lines
step_time    the predicted step that a dry run prints with `--cluster`
comparison   the prediction beside the measured step, in the log of a run (`[planner] cluster`)
"""
