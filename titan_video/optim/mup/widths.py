"""How each family of models grows in width."""

from dataclasses import dataclass

from titan_video.models.spec import ModelSpec


@dataclass(frozen=True)
class WidthRules:
    """How a family grows in width. Depth and head width stay.

    sizes: arguments that grow in proportion to `dim`, itself among them; all others are the same at every width. A
        dotted name is an argument in an argument.
    classes: class of a parameter by a pattern of its name (fnmatch), the first that matches:
        "input"   a matrix whose inputs do not grow: patches, text features, features of the time
        "hidden"  a matrix whose inputs and outputs grow
        "output"  a matrix whose inputs alone grow
        "vector"  biases, weights of norms, tables
    """

    sizes: tuple[str, ...]
    classes: dict[str, str]


FAMILY_RULES = {  # by the name of the family
    "wan": WidthRules(
        sizes=("dim", "num_heads", "ffn_dim", "experts.expert_dim", "experts.shared_dim"),
        classes={
            "*bias": "vector",
            "*norm*": "vector",
            "*modulation*": "vector",
            "image_embedder.positions": "vector",
            "patch_embedding.weight": "input",
            "*_embedder.up.weight": "input",
            "image_embedder.down.weight": "input",  # its own width does not grow
            "text_embedder.down.weight": "hidden",
            "time_embedder.down.weight": "hidden",
            "time_proj.weight": "hidden",
            "blocks.*.weight": "hidden",
            "blocks.*.experts.*": "hidden",
            "routers.*.weight": "output",  # the number of experts does not grow
            "proj_out.weight": "output",
        },
    ),
    "hunyuan_video": WidthRules(
        sizes=("dim", "num_heads", "ffn_dim"),
        classes={
            "*bias": "vector",
            "*norm*": "vector",
            "patch_embedding.weight": "input",
            "text_refiner.proj_in.weight": "input",
            "*condition.*.up.weight": "input",
            "*condition.*.down.weight": "hidden",
            "head_modulation.weight": "hidden",
            "text_refiner.blocks.*.weight": "hidden",
            "*_blocks.*.weight": "hidden",
            "proj_out.weight": "output",
        },
    ),
}


def width_rules(spec: ModelSpec) -> WidthRules:
    """ValueError: the family has none."""
    if spec.name not in FAMILY_RULES:
        raise ValueError(f"the family {spec.name} has no WidthRules; add them to titan_video/optim/mup/widths.py")
    return FAMILY_RULES[spec.name]
