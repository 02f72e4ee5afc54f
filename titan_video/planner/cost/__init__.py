"""What a candidate costs on a cluster.

seconds        of a traced module, by part
step_model     of blocks and steps, with what FSDP sends beside them
timeline       when each part of a block and of a step runs
step_clock     both, asked for a candidate
memory_model   bytes of each pipeline stage
layout         tables of seconds and bytes, from which the search chooses
model          the cost model, which joins them: start here
"""
