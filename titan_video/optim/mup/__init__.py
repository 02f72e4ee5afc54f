"""muP, the maximal update parametrization: rates that hold at every width (docs/mup.md).

parametrization   initial values, rates, decay and eps of each class of parameters; rules of the configuration
widths            what each family of models says of its sizes and parameters
coordinate_check  whether activations keep their size over widths: `python -m titan_video.mup check`
plot              the picture of that check
transfer          runs at two widths and several rates: `python -m titan_video.mup transfer`
cli               both commands
"""
