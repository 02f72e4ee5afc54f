"""Steps whose numbers are wrong: a loss or gradient norm that is not finite, or that is far above those of other steps.

guard     decides on the device whether the update is applied, and afterwards what follows
report    names the step's clips, and keeps its batch for `python -m titan_video.replay`
handler   stops the run, goes on, or takes it back to its last checkpoint
"""
