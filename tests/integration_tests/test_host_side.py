"""Where the host waits for the device in a training step: once, at its end, for the numbers that are logged."""

import json
from functools import partial

import pytest

SYNCHRONISING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


def watch_reads(path):
    """A hook: what is read of tensors of numbers or truth values in each step goes to `path`, as [step, method, where].
    Counts and ids, which are integers, are on the host by nature."""
    import sys

    import torch

    import train

    seen, current = [], []
    run_step = train.Trainer.train_step

    def watched(name):
        original = getattr(torch.Tensor, name)

        def method(self, *args, **kwargs):
            if current and (self.dtype.is_floating_point or self.dtype == torch.bool):
                frame = sys._getframe(1)
                seen.append([current[0], name, f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"])
            return original(self, *args, **kwargs)

        return method

    for name in SYNCHRONISING:
        setattr(torch.Tensor, name, watched(name))

    def train_step(self, *args):
        current.append(self.step)
        run_step(self, *args)
        current.clear()
        path.write_text(json.dumps(seen))

    train.Trainer.train_step = train_step


@pytest.mark.parametrize(
    "options",
    [
        {"training.mixed_precision_param": "bfloat16", "training.global_batch_size": 4, "ema.enable": "true"},
        {"optimizer.implementation": "foreach"},
    ],
    ids=["fused", "foreach"],
)
def test_a_step_reads_its_numbers_once(front, tmp_path, options):
    front.run(
        "run",
        {"training.steps": 3, "checkpoint.enable": "false", **options},
        hook=partial(watch_reads, tmp_path / "reads"),
    ).ok()
    reads = json.loads((tmp_path / "reads").read_text())
    # In the first step constants are made; how many steps there were, torch's optimizers count on the host.
    last = [read[1:] for read in reads if read[0] == 3 and read[2] != "optimizer.py:_get_value"]
    decided_on_the_host = [["__bool__", "fault_tolerance.py:update"]] if "optimizer.implementation" in options else []
    assert last == [*decided_on_the_host, ["tolist", "device.py:read"]]
