"""Time lines of one block and of one step, from a plan's seconds: for the page, and as a Chrome trace.

    event = {"lane", "name", "start", "seconds"}

A block computes while the next block's weights arrive and the last one's gradients leave; what is longer than the
computing beside it makes compute wait. A step is its micro-batches, one after the other or through the stages of a
pipeline, and the update.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]
COMPUTED = ("products", "attention", "memory-bound")
BESIDE = ("all-to-all", "ring", "tensor parallel", "expert parallel")  # lanes of what a block itself sends
MAX_DRAWN = 6  # micro-batches of a step that are drawn one by one


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one block for one micro-batch.

    forward, backward: by part (candidate.PARTS). recompute: at the beginning of its backward. gather: of its weights,
    in each of forward and (with resharding) backward. reduce: of its gradients.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    recompute: float = 0.0
    gather: float = 0.0
    gather_again: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step. forward, backward: of each stage for one micro-batch, recomputation and waits included.

    before, after: by name, in order: what precedes the micro-batches, and what follows them.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    microbatches: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    schedule: str = "1F1B"


def block_events(times: BlockTimes) -> list[Event]:
    """Forward and backward of a block in the middle of the model."""
    events: list[Event] = []
    end = _pass(events, 0.0, times.forward, "forward", beside={"gather": times.gather})
    start = end
    if times.recompute:
        events.append(_event("compute", "recompute", start, times.recompute))
    beside = {"gather": times.gather_again, "reduce": times.reduce}
    _pass(events, start, times.backward, "backward", beside, first=times.recompute)
    return events


def _pass(
    events: list[Event], start: float, parts: dict[str, float], name: str, beside: dict[str, float], first: float = 0.0
) -> float:
    """One direction from `start`, after `first` seconds of other compute. Returns its end."""
    now = start + first
    sent = {part: parts.get(part, 0.0) for part in BESIDE}
    computed = {part: parts.get(part, 0.0) for part in COMPUTED}

    def add(lane: str, text: str, seconds: float) -> None:
        nonlocal now
        if seconds > 0:
            events.append(_event(lane, text, now, seconds))
            now += seconds

    # Half the products are before attention and half after it, and so is what is exchanged. Norms are `memory-bound`.
    add("tensor parallel", name, sent["tensor parallel"] / 2)
    add("compute", "products", computed["products"] / 2)
    add("compute", "norms", computed["memory-bound"] / 2)
    add("all-to-all", name, sent["all-to-all"] / 2)
    add("compute", "attention", computed["attention"])
    add("ring", name, sent["ring"])
    add("all-to-all", name, sent["all-to-all"] / 2)
    add("expert parallel", name, sent["expert parallel"] / 2)
    add("compute", "products", computed["products"] / 2)
    add("compute", "norms", computed["memory-bound"] / 2)
    add("expert parallel", name, sent["expert parallel"] / 2)
    add("tensor parallel", name, sent["tensor parallel"] / 2)
    other = sum(seconds for part, seconds in parts.items() if part not in (*COMPUTED, *BESIDE))
    add("host", name, other)
    # Both use the same links: one after the other.
    sending = start
    for lane, seconds in beside.items():
        if seconds > 0:
            what = "weights of the next block" if lane == "gather" else "gradients of the last block"
            events.append(_event(lane, what, sending, seconds))
            sending += seconds
    return max(now, sending)


def step_events(times: StepTimes) -> list[Event]:
    """A step; of many micro-batches without a pipeline, those in the middle are one event."""
    events: list[Event] = []
    now = 0.0
    for name, seconds in times.before.items():
        if seconds > 0:
            events.append(_event("host", name, now, seconds))
            now += seconds
    now = _pipeline(events, times, now) if len(times.forward) > 1 else _accumulation(events, times, now)
    for name, seconds in times.after.items():
        if seconds > 0:
            lane = "update" if name == "optimizer" else "reduce" if "reduce" in name else "host"
            events.append(_event(lane, name, now, seconds))
            now += seconds
    return events


def _accumulation(events: list[Event], times: StepTimes, now: float) -> float:
    forward, backward, number = times.forward[0], times.backward[0], times.microbatches
    drawn = number if number <= MAX_DRAWN else MAX_DRAWN - 1
    for i in range(drawn):
        if i == drawn - 1 and drawn < number:
            left = (number - drawn) * (forward + backward)
            events.append(_event("compute", f"{number - drawn} more micro-batches", now, left))
            now += left
        events.append(_event("compute", "forward", now, forward))
        events.append(_event("compute", "backward", now + forward, backward))
        now += forward + backward
    return now


def _pipeline(events: list[Event], times: StepTimes, start: float) -> float:
    """1F1B, or the interleaved form of it, by list scheduling: backward first, and forwards while few are in flight."""
    num_stages, number = len(times.forward), times.microbatches
    ranks = num_stages if not times.schedule.startswith("Interleaved") else num_stages // 2
    free, done = [start] * ranks, {}  # done[stage, micro-batch, is_backward]: the end
    begun = {(s, False): 0 for s in range(num_stages)} | {(s, True): 0 for s in range(num_stages)}
    for _ in range(2 * num_stages * number):
        time, stage, is_backward = min(_ready(times, begun, done, free, ranks, start))
        i = begun[stage, is_backward]
        seconds = (times.backward if is_backward else times.forward)[stage]
        events.append(_event(f"stage {stage:>2}", f"{'B' if is_backward else 'F'}{i}", time, seconds))
        free[stage % ranks] = done[stage, i, is_backward] = time + seconds
        begun[stage, is_backward] += 1
    return max(free)


def _ready(times: StepTimes, begun: dict, done: dict, free: list[float], ranks: int, start: float) -> Any:
    """(earliest start, stage, is_backward) of each stage's next forward and backward; a backward wins a tie."""
    last = len(times.forward) - 1
    for stage in range(last + 1):
        i = begun[stage, True]
        before = done.get((stage + 1, i, True)) if stage < last else done.get((stage, i, False))
        if before is not None and i < times.microbatches and (stage, i, False) in done:
            yield max(free[stage % ranks], before), stage, True
        i = begun[stage, False]
        before = done.get((stage - 1, i, False)) if stage else start
        in_flight = i - begun[stage, True]
        if before is not None and i < times.microbatches and in_flight < last + 1 - stage:
            yield max(free[stage % ranks], before) + 1e-12, stage, False


def _event(lane: str, name: str, start: float, seconds: float) -> Event:
    return {"lane": lane, "name": name, "start": start, "seconds": seconds}


def chrome_trace(lines: dict[str, list[Event]]) -> str:
    """A trace for chrome://tracing or Perfetto: a process for each time line {title: events}, a thread for a lane."""
    rows: list[dict[str, Any]] = []
    for process, (title, events) in enumerate(lines.items(), start=1):
        rows.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        lanes = list(dict.fromkeys(event["lane"] for event in events))
        for thread, lane in enumerate(lanes, start=1):
            rows.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": lane}})
        for event in events:
            times = {"ts": event["start"] * 1e6, "dur": event["seconds"] * 1e6}  # microseconds
            thread = lanes.index(event["lane"]) + 1
            rows.append(
                {"ph": "X", "name": event["name"], "pid": process, "tid": thread, "cat": event["lane"], **times}
            )
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})
