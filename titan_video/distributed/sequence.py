"""The tokens of a clip, spread over the `sequence` axis:

each rank has one contiguous slice of them from patchify to the loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_video.distributed.collectives import all_gather
from titan_video.models.layers import positions
from titan_video.models.spec import TokenShape

MAX_KEPT = 8  # sizes of clips whose positions are kept


class SequenceShard:
    """This rank's slice.

    Lengths that do not divide are padded with zeros at the end of the clip: every rank then has equally many rows, of
    which the first `num_valid` count. Attention leaves the padding out as keys, the loss as rows, so it changes
    nothing.
    """

    def __init__(self, sequence_mesh: DeviceMesh, tp_degree: int = 1):
        self.mesh, self.size, self.rank, self.tp = (
            sequence_mesh,
            sequence_mesh.size(),
            sequence_mesh.get_local_rank(),
            tp_degree,
        )
        self._positions: dict[tuple[TokenShape, torch.device], Tensor] = {}

    def length(self, seq_len: int) -> int:
        """Rows that each rank has, of `seq_len` tokens."""
        return -(-seq_len // self.size)

    def num_valid(self, seq_len: int) -> int:
        """How many of this rank's rows are tokens; the rest is padding."""
        length = self.length(seq_len)
        return min(max(seq_len - self.rank * length, 0), length)

    def slice(self, x: Tensor) -> Tensor:
        """Rows of this rank, of [B, seq_len, ...]."""
        return self._chunk(x, self.rank, 1)

    def slice_for_attention(self, pos_BL3: Tensor) -> Tensor:
        """Positions of the tokens that this rank's q and k projections give:

        under tensor parallel those of its whole group.
        """
        return self._chunk(pos_BL3, self.rank - self.rank % self.tp, self.tp)

    def positions(self, shape: TokenShape, device: torch.device) -> Tensor:
        """`slice_for_attention` of the positions of a clip's tokens.

        Kept, as the clips of a bucket share them and what is made of them.
        """
        if (shape, device) not in self._positions:
            if len(self._positions) == MAX_KEPT:
                del self._positions[next(iter(self._positions))]
            self._positions[shape, device] = self.slice_for_attention(positions(shape, device))
        return self._positions[shape, device]

    def gather(self, x: Tensor, seq_len: int) -> Tensor:
        """Inverse of `slice`: [B, seq_len, ...], on every rank of the axis. No gradient."""
        return x if self.size == 1 else all_gather(x.contiguous(), 1, self.mesh)[:, :seq_len]

    def _chunk(self, x: Tensor, first: int, count: int) -> Tensor:
        if self.size == 1:
            return x
        length = self.length(x.shape[1])
        rows = x[:, first * length : (first + count) * length]
        missing = count * length - rows.shape[1]
        return F.pad(rows, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else rows
