"""Probes of many files, in worker processes, kept between runs."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from titan_video.data.latent_cache import DAMAGE_ERRORS
from titan_video.ingest import media
from titan_video.ingest.media import DecodeLimits
from titan_video.ingest.video import Probe, probe
from titan_video.ingest.worker import map_in_workers
from titan_video.tools import heartbeat
from titan_video.tools.files import atomic_write, optional_write
from titan_video.tools.signals import Stopped, stop_requested

PROBE_VERSION = 3


def probe_all(paths: Sequence[str], num_workers: int, folder: Path, limits: DecodeLimits) -> list[Probe]:
    """The probe of each path, in order. Each is kept, so a stop request ends this early: Stopped."""
    files = _Probes(list(paths), folder, limits)
    missing = [i for i in range(len(paths)) if files.read(i) is None]
    fresh = map_in_workers(files, missing, min(num_workers, len(missing)))
    found = {}
    with heartbeat.own_work("looking at clips"):
        for i, probed in zip(missing, fresh, strict=True):
            found[i] = probed
            heartbeat.progress(paths[i])
            if stop_requested():
                raise Stopped("stopped while looking at clips; the same command goes on from there")
    return [found[i] if i in found else files.read(i) or probe(p, limits) for i, p in enumerate(paths)]


class _Probes:
    """A data set for `map_in_workers`: probes by index of path. Each is saved in a small file, named by a hash of the
    path, with the size and time of change it is valid for. What has no probe within the limits is tried again.
    """

    def __init__(self, paths: list[str], folder: Path, limits: DecodeLimits):
        self.paths, self.folder, self.decode_limits = paths, folder, limits

    def limits(self, index: int) -> DecodeLimits:
        return self.decode_limits

    def name(self, index: int) -> str:
        return self.paths[index]

    def failed(self, index: int, reason: str) -> Probe:
        return Probe(reason=reason)

    def _identity(self, path: str) -> dict[str, Any]:
        return {"probe": PROBE_VERSION, **media.version(path)}

    def _file(self, path: str) -> Path:
        name = hashlib.sha256(
            (path if media.is_url(path) else os.path.abspath(path)).encode("utf-8", "surrogateescape")
        ).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def read(self, index: int) -> Probe | None:
        path = self.paths[index]
        try:
            saved = json.loads(self._file(path).read_text(encoding="utf-8"))
            found = Probe(**saved["found"])
            whole = all(isinstance(n, int) for n in (found.width, found.height, found.end, *found.pts))
            if not whole or Fraction(found.time_base) <= 0 or not isinstance(found.sha256 + found.colour, str):
                return None
            return replace(found, pts=tuple(found.pts)) if saved["of"] == self._identity(path) else None
        except (OSError, ArithmeticError, *DAMAGE_ERRORS):  # not there, or not whole: probe again
            return None

    def __getitem__(self, index: int) -> Probe:
        path = self.paths[index]
        try:
            identity = self._identity(path)
        except OSError as e:
            return Probe(reason=f"unreadable: {e.strerror or e}")
        found = probe(path, self.decode_limits)
        if found.reason.startswith(("too large", "too long")):
            return found  # another limit may be set next time
        with optional_write("probes", self.folder):  # without them the next start probes again
            atomic_write(self._file(path), json.dumps({"of": identity, "found": asdict(found)}))
        return found
