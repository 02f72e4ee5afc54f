"""What a plan is written as: plan.toml with its reasons, tables, the page and the time lines."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import CONFIG_FILE, DATA_FILE
from titan_video.config.renames import current_name
from titan_video.config.values import sections
from titan_video.planner.candidate import PARTS, StageMemory
from titan_video.planner.cost.timeline import block_events, chrome_trace, step_events
from titan_video.planner.dry_run.describe import CATEGORIES, CONTEXT, GAPS, GIB, NCCL, usable_bytes
from titan_video.planner.plan import Planned
from titan_video.planner.plan_file import Tables, hash_of, plan_tables, write_toml
from titan_video.planner.report.page import build_page
from titan_video.planner.report.table import to_csv, to_markdown
from titan_video.planner.search.explain import name_of, saved_by
from titan_video.planner.search.fastest import PLATEAU, Plan, assign
from titan_video.tools.files import atomic_write

CURVE = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)  # shares of the memory for which the chosen layout is planned, too


@dataclass(frozen=True)
class Source:
    """The job's TOML: its path, its tables as tomllib reads them, and what the command line overrides."""

    path: str
    tables: Tables
    overrides: Sequence[str] = ()

    def with_overrides(self, config: JobConfig) -> Tables:
        """The tables with current names, and the values that `config`, which is made of both, has by overrides."""
        tables = {
            section: {current_name(name, sections()[section]): value for name, value in values.items()}
            for section, values in self.tables.items()
        }
        found, defaults = asdict(config), asdict(JobConfig())
        for word in self.overrides:
            option = word[2:].partition("=")[0] if word.startswith("--") else CONFIG_FILE
            section, _, field = option.partition(".")
            if option == DATA_FILE:
                for name in ("data", "training"):
                    tables[name] = {k: v for k, v in found[name].items() if v != defaults[name][k]}
            elif option != CONFIG_FILE:
                name = current_name(field.partition(".")[0], sections()[section])
                tables.setdefault(section, {})[name] = found[section][name]
        return tables


def headline(planned: Planned) -> str:
    """The plan in a few lines."""
    plan, cluster = planned.result.chosen, planned.job.cluster
    p = plan.prediction
    lines = [
        f"{cluster.name}: {name_of(plan.candidate)}; checkpointing: {saved_by(plan.candidate)}",
        f"predicted {plan.seconds:.3f} s a step, MFU {p.mfu:.1%}, {p.tokens / plan.seconds:,.0f} tokens/s; "
        f"{p.fullest.needed:.1f} of {cluster.gpu.memory_gib:.1f} GiB; binding: {plan.binding}",
    ]
    if plan.candidate.split:
        lines.append(f"first block of each stage: {', '.join(map(str, plan.candidate.split))}")
    return "\n".join(lines)


def assumptions(planned: Planned) -> list[str]:
    """What the prediction rests on, in words."""
    c, workload = planned.job.cluster, planned.model.workload
    e, links = c.efficiency, c.links
    buckets = "; ".join(f"{'x'.join(map(str, w.bucket))}: {w.tokens:,} tokens, share {w.share:.2f}" for w in workload)
    lines = [
        f"{c.gpus} GPUs, {c.gpus_per_node} a node: {c.gpu.name}, {c.gpu.memory_gib:g} GiB, "
        f"{c.gpu.peak_tflops:g} TFLOP/s",
        f"buckets: {buckets}",
        f"efficiency: products {e.product:g}, attention {e.attention_forward:g} forward and {e.attention_backward:g} "
        f"backward of the peak, copies {e.copy:g} of {c.gpu.hbm_gb_per_s:g} GB/s, all-gather {e.all_gather:g}, "
        f"all-to-all {e.all_to_all:g} of the links",
        f"links: {links.node_gb_per_s:g} GB/s in a node, {links.network_gb_per_s:g} between nodes, "
        f"{links.host_gb_per_s:g} to the host, for each GPU and direction",
        f"reserve: {GAPS:.0%} of what is counted, {CONTEXT} GiB for the CUDA context"
        + (f", {NCCL} GiB for NCCL" if c.gpus > 1 else ""),
    ]
    if experts := getattr(planned.model, "experts", None):
        load = planned.model.load
        lines.append(
            f"experts: {experts.top_k} of {experts.num_experts} a token, equally many tokens for each; memory where a "
            f"rank's get {load:g} times as many; their products at the rate of others"
        )
    measured = [name for name in ("product", "attention", "all_gather", "all_to_all", "send") if getattr(c, name)]
    lines.append(f"measured on the machine: {', '.join(measured)}" if measured else "nothing measured on the machine")
    return [*lines, *planned.result.chosen.prediction.notes]


def assumption_hash(planned: Planned) -> str:
    job = planned.job
    return hash_of({"config": asdict(job.config), "cluster": asdict(job.cluster), "shares": str(job.shares)})


def by_kind(memory: StageMemory) -> dict[str, int]:
    """Bytes on the device by kind, in the dry run's order."""
    return {
        kind: memory.by_kind[kind] for kind in CATEGORIES if memory.by_kind.get(kind, 0) and kind not in memory.on_host
    }


def comment(planned: Planned, source: Source) -> list[str]:
    """The comment block of plan.toml."""
    plan, result = planned.result.chosen, planned.result
    p = plan.prediction
    lines = [
        f"world size: {planned.job.cluster.gpus}",
        "",
        f"The planner's layout of {source.path} on {planned.job.cluster.name}. Predicted, not measured:",
        "",
        f"  {plan.seconds:.3f} s a step, MFU {p.mfu:.1%}, {p.tokens / plan.seconds:,.0f} tokens/s",
        *(f"  {part}: {p.seconds[part]:.3f} s" for part in PARTS if p.seconds.get(part, 0) > 0.0005 * plan.seconds),
        "",
        f"Binding: {plan.binding}. {len(result.plateau)} plans are within {PLATEAU:.0%} of the fastest.",
    ]
    if planned.needed:
        lines.append(f"Without {' and '.join(planned.needed)} nothing fits.")
    for memory in p.memory:
        kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in by_kind(memory).items())
        where = f" of stage {memory.stage}" if len(p.memory) > 1 else ""
        lines.append(
            f"Memory{where} in GiB: {kinds}; sum {memory.total / GIB:.2f}, with the reserve {memory.needed:.2f}."
        )
    lines += ["", "Assumptions:", *(f"  {line}" for line in assumptions(planned))]
    return [*lines, f"Hash of the assumptions: {assumption_hash(planned)}"]


def page_data(planned: Planned, source: Source) -> dict[str, Any]:
    """See page.py."""
    plan, cluster, model = planned.result.chosen, planned.job.cluster, planned.model
    p, c = plan.prediction, plan.candidate
    usable = usable_bytes(cluster.gpu.memory_gib, cluster.gpus)
    bars = []
    per_stage = c.num_training_ranks // c.pp
    for memory in p.memory:
        ranks = _ranks(memory.stage, c.pp, per_stage)
        bars.append(
            {
                "ranks": f"{ranks}, stage {memory.stage}" if len(p.memory) > 1 else ranks,
                "kinds": by_kind(memory),
                "total": memory.total,
                "usable": usable,
                "capacity": cluster.gpu.memory_gib * GIB,
            }
        )
    return {
        "title": f"Plan: {name_of(c)}",
        "config": source.path,
        "cluster": cluster.name,
        "hash": assumption_hash(planned),
        "step_seconds": plan.seconds,
        "mfu": p.mfu,
        "summary": _summary(planned),
        "parts": {part: p.seconds.get(part, 0.0) for part in PARTS},
        "memory": bars,
        "layer": block_events(model.block_times(c)),
        "step": step_events(model.step_times(c)),
        "plans": _points(planned),
        "assumptions": assumptions(planned),
    }


def _ranks(stage: int, pp: int, per_stage: int) -> str:
    first = stage % pp * per_stage
    return f"rank {first}" if per_stage == 1 else f"ranks {first}-{first + per_stage - 1}"


def _summary(planned: Planned) -> list[list[str]]:
    plan, cluster = planned.result.chosen, planned.job.cluster
    p = plan.prediction
    return [
        ["seconds a step", f"{plan.seconds:.2f}"],
        ["MFU", f"{p.mfu:.1%}"],
        ["tokens a second", f"{p.tokens / plan.seconds:,.0f}"],
        [f"GiB of {cluster.gpu.memory_gib:.1f}", f"{p.fullest.needed:.1f}"],
        ["checkpointing", saved_by(plan.candidate)],
        ["binding", plan.binding],
    ]


def _points(planned: Planned) -> list[dict[str, Any]]:
    """The plans that were solved, and the chosen layout with less memory."""
    result = planned.result
    plateau = {id(plan) for plan in result.plateau}
    points = [
        _point(plan, plan is result.chosen, id(plan) in plateau, name_of(plan.candidate)) for plan in result.plans
    ]
    return points + [
        _point(plan, False, False, f"{name_of(plan.candidate)}; with less memory: {saved_by(plan.candidate)}")
        for plan in curve(planned)
    ]


def _point(plan: Plan, chosen: bool, in_plateau: bool, name: str) -> dict[str, Any]:
    return {
        "name": name if ";" in name else f"{name}; {saved_by(plan.candidate)}",
        "seconds": plan.seconds,
        "bytes": plan.prediction.fullest.total,
        "binding": plan.binding,
        "chosen": chosen,
        "in_plateau": in_plateau,
    }


def curve(planned: Planned) -> list[Plan]:
    """The chosen layout, solved for shares of the memory that its blocks may use."""
    model, chosen = planned.model, planned.result.chosen
    layout = model.layout(chosen.candidate, "offload" in planned.job.allow)
    plans: dict[Any, Plan] = {}
    held = sum(layout.held[kind] for kind in model.layers) / len(layout.stages)
    for share in CURVE:
        budgets = [replace(s, budget=held + share * (s.budget - held)) for s in layout.stages]
        found = assign(layout, budgets, model.layers)
        if found is not None:
            candidate = replace(chosen.candidate, ranges=found[0], split=found[1])
            plans[candidate] = Plan(candidate, model.predict(candidate), f"memory: {share:.0%} of it for the blocks")
    plans.pop(chosen.candidate, None)
    return list(plans.values())


def write(planned: Planned, source: Source, folder: Path, page: bool = True) -> list[Path]:
    """Write all files; returns their paths. ValueError: matplotlib is not installed, and a page is asked for."""
    data = page_data(planned, source)
    tables = plan_tables(
        source.with_overrides(planned.job.config), planned.result.chosen.candidate, len(planned.model.layers)
    )
    lines = {"one block": data["layer"], "one step": data["step"]}
    texts = {
        "plan.toml": write_toml(tables, comment(planned, source)),
        "plans.md": f"{headline(planned)}\n\n{to_markdown(planned.result)}",
        "plans.csv": to_csv(planned.result),
        "timeline.json": chrome_trace(lines) + "\n",
        "plan.json": json.dumps(data, indent=1) + "\n",
    }
    if page:
        texts["plan.html"] = build_page(data)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        atomic_write(folder / name, text)
    return [folder / name for name in texts]
