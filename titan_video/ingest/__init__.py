"""From what a user has (videos, images, captions) to entries of the latent cache: the way of a clip before training.

Four rooms; each imports from those above it, never from those below. A room's own `__init__.py` names its files.

files/      what the sources hold: names, tables, archives and captions, as a list of clips
decode/     what is in a video or image, and its frames as RGB, in processes that may be lost
plan/       what becomes of each clip, with the reason, before anything is encoded
cache/      which entries are missing, how they are made, and what training takes of them

The other files are what the rooms share, and what puts them together:

bucketing           which bucket a clip goes to, how it is resized and cropped, and which clips are taken from a video
columns             tables as columns in a file that all processes of a machine map
prepare             from a configuration to a full cache and the clips of a run, on all ranks; train.py calls it
resume, started     what a run that goes on keeps: its clips, its options
sampling_defaults   what [validation] leaves to the model
data_file           `--data.file`
importers           data set TOMLs of other trainers (optional)
shape_scores        scores of samples of the embedded data set (optional)
__main__            `python -m titan_video.data`: the data commands
"""
