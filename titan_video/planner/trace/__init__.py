"""What a model's blocks do, recorded once on fake tensors, before it is known where they run.

recorder    keeps every operator, its sizes as polynomials of clips and tokens
selection   which results selective checkpointing saves
units       sizes of the FSDP units
traces      what a trace holds
tracer      runs the real modules, and gives the traces of blocks and ends
replay      the memory of a traced block under any checkpointing
"""
