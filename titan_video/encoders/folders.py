"""Encoders in local diffusers folders: loading, checking and hashing their files. Nothing is downloaded."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from titan_video.tools import bounded
from titan_video.tools.files import sha256

MAX_NUMBER, MAX_LAYERS = 1 << 24, 1024
VARIANTS = ("fp16", "bf16")  # part of a file's name where a folder is published in several types


def read_config(folder: Path) -> dict:
    """config.json of a folder. ValueError: it cannot be read, or holds a number that no model has."""
    path = folder / "config.json"
    try:
        config = bounded.read_json(path)
    except ValueError as e:
        raise ValueError(f"{e}; model.hf_assets_path should be a diffusers folder") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no table of settings; model.hf_assets_path should be a diffusers folder")
    rest = list(config.items())
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict | list):
            rest += value.items() if isinstance(value, dict) else [(key, item) for item in value]
        elif isinstance(value, int | float):
            limit = MAX_LAYERS if key.endswith("layers") else MAX_NUMBER
            if not -limit <= value <= limit:
                raise ValueError(f"{path}: {bounded.short(key)} = {value}; legal: numbers up to {limit:,}")
    return config


def weight_files(folder: Path, stem: str) -> list[Path]:
    """config.json and the safetensors files that make up the weights; ValueError naming the first that is missing."""
    return _find_weights(folder, stem)[0]


def _find_weights(folder: Path, stem: str) -> tuple[list[Path], str | None]:
    """(the files of `weight_files`, their variant). Files without a variant come first, as in diffusers and
    transformers: `model.safetensors`, else `model.fp16.safetensors`; an index is `model.safetensors.index[.fp16].json`.
    """
    for variant in (None, *VARIANTS):
        part = f".{variant}" if variant else ""
        index, single = folder / f"{stem}.safetensors.index{part}.json", folder / f"{stem}{part}.safetensors"
        if index.is_file() or single.is_file():
            break
    else:  # the message names this one
        variant, single = None, folder / f"{stem}.safetensors"
    names = [single.name]
    if index.is_file():
        names = [index.name, *sorted(set(bounded.read_index(index).values()))]
    files = [folder / name for name in ("config.json", *names)]
    for path in files:
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; model.hf_assets_path should be a complete diffusers folder with safetensors "
                f"weights"
            )
    return files, variant


def load(classes: Any, folder: Path, stem: str, **kwargs: Any) -> Any:
    """`from_pretrained` of the class that config.json names, frozen, in evaluation mode.

    classes: one class, or those under which the same encoder is published; the first where config.json names none.
    ValueError for missing weights, about which the libraries only warn: they would stay random.
    """
    classes = classes if isinstance(classes, tuple) else (classes,)
    named = read_config(folder).get("architectures") or ()
    cls = next((cls for cls in classes if cls.__name__ in named), classes[0])
    variant = _find_weights(folder, stem)[1]
    try:
        model, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, variant=variant, **kwargs
        )
    except Exception as e:  # SafetensorError derives from Exception alone
        raise ValueError(f"{folder} cannot be loaded as {cls.__name__}: {e}") from e
    bad = sorted(
        str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info.get(kind, ())
    )
    if bad:
        raise ValueError(
            f"{folder}: {len(bad)} weights are missing, unexpected or of another shape than config.json says: "
            f"{', '.join(bad[:5])}"
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved there; ValueError naming the folder.

    HunyuanVideo's splits bytes, but is published as a LlamaTokenizerFast, whose class in transformers 5.0 to 5.5 would
    split words in spite of tokenizer.json. The general class follows the file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        settings = folder / "tokenizer_config.json"
        name = str(bounded.read_json(settings).get("tokenizer_class")) if settings.is_file() else ""
        is_general = name.startswith("Llama") and (folder / "tokenizer.json").is_file()
        cls = PreTrainedTokenizerFast if is_general else AutoTokenizer
        return cls.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # the tokenizer library raises bare Exception for a file that it cannot parse
        raise ValueError(f"{folder} holds no tokenizer that can be read: {e}") from e


def offload_models(models: list[Any], device: torch.device) -> None:
    """Move the models that are loaded (not None) from `device` to host memory."""
    for model in models:
        if model is not None:
            model.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settings_files(folder: Path) -> list[Path]:
    """The files of a tokenizer or an image processor."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".model", ".txt"))


def digest(files: list[Path], settings: str) -> str:
    """SHA-256 of the names and contents of files and of `settings`: the identity of an encoder in cache keys."""
    with ThreadPoolExecutor() as pool:
        parts = [f"{path.name} {file_hash}" for path, file_hash in zip(files, pool.map(sha256, files), strict=True)]
    return hashlib.sha256("\n".join([settings, *parts]).encode()).hexdigest()
