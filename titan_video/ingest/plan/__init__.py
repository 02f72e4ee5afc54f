"""What becomes of each clip.

build        the plan: what becomes of every clip, decided and printed before anything is encoded
probes       what is in many files, found in processes of all ranks, and kept between runs
entries      what a plan says about each clip, and about all of them
plan_table   a plan as columns in a file
planned      the plan of a run, made on all ranks
captions     captions and prompts that are longer than the text encoder takes
report       what a plan means for training: sizes, micro-batches, balance, cache
"""
