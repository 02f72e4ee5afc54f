"""Fetches a model's folder from the Hugging Face hub, without what a trainer does not read:

    python -m titan_video.download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --revision main --to Wan2.1-T2V-1.3B-Diffusers

Files arrive in FOLDER/.partial. When all are there, and their sizes and hashes are those of the hub, they are moved to
their places, model_index.json last: an interrupted download is no model, and the same command goes on with it. Nothing
is written outside FOLDER. A token for gated or private models is taken from the environment variable HF_TOKEN alone.
"""

import argparse
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from titan_video.tools.bounded import is_plain_name, short
from titan_video.tools.files import StorageError, sha256, sync, writing
from titan_video.tools.logging import init_logger, logger

PARTS = (
    *("transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    *("image_encoder", "image_processor", "feature_extractor", "scheduler"),
)
PIPELINE, PARTIAL = "model_index.json", ".partial"
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
VARIANT = re.compile(r"\.(fp16|bf16|fp32)(?=[.-])")  # the same weights in another type
EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository. sha256: of large files; blob: git's hash of the content, of all others."""

    name: str
    size: int
    sha256: str
    blob: str

    def fits(self, path: Path) -> bool:
        """Whether `path` is this file, byte for byte."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256:
            return sha256(path) == self.sha256
        if not self.blob:
            return True
        return hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes()).hexdigest() == self.blob


class Hub:
    """One repository at one revision, through huggingface_hub.

    ValueError of every method: one line that says why the hub does not give it, and what helps.
    """

    def __init__(self, repository: str, revision: str):
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # its cache would be outside the folder
        import huggingface_hub
        from huggingface_hub import constants, errors, file_download, utils

        if not sys.stderr.isatty():
            utils.disable_progress_bars()
        self.hub, self.errors, self.is_offline = huggingface_hub, errors, constants.HF_HUB_OFFLINE
        self.get, self.build_headers = file_download.http_get, utils.build_hf_headers
        self.repository, self.revision = repository, revision
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
        self.token: str | bool = os.environ.get("HF_TOKEN", "").strip() or False  # False: no stored token either
        self.commit = ""

    def files(self) -> list[RemoteFile]:
        """All files of the revision."""
        api = self.hub.HfApi(endpoint=self.endpoint, token=self.token)
        info = self._ask(lambda: api.model_info(self.repository, revision=self.revision, files_metadata=True))
        self.commit, found = info.sha, []
        for f in info.siblings or []:
            if not all(is_plain_name(part) for part in f.rfilename.split("/")) or f.size is None:
                raise ValueError(f"{self.repository}: the hub lists a file {short(f.rfilename)!r}, which cannot be one")
            found.append(RemoteFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else "", f.blob_id or ""))
        return found

    def fetch(self, file: RemoteFile, path: Path) -> None:
        """Make `path` that file. What an interrupted call has fetched of it, in `path.part`, is not fetched again."""
        part = path.with_name(f"{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._ask(lambda: self._continue(file, part))
        part.rename(path)

    def _continue(self, file: RemoteFile, part: Path) -> None:
        # hf_hub_download begins a file anew when another process goes on with it, so its parts are used alone.
        url = self.hub.hf_hub_url(self.repository, file.name, revision=self.commit, endpoint=self.endpoint)
        place = self.hub.get_hf_file_metadata(url, token=self.token).location
        is_here = urlparse(place).netloc == urlparse(url).netloc
        headers = self.build_headers(token=self.token if is_here else False)  # the token is for no other server
        with part.open("ab") as f:
            if f.tell() > file.size:
                f.truncate(0)
            self.get(place, f, resume_size=f.tell(), headers=headers, expected_size=file.size)

    def _ask(self, call: Any) -> Any:
        try:
            return call()
        except Exception as e:
            if isinstance(e, StorageError) or (isinstance(e, OSError) and e.errno and not hasattr(e, "response")):
                raise  # the disk refuses
            raise ValueError(self._explain(e)) from e

    def _explain(self, error: Exception) -> str:
        errors, where = self.errors, f"{self.repository} at {self.endpoint}"
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        token = "HF_TOKEN is set, and is not enough" if self.token else "the environment variable HF_TOKEN is not set"
        if self.is_offline or isinstance(error, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing is fetched: unset it, or copy the folder from another machine"
        if isinstance(error, errors.GatedRepoError):
            page = f"{self.endpoint}/{self.repository}"
            return f"{where} is gated: accept its terms at {page}, and give a token of that account ({token})"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{where} has no revision {self.revision}: give a branch, a tag or a commit, such as main"
        if isinstance(error, errors.HFValidationError):
            return f"{self.repository} is no id of a model on the hub, such as {EXAMPLE}"
        if status == 403 or (status == 401 and self.token):
            return f"{where}: access is refused ({status}; {token}): give a token that may read this model"
        if status in (401, 404) or isinstance(error, errors.RepositoryNotFoundError | errors.EntryNotFoundError):
            return f"there is no {where}, or it is private ({status or 404}; {token}): check the id, such as {EXAMPLE}"
        if status:
            return f"{where}: the hub answers {status}; the same command goes on later"
        reason = short(" ".join(str(error).split()), 200)
        return f"{where}: no connection ({type(error).__name__}: {reason}); the same command goes on from here"


def select(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The files that a trainer reads, model_index.json last: configurations, tokenizers and safetensors of the parts
    of a pipeline. Of weights in several types those without a type in their name, if there are such.
    """
    wanted = []
    for file in files:
        folder, _, name = file.name.partition("/")
        if file.name == PIPELINE or (folder in PARTS and name.endswith(SUFFIXES)):
            wanted.append(file)
    plain = {file.name for file in wanted if not VARIANT.search(file.name)}
    has_plain = {name.partition("/")[0] for name in plain if name.endswith(".safetensors")}
    chosen = [f for f in wanted if f.name in plain or f.name.partition("/")[0] not in has_plain]
    return sorted(chosen, key=lambda f: (f.name == PIPELINE, f.name.endswith(".json"), f.name))


def listing(hub: Hub, files: list[RemoteFile]) -> str:
    """A table of sizes, the commit, and the sum."""
    lines = [f"{file.size:>16,}  {file.name}" for file in sorted(files, key=lambda f: f.name)]
    total = sum(file.size for file in files)
    return "\n".join([*lines, f"{total:>16,}  bytes in {len(files)} files of {hub.repository}, commit {hub.commit}"])


def download(hub: Hub, folder: Path) -> None:
    """Make `folder` the model's. ValueError or StorageError: one line says why not; what is there stays valid."""
    files = _pipeline_files(hub)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--to {folder} is a file; give a folder")
    missing = []
    for file in files:
        path = folder / file.name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of {folder}, to {path.resolve()}: give another --to")
        if not path.exists():
            missing.append(file)
        elif not file.fits(path):
            raise ValueError(
                f"{path} is not the file of {hub.repository} at {hub.revision}: move it away, or give another --to"
            )
    partial = folder / PARTIAL
    _check_space(partial, missing)
    with writing("model's files", partial, sum(file.size for file in missing)):
        partial.mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(missing, 1):
            logger.info(f"{i} of {len(missing)}: {file.name}, {file.size:,} bytes")
            path = partial / file.name
            if not file.fits(path):
                path.unlink(missing_ok=True)
                hub.fetch(file, path)
            if not file.fits(path):
                path.unlink()
                raise ValueError(
                    f"{file.name} came with other bytes than the hub lists; the same command fetches it again"
                )
            sync(path)
        for file in missing:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / file.name, path)
            sync(path.parent)
        shutil.rmtree(partial)
    total = sum(file.size for file in files)
    logger.info(
        f"{folder} holds {hub.repository}, commit {hub.commit}: {len(files)} files, {total:,} bytes, all verified"
    )


def _pipeline_files(hub: Hub) -> list[RemoteFile]:
    files = select(hub.files())
    if not files or files[-1].name != PIPELINE:
        raise ValueError(
            f"{hub.repository} has no {PIPELINE}, so it is no folder for diffusers: give the repository that has one, "
            f"often the one whose name ends in -Diffusers, such as {EXAMPLE}"
        )
    return files


def _check_space(partial: Path, missing: list[RemoteFile]) -> None:
    """ValueError: the disk has not the room for what is not yet fetched."""
    fetched = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    needed = sum(file.size for file in missing) - fetched
    existing = next(path for path in (partial, *partial.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{partial.parent}: {needed:,} bytes are to be fetched, and {free:,} are free; give another --to"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    about = "Fetch the parts of a diffusers folder that a trainer reads. HF_TOKEN holds the token for gated models."
    parser = argparse.ArgumentParser(prog="python -m titan_video.download", description=about, allow_abbrev=False)
    parser.add_argument("id", metavar="ID", help=f"model on the hub, such as {EXAMPLE}")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (main)")
    parser.add_argument("--to", type=Path, help="folder to make (default: the name of the model, here)")
    parser.add_argument("--list", action="store_true", help="print files and sizes, and fetch nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    init_logger()
    for name in ("httpx", "httpx2"):  # a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.id) or ".." in options.id:
        sys.exit(f"error: {short(options.id)!r} is no id of a model on the hub, such as {EXAMPLE}")
    folder = options.to or Path(options.id.partition("/")[2])
    try:
        hub = Hub(options.id, options.revision)
        if options.list:
            print(listing(hub, _pipeline_files(hub)))
        else:
            download(hub, folder)
    except KeyboardInterrupt:
        with suppress(OSError):
            logger.info(f"interrupted; the same command goes on with what is in {folder / PARTIAL}")
        sys.exit(130)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    except ImportError as e:
        sys.exit(f"error: huggingface_hub is not installed ({e}); pip install -r requirements.txt")


if __name__ == "__main__":
    main(sys.argv[1:])
