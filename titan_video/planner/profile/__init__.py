"""Measures the machine that it runs on: `python -m titan_video.planner.profile`, which runs `machine`.

stopwatch   seconds of a function on all ranks at once
compute     products, attention, copies and launches of one device
links       messages between ranks, by size and group
pipeline    what stages wait for each other beyond their order
model       what a part of the model takes beyond the sum of its operators, on CPUs
machine     the whole measurement, and the TOML
"""
