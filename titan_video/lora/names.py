"""The names of adapters in the files of public trainers, and what else such files hold.

    trainer                    names
    diffusers                  transformer.blocks.0.attn1.to_q.lora_A.weight
    ComfyUI, diffusion-pipe    diffusion_model.blocks.0.self_attn.q.lora_down.weight, or lora_A; .alpha
    musubi-tuner, kohya        lora_unet_blocks_0_self_attn_q.lora_down.weight; .alpha
    DiffSynth                  blocks.0.self_attn.q.lora_A.default.weight, or with pipe.dit. before it
    PEFT                       base_model.model.blocks.0.attn1.to_q.lora_A.weight, and adapter_config.json beside it

The prefix says nothing that the rest does not: all prefixes are dropped. Modules are compared with `.` read as `_`,
because kohya's names do not distinguish the two.

The scale of an adapter is alpha / rank. `.alpha` says alpha; without it the scale is 1, as for the loaders of ComfyUI
and DiffSynth, unless adapter_config.json or diffusers' metadata says another.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titan_video.tools.bounded import parse_json, read_json, short
from titan_video.tools.logging import logger
from titan_video.weights.formats import preview
from titan_video.weights.safetensors_io import DTYPES, opened, read_header

PEFT_FILE, PEFT_CONFIG, DIFFUSERS_FILE = "adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights"
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "transformer_2."),
    *("pipe.dit.", "dit.", "unet.", "model.", "lora_unet_", "lora_transformer_"),
)
TEXT_ENCODERS = re.compile(r"(base_model\.model\.)?(lora_te\d*_|text_encoders?[._]|text_encoder_\d[._]|lora_llm_)")
MATRIX = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.([^.]+))?\.weight")
KNOWN = re.compile(r"\.(lora_|lora\.|lokr_|hada_|dora_scale|oft_|boft_|glora|diff$|diff_b$|alpha$)")
OTHER_KINDS = {  # what a name says -> the kind of adapter that has such tensors
    r"\.dora_scale|\.lora_magnitude_vector": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoRA of convolutions",
    r"\.lora_(down|up)\.\d+\.weight": "an adapter in several parts (lora_down.0, lora_down.1, ...)",
    r"\.diff(_b)?$": "a change of a whole weight or bias (diff, diff_b)",
    r"\.lora_[AB](\.[^.]+)?\.bias|\.lora_(down|up)\.bias": "an adapter with a bias",
    r"modules_to_save\.": "a whole module (modules_to_save)",
}
# ComfyUI's own names of HunyuanVideo's modules, with `.` read as `_`, -> those of its public code.
COMFYUI_ENDS = {
    "_mod_lin": "_mod_linear",
    "modulation_lin": "modulation_linear",
    "_mlp_0": "_mlp_fc1",
    "_mlp_2": "_mlp_fc2",
}
EXAMPLES = (
    "transformer.*.lora_A.weight (diffusers), diffusion_model.*.lora_down.weight (ComfyUI, diffusion-pipe), "
    "lora_unet_*.lora_down.weight (musubi-tuner, kohya), *.lora_A.default.weight (DiffSynth), "
    "base_model.model.*.lora_A.weight (PEFT)"
)


@dataclass(frozen=True)
class AdapterPair:
    """scale * up @ down is added to a weight. down: [rank, inputs]; up: [outputs, rank]. name: in its file."""

    down: Tensor
    up: Tensor
    scale: float = 1.0
    name: str = ""

    @property
    def scaled_up(self) -> Tensor:
        """`up` with the scale multiplied in, in float32."""
        return self.up.float() * self.scale


@dataclass(frozen=True)
class StoredAdapters:
    """What a file holds: its adapters by the name of their module, without prefix, and names of what is none."""

    path: Path
    pairs: dict[str, AdapterPair]
    others: list[str]


def flat(module: str) -> str:
    """A module's name in kohya's files."""
    return module.replace(".", "_")


def find_file(path: Path) -> Path:
    """The file of adapters at `path`, a file or a folder. ValueError: there is none, or it is ambiguous which it is."""
    if path.is_file():
        return path
    names = (PEFT_FILE, f"{DIFFUSERS_FILE}.safetensors")
    found = [path / name for name in names if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found) or 'no'} files of adapters ({' and '.join(names)} are looked for, then a single "
            f"*.safetensors); give the file"
        )
    return found[0]


def holds_adapters(path: Path) -> bool:
    """Whether `path`, a file or folder, is one of adapters and not of weights, by its names alone."""
    try:
        return any(KNOWN.search(name) for name in read_header(find_file(path)))
    except ValueError:
        return False


def read_adapters(path: Path) -> StoredAdapters:
    """The adapters of a file, or of the file in a folder, in its types.

    ValueError: the file is damaged, holds no adapters or those of two models, or another kind of them, which is named.
    What is of a text encoder is left out with a warning.
    """
    path = find_file(path)
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() if hasattr(file, "metadata") else None
    text = [name for name in tensors if TEXT_ENCODERS.match(name)]
    if text:
        logger.warning(f"{path}: {len(text)} tensors are of a text encoder, which is not trained here: left out")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(text)}
    _check_kinds(path, tensors)
    parts, others = _group(path, tensors)
    is_peft = path.name == PEFT_FILE or any(name.startswith("base_model.model.") for name in tensors)
    scales, found = _Scales(path, metadata, is_peft), {}
    for module, part in parts.items():
        if not part.keys() >= {"down", "up"}:
            others.append(f"{module} (one matrix without the other)")
            continue
        down, up, alpha = part["down"], part["up"], part.get("alpha")
        if down.ndim != 2 or up.ndim != 2 or not len(down) or len(down) != up.shape[1]:
            raise ValueError(f"{path}: the adapter of {module} is none: its tensors have impossible shapes")
        scale = scales.of(module, len(down)) if alpha is None else alpha / len(down)
        found[module] = AdapterPair(down, up, scale, module)
    if not found:
        raise ValueError(f"{path} holds no adapters. Names of adapters: {EXAMPLES}; found {preview(sorted(tensors))}")
    return StoredAdapters(path, found, sorted(others))


def _check_kinds(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """ValueError: there are tensors of another kind of adapter. Changes of zero are none."""
    for pattern, kind in OTHER_KINDS.items():
        found = [name for name in tensors if re.search(pattern, name) and tensors[name].float().any()]
        if found:
            raise ValueError(
                f"{path} holds {kind}, which the adapters here (LoRA of Linears) cannot express: {preview(found)}; "
                f"merge it into the weights with the program that made it, and start from these"
            )


def _group(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """({module: its `down`, `up` and `alpha`}, names that belong to no adapter)."""
    parts: dict[str, dict[str, Any]] = {}
    adapter_names, others, sources, odd = set(), [], {}, []
    for name, tensor in tensors.items():
        match = MATRIX.fullmatch(name)
        if any(re.search(pattern, name) for pattern in OTHER_KINDS):
            continue  # zero: see _check_kinds
        if match:
            stem, part = match[1], "down" if match[2] in ("lora_A", "lora_down", "lora.down") else "up"
            adapter_names.add(str(match[3]))
            odd += [name] if tensor.dtype not in DTYPES.values() else []
        elif name.endswith(".alpha"):
            stem, part, tensor = name.removesuffix(".alpha"), "alpha", _alpha(path, name, tensor)
        else:
            others.append(name)
            continue
        module = _without_prefix(stem)
        if sources.setdefault(module, stem) != stem:
            raise ValueError(f"{path} holds two adapters of {module}: {sources[module]} and {stem}; give one file each")
        parts.setdefault(module, {})[part] = tensor
    if len(adapter_names) > 1:
        raise ValueError(f"{path} holds adapters of several names, {sorted(adapter_names)}; save one of them alone")
    if odd:
        raise ValueError(f"{path}: {preview(odd)} of a type that is no plain floating point")
    return parts, others


def _alpha(path: Path, name: str, tensor: Tensor) -> float:
    value = tensor.item() if tensor.numel() == 1 and not tensor.is_complex() else 0
    if not 0 < value < 1e6:
        raise ValueError(f"{path}: {name} is {short(str(value))}; legal: one number above 0")
    return float(value)


def _without_prefix(stem: str) -> str:
    while prefix := next((p for p in PREFIXES if stem.startswith(p) and stem != p), None):
        stem = stem.removeprefix(prefix)
    return stem


class _Scales:
    """Scales of adapters that have no alpha of their own, from adapter_config.json or diffusers' metadata.

    is_peft: adapter_config.json beside the file says them.
    """

    def __init__(self, path: Path, metadata: dict[str, str] | None, is_peft: bool):
        self.settings: dict[str, Any] = {}
        self.where = f"{path}: its lora_adapter_metadata"
        note = (metadata or {}).get("lora_adapter_metadata")
        if note is not None:
            settings = parse_json(note, self.where)
            self.settings = settings if isinstance(settings, dict) else self._fail("is no table")
            self.settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        elif is_peft and (path.parent / PEFT_CONFIG).is_file():
            self.where = str(path.parent / PEFT_CONFIG)
            settings = read_json(path.parent / PEFT_CONFIG)
            self.settings = settings if isinstance(settings, dict) else self._fail("is no table")
        elif is_peft:
            logger.warning(
                f"{path} is of PEFT, whose {PEFT_CONFIG} is not beside it: lora_alpha is taken to equal the rank"
            )
        for key in ("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication"):
            if self.settings.get(key):
                self._fail(f"says {key} = {short(self.settings[key])}, which is not supported")

    def of(self, module: str, rank: int) -> float:
        """The scale of one module's adapter."""
        alpha = self._pattern("alpha_pattern", module, self.settings.get("lora_alpha", self.settings.get("r", 1)))
        r = self._pattern("rank_pattern", module, self.settings.get("r", 1))
        for key, value in (("lora_alpha", alpha), ("r", r)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                self._fail(f"has {key} = {short(value)} for {module}; legal: a positive number")
        if "r" in self.settings and r != rank:
            self._fail(f"has r = {r:g} for {module}, whose adapter has rank {rank}")
        return alpha / (r**0.5 if self.settings.get("use_rslora") else r)

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """The entry of a table by the end of the module's name, as PEFT reads it; regular expressions are refused."""
        table = self.settings.get(key) or {}
        if not isinstance(table, dict) or any(re.search(r"[\\*+?\[\](){}|]", name) for name in table):
            self._fail(f"has {key} = {short(table)}; legal: a table of names of modules")
        names = [name.removeprefix("^").removesuffix("$") for name in table]
        fits = [value for name, value in zip(names, table.values(), strict=True) if f".{module}".endswith(f".{name}")]
        return fits[0] if fits else default

    def _fail(self, what: str) -> dict:
        raise ValueError(f"{self.where} {what}")


def match_modules(modules: Collection[str], known: Collection[str]) -> dict[str, str]:
    """{module of the file: its `flat` public name} of those that have one. known: flat public names."""
    table = {}
    for module in modules:
        name = flat(module)
        ends = [(end, public) for end, public in COMFYUI_ENDS.items() if name.endswith(end)]
        names = [name, *(name.removesuffix(end) + public for end, public in ends)]
        if found := [candidate for candidate in names if candidate in known]:
            table[module] = found[0]
    return table
