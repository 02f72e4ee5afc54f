"""A machine as the planner sees it, read from a TOML: one of train_configs/clusters, or what `planner profile` wrote.

    name, gpus, gpus_per_node
    [gpu]         memory as the driver shows it, peak, memory bandwidth
    [efficiency]  shares of the peaks that kernels and collectives reach
    [links]       bandwidths for each GPU and direction, latencies, slow-down of what runs beside a collective
    [host]        seconds that the host needs to launch, memory for each GPU
    [encoders]    rates of the frozen encoders, where clips are encoded during training
    [[product]] [[attention]]    measured rates by shape, which replace the efficiency (optional)
    [[all_gather]] [[reduce_scatter]] [[all_to_all]] [[send]]    measured seconds by message size (optional)

Bandwidths count 1e9 bytes. Times are of an otherwise idle machine.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

from titan_video.config.option import opt
from titan_video.config.values import tomllib

FOLDER = Path(__file__).resolve().parents[2] / "train_configs" / "clusters"  # from any working folder


@dataclass(frozen=True)
class Gpu:
    name: str = opt("", "Name of the GPU.")
    memory_gib: float = opt(0.0, "Memory as torch shows it, in GiB; the reserve of a dry run is inside.", gt=0)
    peak_tflops: float = opt(0.0, "Dense peak of bfloat16 products that sum in float32.", gt=0)
    hbm_gb_per_s: float = opt(0.0, "Memory bandwidth, reads and writes together.", gt=0)


@dataclass(frozen=True)
class Efficiency:
    """Shares from 0 to 1. That of attention is by the FLOPs that run: 2.5 times the forward's in backward."""

    product: float = opt(0.0, "Of the peak, in matrix products.", gt=0, le=1)
    attention_forward: float = opt(0.0, "Of the peak.", gt=0, le=1)
    attention_backward: float = opt(0.0, "Of the peak.", gt=0, le=1)
    copy: float = opt(0.0, "Of the memory bandwidth, in kernels that compute little.", gt=0, le=1)
    model: float = opt(0.0, "The same in a model's forward and backward; 0: as `copy`.", ge=0, le=1)
    all_gather: float = opt(0.8, "Of the links, in all-gather, reduce-scatter and all-reduce.", gt=0, le=1)
    all_to_all: float = opt(0.7, "Of the links, in all-to-all.", gt=0, le=1)
    send: float = opt(0.8, "Of a link, between two ranks.", gt=0, le=1)


@dataclass(frozen=True)
class Links:
    node_gb_per_s: float = opt(0.0, "From a GPU to the others of its node, one direction.", gt=0)
    network_gb_per_s: float = opt(0.0, "From a GPU's share of the network cards to other nodes, one direction.", gt=0)
    host_gb_per_s: float = opt(0.0, "Between a GPU and host memory, one direction.", gt=0)
    node_latency_us: float = opt(3.0, "Of one hop inside a node.", ge=0)
    network_latency_us: float = opt(8.0, "Of one hop between nodes.", ge=0)
    launch_latency_us: float = opt(10.0, "Of any collective, before its first byte.", ge=0)
    overlap_slowdown: float = opt(1.1, "Time of compute beside a collective / time without it.", ge=1)
    wait_us: float = opt(0.0, "A block's collective between computing, beyond its time alone: see profile/links.", ge=0)
    unit_wait_us: float = opt(0.0, "The same of one of FSDP's, with its copies: see profile/model.", ge=0)
    pipeline_slowdown: float = opt(1.0, "Time of a pipeline's stages / what their order makes it.", ge=1)


@dataclass(frozen=True)
class Host:
    operator_us: float = opt(6.0, "Host time to launch an operator of an eager block.", ge=0)
    compiled_us: float = opt(2.0, "Host time to launch a kernel of a compiled block.", ge=0)
    collective_us: float = opt(30.0, "Host time of a collective, with FSDP's own work.", ge=0)
    step_us: float = opt(3000.0, "Host time of a step outside forward and backward.", ge=0)
    tensor_us: float = opt(0.0, "Time to clip and update a weight, however small, beyond that of its bytes.", ge=0)
    synchronous: bool = opt(False, "The host computes: launches add to computing, and nothing runs beside it.")
    memory_gib: float = opt(0.0, "Host memory for each GPU.", ge=0)
    memory_gb_per_s: float = opt(20.0, "Host memory bandwidth for each GPU: of an update there.", gt=0)
    read_gb_per_s: float = opt(0.5, "Cached latents and text that a rank reads, per second.", gt=0)


@dataclass(frozen=True)
class Encoders:
    """Rates of one GPU. A model of the encoders' FLOPs is not needed: their cost is linear in pixels and in clips."""

    megapixels_per_s: float = opt(25.0, "Of all frames, encoded by the VAE in float32.", gt=0)
    texts_per_s: float = opt(15.0, "Captions of 512 tokens, by the text encoder.", gt=0)
    decode_megapixels_per_s: float = opt(60.0, "Of all frames, decoded by the host's share of cores.", gt=0)


@dataclass(frozen=True)
class ProductSample:
    """[rows, inner] x [inner, columns]."""

    rows: int = opt(0, "", ge=1)
    inner: int = opt(0, "", ge=1)
    columns: int = opt(0, "", ge=1)
    tflops: float = opt(0.0, "", gt=0)

    @property
    def position(self) -> tuple[float, ...]:
        return tuple(map(math.log, (self.rows, self.inner, self.columns)))


@dataclass(frozen=True)
class AttentionSample:
    backend: str = opt("auto", "As model.attention.")
    tokens: int = opt(0, "Queries and keys.", ge=1)
    head_dim: int = opt(128, "", ge=1)
    forward_tflops: float = opt(0.0, "", gt=0)
    backward_tflops: float = opt(0.0, "Of 2.5 times the forward's FLOPs.", gt=0)


@dataclass(frozen=True)
class MessageSample:
    """A collective over `ranks` ranks, `ranks_per_node` of them on each node.

    bytes: of the full tensor of a gather or scatter, of what one rank puts in of an all-to-all, of what is sent.
    """

    ranks: int = opt(2, "", ge=2)
    ranks_per_node: int = opt(1, "", ge=1)
    bytes: int = opt(0, "", ge=1)
    seconds: float = opt(0.0, "", gt=0)


@dataclass(frozen=True)
class Group:
    """Ranks of a process group: how many, and how many of them are on each node."""

    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Cluster:
    name: str
    gpus: int
    gpus_per_node: int
    gpu: Gpu
    efficiency: Efficiency
    links: Links
    host: Host = Host()
    encoders: Encoders = Encoders()
    product: tuple[ProductSample, ...] = ()
    attention: tuple[AttentionSample, ...] = ()
    all_gather: tuple[MessageSample, ...] = ()
    reduce_scatter: tuple[MessageSample, ...] = ()
    all_to_all: tuple[MessageSample, ...] = ()
    send: tuple[MessageSample, ...] = ()

    @property
    def peak_flops(self) -> float:
        """FLOP/s of one GPU."""
        return self.gpu.peak_tflops * 1e12

    @property
    def copy_rate(self) -> float:
        """Bytes per second of kernels that compute little."""
        return self.gpu.hbm_gb_per_s * 1e9 * self.efficiency.copy

    @property
    def model_rate(self) -> float:
        """The same, in a model's forward and backward."""
        return self.gpu.hbm_gb_per_s * 1e9 * (self.efficiency.model or self.efficiency.copy)

    def group(self, ranks: int, stride: int) -> Group:
        """The group of ranks r, r + stride, r + 2 stride, ... (ranks are counted node by node)."""
        return Group(ranks, max(1, min(ranks, self.gpus_per_node // stride)))

    # ---- compute ----

    def product_rate(self, rows: float, inner: float, columns: float) -> float:
        """FLOP/s of a product: of the measured shape that is nearest by the logarithms of its sizes."""
        if not self.product:
            return self.peak_flops * self.efficiency.product
        here = [math.log(max(1.0, size)) for size in (rows, inner, columns)]
        nearest = min(self.product, key=lambda sample: math.dist(here, sample.position))
        return nearest.tflops * 1e12

    def attention_rate(self, tokens: float, head_dim: int, backward: bool, backend: str = "auto") -> float:
        """FLOP/s of attention over so many tokens; between measured lengths by the logarithm of the length.

        backend: model.attention; auto, or one that was not measured, is the fastest at each length.
        """
        if not self.attention:
            e = self.efficiency
            return self.peak_flops * (e.attention_backward if backward else e.attention_forward)
        best: dict[int, float] = {}
        samples = [s for s in self.attention if s.backend == backend] or self.attention
        width = min({s.head_dim for s in samples}, key=lambda w: abs(w - head_dim))
        for s in samples:
            if s.head_dim == width:
                rate = s.backward_tflops if backward else s.forward_tflops
                best[s.tokens] = max(rate, best.get(s.tokens, 0.0))
        lengths = sorted(best)
        return interpolate(lengths, [best[n] for n in lengths], tokens) * 1e12

    # ---- communication ----

    def gather_seconds(self, size: float, group: Group, kind: str = "all_gather") -> float:
        """An all-gather or reduce-scatter ("reduce_scatter") of a tensor of `size` bytes in all.

        Formula: rings through all ranks, of which each network card carries one: the slower of what passes each GPU's
        link in the node and what passes each card between nodes; latency of every hop (NCCL's ring algorithm).
        """
        if group.ranks == 1 or size <= 0:
            return 0.0
        if (measured := self._measured(kind, size, group)) is not None:
            return measured
        links, nodes = self.links, group.nodes
        node = size * (group.ranks - 1) / group.ranks / (links.node_gb_per_s * 1e9) if group.ranks_per_node > 1 else 0.0
        network = size * (nodes - 1) / nodes / (group.ranks_per_node * links.network_gb_per_s * 1e9)
        return self._latency(group) + max(node, network) / self.efficiency.all_gather

    def all_reduce_seconds(self, size: float, group: Group) -> float:
        """A reduce-scatter and an all-gather."""
        return self.gather_seconds(size, group, "reduce_scatter") + self.gather_seconds(size, group)

    def all_to_all_seconds(self, size: float, group: Group) -> float:
        """Each rank has `size` bytes, of which it keeps 1 / ranks."""
        if group.ranks == 1 or size <= 0:
            return 0.0
        if (measured := self._measured("all_to_all", size, group)) is not None:
            return measured
        near = size * (group.ranks_per_node - 1) / group.ranks / (self.links.node_gb_per_s * 1e9)
        far = size * (group.ranks - group.ranks_per_node) / group.ranks / (self.links.network_gb_per_s * 1e9)
        hop = self.links.network_latency_us if group.nodes > 1 else self.links.node_latency_us
        latency = (self.links.launch_latency_us + hop) * 1e-6
        return latency + max(near, far) / self.efficiency.all_to_all

    def send_seconds(self, size: float, in_node: bool) -> float:
        """From one rank to another."""
        group = Group(2, 2 if in_node else 1)
        if (measured := self._measured("send", size, group)) is not None:
            return measured
        rate = self.links.node_gb_per_s if in_node else self.links.network_gb_per_s
        hop = self.links.node_latency_us if in_node else self.links.network_latency_us
        return (self.links.launch_latency_us + hop) * 1e-6 + size / (rate * 1e9 * self.efficiency.send)

    def host_copy_seconds(self, size: float) -> float:
        return size / (self.links.host_gb_per_s * 1e9)

    def _latency(self, group: Group) -> float:
        far = group.nodes if group.nodes > 1 else 0
        near = group.ranks - 1 - far if far else group.ranks - 1
        hops = max(0, near) * self.links.node_latency_us + far * self.links.network_latency_us
        return (self.links.launch_latency_us + hops) * 1e-6

    @cached_property
    def _tables(self) -> dict[str, dict[Group, tuple[list[float], list[float]]]]:
        """{kind: {group: (sizes, seconds)}}, sizes ascending."""
        tables: dict[str, dict[Group, tuple[list[float], list[float]]]] = {}
        for kind in ("all_gather", "reduce_scatter", "all_to_all", "send"):
            groups: dict[Group, dict[float, float]] = {}
            for s in getattr(self, kind):
                groups.setdefault(Group(s.ranks, min(s.ranks, s.ranks_per_node)), {})[s.bytes] = s.seconds
            tables[kind] = {g: (sorted(found), [found[n] for n in sorted(found)]) for g, found in groups.items()}
        return tables

    def _measured(self, kind: str, size: float, group: Group) -> float | None:
        """Seconds by the table of the nearest group of the same reach, inside a node or beyond; None without one.

        What a rank of the group sends is scaled from the measured group to this one.
        """
        tables = {g: t for g, t in self._tables[kind].items() if (g.nodes > 1) == (group.nodes > 1)}
        if not tables:
            return None
        nearest = min(tables, key=lambda g: (abs(math.log(g.ranks / group.ranks)), g.ranks))
        share = 1.0
        if kind != "send":
            share = (group.ranks - 1) / group.ranks / ((nearest.ranks - 1) / nearest.ranks)
        return seconds_of_size(*tables[nearest], size * share)


def interpolate(xs: list[float], ys: list[float], x: float) -> float:
    """Linear in log x between points, constant beyond them; xs ascending."""
    i = bisect_left(xs, x)
    if i in (0, len(xs)):
        return ys[0] if i == 0 else ys[-1]
    part = math.log(x / xs[i - 1]) / math.log(xs[i] / xs[i - 1])
    return ys[i - 1] + part * (ys[i] - ys[i - 1])


def seconds_of_size(sizes: list[float], seconds: list[float], size: float) -> float:
    """Linear between measured sizes; below the smallest its time, above the largest its rate."""
    if size <= sizes[0]:
        return seconds[0]
    if size >= sizes[-1]:
        return seconds[-1] * size / sizes[-1]
    i = bisect_left(sizes, size)
    part = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
    return seconds[i - 1] + part * (seconds[i] - seconds[i - 1])


# ---- reading ----


def load(path: str | Path) -> Cluster:
    """A cluster from a TOML; a bare name is looked up in train_configs/clusters. ValueError: it cannot be read, or a
    value is missing or illegal; one line for each, with the field and the fix."""
    path = Path(path)
    if not path.exists() and (found := FOLDER / path.with_suffix(".toml").name).exists():
        path = found
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml")))
        raise ValueError(f"--cluster: {path} cannot be read ({e.strerror}); give a file, or one of {names}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"--cluster: {path} is no TOML: {e}") from e
    return parse(raw, str(path))


def parse(raw: dict[str, Any], where: str) -> Cluster:
    """A cluster from parsed TOML. where: for messages. ValueError: see `load`."""
    errors = [f"{where}: {line}" for line in _errors(raw)]
    if errors:
        raise ValueError("\n".join(errors))
    kinds, values = get_type_hints(Cluster), {}
    for name, value in raw.items():
        kind = kinds[name]
        if args := get_args(kind):
            values[name] = tuple(args[0](**_numbers(args[0], row)) for row in value)
        else:
            values[name] = kind(**_numbers(kind, value)) if isinstance(value, dict) else value
    return Cluster(**values)


def _numbers(cls: type, row: dict[str, Any]) -> dict[str, Any]:
    """Integers where numbers are meant become numbers."""
    kinds = get_type_hints(cls)
    return {name: float(value) if kinds[name] is float else value for name, value in row.items()}


def _errors(raw: dict[str, Any]) -> Iterator[str]:
    kinds = get_type_hints(Cluster)
    for f in fields(Cluster):
        if f.name not in raw and f.default is MISSING:
            yield f"{f.name}: missing; see train_configs/clusters for examples"
    for name, value in raw.items():
        if name not in kinds:
            yield f"{name}: no field of a cluster; legal: {', '.join(kinds)}"
        elif args := get_args(kinds[name]):
            if not isinstance(value, list):
                yield f"{name}: given {value!r}; legal: tables [[{name}]]"
                continue
            for i, row in enumerate(value):
                yield from _row_errors(f"{name}[{i}]", args[0], row)
        elif kinds[name] in (int, str):
            least = kinds[name] is int and isinstance(value, int) and not isinstance(value, bool) and value < 1
            if type(value) is not kinds[name] or least:
                legal = "an integer >= 1" if kinds[name] is int else "a string"
                yield f"{name}: given {value!r}; legal: {legal}"
        else:
            yield from _row_errors(name, kinds[name], value)
    gpus, per_node = raw.get("gpus"), raw.get("gpus_per_node")
    if isinstance(gpus, int) and isinstance(per_node, int) and per_node > 0 and gpus % per_node and gpus > 0:
        yield f"gpus_per_node: given {per_node}, which does not divide gpus {gpus}"


def _row_errors(where: str, cls: type, row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield f"{where}: given {row!r}; legal: a table of {', '.join(f.name for f in fields(cls))}"
        return
    known = {f.name: f for f in fields(cls)}
    for name in row:
        if name not in known:
            yield f"{where}.{name}: no such field; legal: {', '.join(known)}"
    kinds = get_type_hints(cls)
    for name, f in known.items():
        value, limits = row.get(name, f.default), f.metadata
        if kinds[name] is str:
            if not isinstance(value, str):
                yield f"{where}.{name}: given {value!r}; legal: a string"
            continue
        if kinds[name] is bool:
            if not isinstance(value, bool):
                yield f"{where}.{name}: given {value!r}; legal: true, false"
            continue
        is_number = isinstance(value, int if kinds[name] is int else int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and _within(value, limits)):
            given = "missing" if name not in row else f"given {value!r}"
            words = {"gt": ">", "ge": ">=", "le": "<="}
            legal = " and ".join(f"{sign} {limits[key]}" for key, sign in words.items() if key in limits)
            kind = "an integer" if kinds[name] is int else "a number"
            yield f"{where}.{name}: {given}; legal: {kind} {legal}".rstrip()


def _within(value: float, limits: Any) -> bool:
    least, most = limits.get("ge", -math.inf), limits.get("le", math.inf)
    return least <= value <= most and value > limits.get("gt", -math.inf)


def with_room(machine: Cluster, gib: float) -> Cluster:
    """The same machine, of whose GPUs a plan leaves so many GiB free. ValueError: none would be left."""
    if not 0 <= gib < machine.gpu.memory_gib:
        raise ValueError(f"--room: given {gib:g}; legal: GiB of a GPU, from 0 to less than {machine.gpu.memory_gib:g}")
    return replace(machine, gpu=replace(machine.gpu, memory_gib=machine.gpu.memory_gib - gib))
