"""From a plan to entries of the latent cache, and to the clips that training takes.

encode                from clips and captions to entries: what is missing, divided over ranks
encode_table          the same for what a table of clips needs, on all ranks
cache_keys            the keys of entries, each of which depends on everything that its tensor depends on
entry_index           what the shards hold, as columns
clip_table            the clips that training takes, as columns
cached_clips          the same as a list, and which are held out for validation
conditioning_frames   images and first frames as a model takes them
remote_cache          a copy of the cache in an object store (optional)
"""
