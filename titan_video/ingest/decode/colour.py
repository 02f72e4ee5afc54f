"""The colour of a video's frames: what its tags say, what becomes of it, and the conversion to 8-bit R'G'B' as SDR
displays take it.

    facts(...)  tags of the frames and the container      -> text that the probe holds
    settle(...) these facts, the size, [data]'s policy    -> the conversion of a clip, or why it is dropped
    Converter   a conversion                              -> pixels

Texts are words "name=value", with the names of ITU-T H.273 as FFmpeg writes them, and empty for plain SDR video, which
libswscale converts alone. A conversion that is not empty is a part of a clip's identity.

HDR and wide gamuts, in three steps on 16-bit R'G'B' at the bucket's size:

1. Linear light E, in which 1.0 is the white of SDR:
   PQ (ITU-R BT.2100-2, table 4): F = 10000 (max(E'^(1/m2) - c1, 0) / (c2 - c3 E'^(1/m2)))^(1/m1) nit, E = F / 203
   HLG (BT.2100-2, table 5): E = E'^2 / 3 up to E' = 1/2, (exp((E' - c) / a) + b) / 12 beyond, divided by the value at
   75 %. Both are the reference white of BT.2408-7, table 1. HLG is taken as scene light: its system gamma,
   1.2 + 0.42 log10(L / 1000) for a display of L nit (BT.2100-2, note 5f), is 1 at 334 nit, about where SDR is seen.
   SDR: the inverse of BT.709's curve (BT.709-6, item 1.2; BT.2087, scene-referred; FFmpeg's filter colorspace does
   the same); those of sRGB, gamma 2.2, gamma 2.8 and linear light where these are tagged.
2. A matrix to the primaries of BT.709, by way of XYZ; another white is adapted to D65 by Bradford. Negative light is 0.
3. HDR: a tone curve, identity up to 0.9 and then 0.9 + a ln(1 + (E - 0.9) / a), which has the same slope there and
   reaches 1 at 1000 nit (the form of BT.2446-1, method C); so what SDR can show keeps its values to within 8 levels.
   Encoded with the curve of sRGB (IEC 61966-2-1). SDR: encoded with the curve that it came with.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from titan_video.config.sections.data import Data
from titan_video.ingest.decode.images import over_white

DecoderName = Literal["pyav", "torchcodec"]
NEWEST_RULES = 2
NAMES_SHOWN = 5  # of files that are converted in one way; data_plan.jsonl has all
UNSPECIFIED = 2
RESERVED = (0, UNSPECIFIED, 3)  # of matrices: R'G'B' itself, and values that say nothing
MATRICES = MappingProxyType(
    {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco", 9: "bt2020nc", 10: "bt2020c"}
    | {11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c", 14: "ictcp", 15: "ipt-c2"}
    | {16: "ycgco-re", 17: "ycgco-ro"}
)
# Those that libswscale knows, by its own numbers.
SWSCALE = MappingProxyType({"bt709": 1, "fcc": 4, "bt470bg": 5, "smpte170m": 5, "smpte240m": 7, "bt2020nc": 9})
TRANSFERS = MappingProxyType(
    {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 9: "log100", 10: "log316"}
    | {11: "iec61966-2-4", 12: "bt1361e", 13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084"}
    | {17: "smpte428", 18: "arib-std-b67"}
)
HDR = MappingProxyType({"smpte2084": "PQ", "arib-std-b67": "HLG"})
SDR_CURVES = MappingProxyType({"iec61966-2-1": "srgb", "gamma22": 2.2, "gamma28": 2.8})  # others: BT.709
PRIMARIES = MappingProxyType(
    {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020", 10: "smpte428"}
    | {11: "smpte431", 12: "smpte432", 22: "ebu3213"}
)
# x, y of red, green, blue and white (H.273, table 2), of those that are converted.
CHROMATICITIES = MappingProxyType(
    {
        "bt709": (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290),
        "bt470m": (0.670, 0.330, 0.210, 0.710, 0.140, 0.080, 0.310, 0.316),
        "bt2020": (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
        "smpte431": (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
        "smpte432": (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),
    }
)
# Of standard-definition television: within some levels of BT.709, and taken for it, as players do.
NEAR_BT709 = ("bt709", "bt470bg", "smpte170m", "smpte240m", "ebu3213")
WHITE_NITS, PEAK_NITS, KNEE = 203.0, 1000.0, 0.9
PEAK = PEAK_NITS / WHITE_NITS
ROOM = 0.018576  # a of the tone curve: KNEE + a ln(1 + (PEAK - KNEE) / a) = 1
STEPS = 65536


@dataclass(frozen=True)
class MediaPolicy:
    """What [data] says about reading media. rules: 1, as before colour and images were converted; 2."""

    decoder: DecoderName = "pyav"
    hdr: Literal["tonemap", "drop"] = "tonemap"
    bt709_lines: int = Data.bt709_lines
    video_as_image: bool = False
    rules: int = NEWEST_RULES

    @classmethod
    def of(cls, section: Data) -> "MediaPolicy":
        return cls(section.decoder, section.hdr, section.bt709_lines, section.video_as_image, section.media_rules)


def words(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in text.split())}


def _text(found: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" if value else name for name, value in found.items())


# ---- what a file says ----


def container_tags(stream: Any) -> tuple[int, int, int]:
    """(matrix, primaries, transfer), as numbers of H.273, of a stream of which nothing is decoded yet."""
    context = stream.codec_context
    return tuple(
        int(n) if n is not None else UNSPECIFIED
        for n in (context.colorspace, context.color_primaries, context.color_trc)
    )


def facts(stream: Any, frame: Any, container: tuple[int, int, int] = (UNSPECIFIED,) * 3) -> str:
    """What is not plain SDR about a decoded frame, by its tags and where it has none those of the container.

    `untagged` alone means that neither names the matrix.
    """
    _, primaries_tag, transfer_tag = container_tags(stream)  # of the bitstream, now that a frame is decoded
    own = int(frame.colorspace), primaries_tag, transfer_tag
    matrix, primaries, transfer = (c if n in RESERVED else n for n, c in zip(own, container, strict=True))
    found: dict[str, str] = {}
    curve = TRANSFERS.get(transfer, "")
    gamut = PRIMARIES.get(primaries, "bt2020" if curve in HDR else "bt709")
    components = frame.format.components
    is_grey = len([c for c in components if not c.is_alpha]) == 1
    if not frame.format.is_rgb and not is_grey:
        name = MATRICES.get(matrix, "bt2020nc" if gamut == "bt2020" else "")
        if not name:
            found["untagged"] = ""
        elif own[0] in RESERVED or name not in SWSCALE:
            found["matrix"] = name
    elif is_grey and int(frame.color_range) == 1 and frame.format.name.startswith("gray"):
        found["range"] = "limited"  # libswscale takes every grey for full range
    if curve in HDR or curve in ("linear", "log100", "log316", "smpte428"):
        found["transfer"] = curve
    if gamut not in NEAR_BT709:
        found["primaries"] = gamut
        if curve in SDR_CURVES:
            found["transfer"] = curve
    if any(c.is_alpha for c in components) and _has_alpha(stream, frame):
        found["alpha"] = ""
    if "untagged" in found and any("DOVI" in str(getattr(d.type, "name", "")) for d in frame.side_data):
        found = {"matrix": "ipt-c2"}  # Dolby Vision profile 5, which tags nothing
    return _text(found)


def _has_alpha(stream: Any, frame: Any) -> bool:
    """Whether the fourth channel of a stream's first frame is transparency that is still to be seen to."""
    if stream.codec_context.name == "gif":  # it is white already
        return False
    if stream.container.format.name == "avi":  # in which the fourth byte of a pixel is often padding
        return bool(frame.reformat(format="rgba").to_ndarray()[..., 3].any())
    return True


def settle(found: str, width: int, height: int, policy: MediaPolicy) -> tuple[str, str]:
    """(the conversion, "") of a clip with these facts, or ("", the reason why it is dropped).

    width, height: as shown. Untagged video is BT.709 from policy.bt709_lines pixels of the shorter side on, however it
    is turned; else BT.601.
    """
    if policy.rules < 2:
        return "", ""
    traits = words(found)
    if "untagged" in traits:
        is_hd = 0 < policy.bt709_lines <= min(width, height)
        traits.pop("untagged")
        traits |= {"untagged": "bt709"} if is_hd else {}
    if traits.get("matrix", "bt709") not in SWSCALE:
        return "", f"colour: the matrix {traits['matrix']} is not read; encode the file anew as BT.709"
    curve, gamut = traits.get("transfer", "linear"), traits.get("primaries", "bt709")
    if gamut not in CHROMATICITIES:
        return "", f"colour: the primaries {gamut} are not read; encode the file anew as BT.709"
    if curve in HDR and policy.hdr == "drop":
        return "", f'HDR: transfer function {HDR[curve]} ({curve}); data.hdr = "tonemap" would convert it'
    if curve not in HDR and curve not in SDR_CURVES and curve != "linear":
        return "", f"colour: the transfer function {curve} is not read; encode the file anew as BT.709"
    return _text(traits), ""


def describe(conversion: str) -> str:
    """A conversion for people."""
    found, parts = words(conversion), []
    curve, gamut = found.get("transfer", ""), found.get("primaries", "")
    if curve in HDR:
        parts.append(f"HDR ({HDR[curve]}, {gamut or 'bt709'}) tone-mapped to SDR")
    else:
        parts += ["linear light encoded as sRGB"] * (curve == "linear")
        parts += [f"primaries {gamut} converted to BT.709"] * bool(gamut)
    parts += ["untagged video of HD size read as BT.709"] * ("untagged" in found)
    if "matrix" in found and curve not in HDR:
        parts.append(f"matrix {found['matrix']}, which only the container or the primaries tell")
    parts += ["grey of limited range expanded"] * ("range" in found)
    parts += ["16 bits scaled to 8"] * ("depth" in found)
    parts += ["colour profile converted to sRGB"] * ("icc" in found)
    parts += ["L*a*b* converted to sRGB"] * ("lab" in found)
    parts += ["transparency laid over white"] * ("alpha" in found)
    return "; ".join(parts)


def summarise(converted: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for the plan, from (path, conversion) of clips: how many files are converted, by how, with names."""
    files: dict[str, dict[str, None]] = {}
    for path, conversion in converted:
        if conversion:
            files.setdefault(describe(conversion), {})[path] = None
    lines = []
    for what, paths in files.items():
        lines.append(f"  converted, {what}: {len(paths)} file{'s' * (len(paths) > 1)}")
        lines += [f"    {path}" for path in list(paths)[:NAMES_SHOWN]]
        lines += [f"    and {len(paths) - NAMES_SHOWN} more"] * (len(paths) > NAMES_SHOWN)
    return lines


# ---- pixels ----


def matrix_to_bt709(primaries: str) -> np.ndarray:
    """[3, 3], linear R, G, B of these primaries -> those of BT.709, white to white."""
    to_xyz, white = _rgb_to_xyz(primaries)
    to_xyz_709, white_709 = _rgb_to_xyz("bt709")
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    scale = np.diag((bradford @ white_709) / (bradford @ white))
    return np.linalg.inv(to_xyz_709) @ np.linalg.inv(bradford) @ scale @ bradford @ to_xyz


def _rgb_to_xyz(primaries: str) -> tuple[np.ndarray, np.ndarray]:
    xy = np.array(CHROMATICITIES[primaries]).reshape(4, 2)
    xyz = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(1)) / xy[:, 1]])
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3]), xyz[:, 3]


def tone(light: np.ndarray) -> np.ndarray:
    """Step 3: linear light, of which SDR shows 0 to 1, to what SDR shows."""
    over = np.maximum(light - KNEE, 0)
    return np.minimum(np.where(light <= KNEE, light, KNEE + ROOM * np.log1p(over / ROOM)), 1)


def linear(signal: np.ndarray, transfer: str) -> np.ndarray:
    """Step 1: R'G'B', 0 to 1, to linear light."""
    if transfer == "smpte2084":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        return 10_000 / WHITE_NITS * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    if transfer == "arib-std-b67":
        a, b = 0.17883277, 0.28466892
        c = 0.5 - a * math.log(4 * a)
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        return scene / ((math.exp((0.75 - c) / a) + b) / 12)
    curve = SDR_CURVES.get(transfer, 1.0 if transfer == "linear" else "bt709")
    if curve == "bt709":
        return np.where(signal < 0.081, signal / 4.5, ((signal + 0.099) / 1.099) ** (1 / 0.45))
    if curve == "srgb":
        return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)
    return signal**curve


def encoded(light: np.ndarray, transfer: str) -> np.ndarray:
    """The end of step 3: what SDR shows, 0 to 1, to R'G'B'."""
    curve = SDR_CURVES.get(transfer, "bt709")
    if transfer in HDR or transfer == "linear" or curve == "srgb":
        return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    if curve == "bt709":
        return np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)
    return light ** (1 / curve)


@cache
def _tables(transfer: str, primaries: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, float]:
    """(16-bit signal -> light, the matrix, the root of light / peak in STEPS steps -> 8 bits, the peak)."""
    peak = PEAK if transfer in HDR else 1.0
    light = (np.arange(STEPS) / (STEPS - 1)) ** 2 * peak
    shown = encoded(tone(light) if transfer in HDR else light, transfer)
    matrix = matrix_to_bt709(primaries).astype(np.float32) if primaries != "bt709" else None
    to_light = linear(np.arange(STEPS) / (STEPS - 1), transfer).astype(np.float32)
    return to_light, matrix, np.rint(shown * 255).astype(np.uint8), peak


class Converter:
    """Frames to uint8 R'G'B' at a size. One for all frames of a clip: libswscale keeps its tables."""

    def __init__(self, conversion: str = ""):
        from av.video.reformatter import VideoReformatter

        self.found = words(conversion)
        self.scaler, self.blender = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any, width: int, height: int, interpolation: str) -> np.ndarray:
        """[height, width, 3]. frame: as decoded, not yet upright."""
        import av

        found = self.found
        if "alpha" in found and any(c.is_alpha for c in frame.format.components):
            rgba_HWC = self._scaled(self.blender, frame, frame.width, frame.height, "rgba64le", interpolation)
            opaque_HWC = over_white(rgba_HWC[..., :3], rgba_HWC[..., 3] / np.float32(STEPS - 1))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(opaque_HWC), format="rgb48le")
        if not found.keys() & {"transfer", "primaries", "range"}:
            return self._scaled(self.scaler, frame, width, height, "rgb24", interpolation)
        signal_HWC = self._scaled(self.scaler, frame, width, height, "rgb48le", interpolation)
        if "range" in found:
            top = STEPS - 1
            levels = (np.arange(STEPS) - 16 / 255 * top) * (255 / 219 / 257)
            return np.clip(np.rint(levels), 0, 255).astype(np.uint8)[signal_HWC]
        to_light, matrix, to_levels, peak = _tables(found.get("transfer", ""), found.get("primaries", "bt709"))
        light_HWC = to_light[signal_HWC]
        if matrix is not None:
            light_HWC = light_HWC @ matrix.T
        root_HWC = np.sqrt(np.clip(light_HWC / peak, 0, 1))
        return to_levels[np.rint(root_HWC * (STEPS - 1)).astype(np.uint16)]

    def _scaled(self, scaler: Any, frame: Any, width: int, height: int, form: str, interpolation: str) -> np.ndarray:
        matrix, frame_matrix = self.found.get("matrix") or self.found.get("untagged"), int(frame.colorspace)
        if frame_matrix in RESERVED:
            frame_matrix = SWSCALE[matrix] if matrix else UNSPECIFIED
        # Without both ends PyAV before 17 leaves the tags of a frame unread.
        scaled = scaler.reformat(
            frame,
            width,
            height,
            format=form,
            src_colorspace=frame_matrix,
            dst_colorspace="ITU601",
            interpolation=interpolation,
            src_color_range=int(frame.color_range),
            dst_color_range="JPEG",
        )
        return scaled.to_ndarray()
