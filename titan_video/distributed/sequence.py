"""The tokens of a clip, sharded over the `sequence` axis: a contiguous slice per rank, from patchify to the loss."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_video.distributed.collectives import all_gather, rank_group
from titan_video.distributed.parallel_dims import Meshes
from titan_video.models.layers import positions
from titan_video.models.spec import RankGroup, StepLayout, TokenShape

MAX_CACHED = 8  # clip sizes whose positions are cached


@dataclass(frozen=True)
class SequenceShard:
    """One rank's slice of a micro-batch's tokens, and the groups that share the clip.

    A length that the ranks do not divide is padded with zeros at the end of the clip: all ranks then have equally many
    rows; the first `num_valid` are tokens. Attention ignores padding among the keys, the loss among the rows.
    sequence: the ranks that share a clip, ring first, then ulysses, then tensor parallel (tp_degree).
    """

    sequence: RankGroup
    ring: RankGroup
    ulysses: RankGroup
    tp_degree: int = 1
    _positions: dict[tuple[TokenShape, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_meshes(cls, meshes: Meshes) -> "SequenceShard":
        """The static layout of a run, the same for all its micro-batches."""
        ring, ulysses = rank_group(meshes.ring), rank_group(meshes.ulysses)
        return cls(rank_group(meshes.sequence), ring=ring, ulysses=ulysses, tp_degree=meshes.tp.size())

    @property
    def size(self) -> int:
        return self.sequence.size

    def layout(self, seq_len: int) -> StepLayout | None:
        """What the blocks need to know for clips of seq_len tokens; None where this rank has all of them.

        None leaves a block the groups with which the model was built: a model of several sizes of group is always
        given a StepLayout.
        """
        if self.size == 1:
            return None
        return StepLayout(seq_len, ring=self.ring, ulysses=self.ulysses, sequence=self.sequence)

    def length(self, seq_len: int) -> int:
        """Rows that each rank has of seq_len tokens, padding included."""
        return -(-seq_len // self.size)

    def num_valid(self, seq_len: int) -> int:
        """How many of this rank's rows are tokens; the rest is padding."""
        length = self.length(seq_len)
        return min(max(seq_len - self.sequence.rank * length, 0), length)

    def slice(self, x: Tensor) -> Tensor:
        """This rank's rows of [B, seq_len, ...]."""
        return self._chunk(x, self.sequence.rank, 1)

    def slice_for_attention(self, pos_BL3: Tensor) -> Tensor:
        """Positions of the tokens that this rank's q and k have: under tensor parallel those of its whole group."""
        return self._chunk(pos_BL3, self.sequence.rank - self.sequence.rank % self.tp_degree, self.tp_degree)

    def positions(self, shape: TokenShape, device: torch.device) -> Tensor:
        """`slice_for_attention` of the positions of a clip's tokens.

        Cached: the clips of a bucket share the tensor, and so the RoPE frequencies computed from it.
        """
        if (shape, device) not in self._positions:
            if len(self._positions) == MAX_CACHED:
                del self._positions[next(iter(self._positions))]
            self._positions[shape, device] = self.slice_for_attention(positions(shape, device))
        return self._positions[shape, device]

    def gather(self, x: Tensor, seq_len: int) -> Tensor:
        """Inverse of `slice`: [B, seq_len, ...], on every rank of the axis. Without gradient."""
        return x if self.size == 1 else all_gather(x.contiguous(), 1, self.sequence)[:, :seq_len]

    def _chunk(self, x: Tensor, first: int, count: int) -> Tensor:
        if self.size == 1:
            return x
        length = self.length(x.shape[1])
        rows = x[:, first * length : (first + count) * length]
        missing = count * length - rows.shape[1]
        return F.pad(rows, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else rows


def whole_sequence() -> SequenceShard:
    """The shard of a process that has all tokens."""
    alone = RankGroup(name="", rank=0, size=1)
    return SequenceShard(alone, ring=alone, ulysses=alone)
