"""Hooks that make numbers wrong in a run, and note on every rank what became of the step.

A fault is keyed by the step of the data, which goes on after a rollback, and not by the optimizer's step.
"""

import json
import math
import os
import signal
import zlib
from contextlib import contextmanager

NAN = float("nan")


def data_step(trainer):
    """The number of steps that the data have given, from 1."""
    return trainer.loader.samples // (trainer.loader.samples - sum(trainer.loader.state_before["draws"]))


def state_digest(trainer):
    """A hash of all that an update changes on this rank: weights, optimizer state, EMA weights."""
    from titan_video.distributed.utils import to_local

    found = 0
    for owner in trainer.checkpoint.tensors.values():
        for _, x in sorted(owner.state_dict().items()):
            found = zlib.crc32(to_local(x).detach().float().cpu().contiguous().numpy(), found)
    return found


@contextmanager
def changed_loss(trainer, factor):
    """Inside, the loss of the first clip of each of this rank's micro-batches is `factor` times as high. So is its
    gradient, if the factor is finite."""
    task, original = trainer.task, trainer.task.loss

    def loss(*args):
        loss_B = original(*args).clone()
        loss_B[0] = loss_B[0] * factor if math.isfinite(factor) else loss_B[0] + factor
        return loss_B

    task.loss = loss
    try:
        yield
    finally:
        del task.loss


def change_gradient(trainer, factor):
    """One number of this rank's gradients becomes `factor`; if that is finite, all are multiplied by it."""
    from titan_video.distributed.utils import to_local

    gradients = [to_local(p.grad) for p in trainer.model.parameters() if p.grad is not None]
    if not math.isfinite(factor):
        next(g for g in gradients if g.numel()).view(-1)[0] = factor
    else:
        for g in gradients:
            g.mul_(factor)


def injected(faults, go_on=False, kill_at=0, signum=signal.SIGKILL):
    """A hook. faults: {step of the data: (rank, "loss" or "gradient", factor)}.

    Each rank writes a line for each step to noted<rank>.jsonl beside the metrics.
    go_on: an error that would end the run is noted, and the run goes on. kill_at: step of the data at whose end the
    process receives `signum`, once.
    """
    import train

    run_step, run_backward = train.Trainer.train_step, train.Trainer.forward_backward

    def forward_backward(self, *args, **kwargs):
        rank, kind, factor = faults.get(data_step(self), (-1, "", 1.0))
        if rank == self.rank and kind == "loss":
            with changed_loss(self, factor):
                return run_backward(self, *args, **kwargs)
        total = run_backward(self, *args, **kwargs)
        if rank == self.rank and kind == "gradient":
            change_gradient(self, factor)
        return total

    def train_step(self, *args):
        step, before, error = self.step, state_digest(self), ""
        try:
            run_step(self, *args)
        except FloatingPointError as e:
            error = str(e)
            if not go_on:
                raise
        finally:
            row = {
                "data_step": data_step(self),
                "step": step,
                "goes_on_from": self.step,
                "before": before,
                "after": state_digest(self),
                "error": error,
            }
            with open(self.folder / f"noted{self.rank}.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
        flag = self.folder / f"killed{self.rank}"
        if data_step(self) == kill_at and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signum)

    train.Trainer.forward_backward, train.Trainer.train_step = forward_backward, train_step


def noted(run, rank=0):
    """What `injected` wrote: the rows of one rank."""
    return [json.loads(line) for line in (run.folder / f"noted{rank}.jsonl").read_text().splitlines()]


def events(run):
    """The records of faults in metrics.jsonl."""
    rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [row["fault"] for row in rows if "fault" in row]


def flipped_bits(flips, seed=0):
    """A hook: in some steps one bit of one rank's gradient of one parameter flips, before it is summed over the ranks.

    flips: {step of the data: rank}. The error that names the rank is noted in flips<rank>.jsonl, and the run goes on.
    """
    import random

    import torch

    import train
    from titan_video.training.gradient_check import WORDS, own_parameters

    run_step, run_backward = train.Trainer.train_step, train.Trainer.forward_backward
    state = {"step": 0, "runs": 0}

    def flip(rng):
        def hook(grad):
            from titan_video.distributed.utils import to_local

            changed = grad.clone()
            words = to_local(changed).view(-1).view(WORDS[grad.element_size()])
            bit = rng.randrange(8 * grad.element_size() - 1)
            words[rng.randrange(words.numel())] ^= 1 << bit
            return changed

        return hook

    def forward_backward(self, *args, **kwargs):
        now = data_step(self)
        state["runs"] = state["runs"] + 1 if state["step"] == now else 1
        state["step"] = now
        parameters = own_parameters(self.model)
        if flips.get(now) != self.rank or not parameters or state["runs"] != 1 + now % 2:
            return run_backward(self, *args, **kwargs)
        rng = random.Random(f"{seed} {now}")
        name = rng.choice(sorted(parameters))
        handle = parameters[name].register_hook(flip(rng))
        try:
            return run_backward(self, *args, **kwargs)
        finally:
            handle.remove()
            with open(self.folder / "flipped.jsonl", "a") as f:
                f.write(json.dumps({"data_step": now, "rank": self.rank, "parameter": name}) + "\n")

    def train_step(self, *args):
        error = ""
        try:
            run_step(self, *args)
        except FloatingPointError as e:
            error = str(e)
            self.optimizer.zero_grad()
        with open(self.folder / f"flips{self.rank}.jsonl", "a") as f:
            f.write(json.dumps({"data_step": data_step(self), "error": error}) + "\n")

    torch.set_num_threads(1)
    train.Trainer.forward_backward, train.Trainer.train_step = forward_backward, train_step
