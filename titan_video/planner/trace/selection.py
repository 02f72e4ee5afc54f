"""Which results each choice of selective checkpointing saves, asked of its own policy while a block is traced."""

from typing import Any

from titan_video.distributed.activation_checkpoint import SACPolicy
from titan_video.planner.trace.recorder import CLIPS, LENGTH

SAVES = (  # what selective checkpointing is offered with
    ("attention",),
    ("attention", "down"),
    ("attention", "exchange"),
    ("attention", "down", "exchange"),
    ("attention", "matmul"),
    ("attention", "exchange", "matmul"),
    ("down",),
    ("matmul",),
)


class Selection:
    """Which results each choice of `save` saves, asked of the policies while a block's forward runs."""

    def __init__(self, save_min_kv: int, has_exchange: bool):
        self.found: dict[tuple[tuple[str, ...], bool], set[int]] = {}
        self.policies = {}
        for save in ((), *SAVES):  # with none, in mode full, what a router decided is saved all the same
            if "exchange" in save and not has_exchange:
                continue
            for is_long in (True, False):
                least = save_min_kv if is_long else 2 * LENGTH * CLIPS
                self.found[save, is_long] = set()
                self.policies[save, is_long] = SACPolicy(save, least).policy_fn()

    def listen(self, outer: int, func: Any, args: tuple) -> None:
        for key, must_save in self.policies.items():
            if must_save(func, args):
                self.found[key].add(outer)

    def result(self) -> dict[tuple[tuple[str, ...], bool], frozenset[int]]:
        return {key: frozenset(found) for key, found in self.found.items()}
