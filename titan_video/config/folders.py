"""Rules about folders and files that the configuration names; each yields one line per mistake.

Paths of clips: ingest/files/sources.py.
"""

import os
import re
from collections.abc import Iterator

from titan_video.config.job_config import JobConfig


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Folders to which the run writes."""
    dump_folder, cache_folder = config.job.dump_folder, config.data.cache_folder
    if not dump_folder:
        yield "job.dump_folder: empty; give a folder, such as ./outputs"
    for name, folder in (("job.dump_folder", dump_folder), ("data.cache_folder", cache_folder)):
        if os.path.exists(folder) and not os.path.isdir(folder):
            yield f"{name}: {folder} is a file; give a folder"
    inside = {"checkpoint.folder": config.checkpoint.folder, "metrics.save_tb_folder": config.metrics.save_tb_folder}
    for name, folder in inside.items():
        if os.path.isabs(folder) or os.path.normpath(folder) == "." or ".." in folder.split("/"):
            yield f"{name}: given {folder!r}; legal: the relative name of a folder inside job.dump_folder"
    if len({os.path.normpath(folder) for folder in inside.values()}) < len(inside):
        folder = config.metrics.save_tb_folder
        yield f"metrics.save_tb_folder: given {folder!r}, the same as checkpoint.folder; give another name"


def file_rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Files and folders that the run reads."""
    prompts, adapters = config.validation.prompts_path, config.lora.initial_load_path
    initial = config.checkpoint.initial_load_path
    if prompts and not os.path.isfile(prompts):
        yield (
            f"validation.prompts_path: there is no file {prompts}; give a text file with one prompt a line, or leave "
            f"it empty"
        )
    yield from _assets(config)
    if initial and not os.path.exists(initial):
        yield (
            f"checkpoint.initial_load_path: there is no {initial}; give a step-N folder, a folder or file of public "
            f"weights{_fetch(initial)}, or leave it empty"
        )
    if adapters and not os.path.exists(adapters):
        yield (
            f"lora.initial_load_path: there is no file {adapters}; give a safetensors file of adapters, or leave it "
            f"empty"
        )
    if config.checkpoint.initial_load_in_hf and not initial and not config.model.hf_assets_path:
        yield (
            "checkpoint.initial_load_in_hf: nothing to load; give a diffusers folder in checkpoint.initial_load_path "
            "or model.hf_assets_path"
        )


def _fetch(path: str) -> str:
    """The command that fetches a model, where `path` looks like its id on the hub."""
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
    return f" (`python -m titan_video.download {path} --revision main` fetches one)" if is_id else ""


def _assets(config: JobConfig) -> Iterator[str]:
    """The local folder of pretrained weights."""
    name, assets, encoder = "model.hf_assets_path", config.model.hf_assets_path, config.encoder.name
    model_config = os.path.join(assets, "transformer", "config.json")
    if assets and not os.path.isdir(assets):
        yield f"{name}: there is no folder {assets}; give a local diffusers folder{_fetch(assets)}, or leave it empty"
    if not encoder.startswith("debug") and not assets:
        yield (
            f"{name}: empty, but encoder.name {encoder} reads the VAE and the text encoder there; give a diffusers "
            f"folder or encoder.name debug"
        )
    if config.model.flavor == "hf" and not assets:
        yield (
            f"{name}: empty, but model.flavor hf reads transformer/config.json there; give a local diffusers folder, "
            f"or another flavor"
        )
    elif config.model.flavor == "hf" and os.path.isdir(assets) and not os.path.isfile(model_config):
        yield (
            f"{name}: {assets} has no transformer/config.json, which model.flavor hf reads; give a complete diffusers "
            f"folder, or another flavor"
        )
