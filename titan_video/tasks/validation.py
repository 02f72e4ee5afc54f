"""Seeing what the model has learned: held-out loss by noise level, and clips sampled from prompts.

Every rank takes part and runs the model equally often, as sharded weights are gathered by all ranks together. Clips and
prompts are dealt out over the `batch` axis; a rank that has run out repeats one whose result is not counted. The other
axes share each clip's work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from titan_video.config.job_config import JobConfig, Validation
from titan_video.data.batch import Batch
from titan_video.data.latent_cache import CachedClip
from titan_video.data.loader import EntryReader
from titan_video.distributed.parallel_dims import Meshes
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import gather_objects, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import Patch
from titan_video.tasks.denoising import compute_loss
from titan_video.tasks.sampling import sample_latents
from titan_video.tools.video import write_mp4


@dataclass(frozen=True)
class Prompts:
    """Prompts and their embeddings, row by row; null: the empty prompt's, one row. On the host.

    cond, null_cond: what else the model is given (`Batch.cond`), one batch of one for each prompt, and what the empty
        prompt has instead.
    latent_CFHW: size of each clip to sample.
    """

    prompts: list[str]
    text_BLD: Tensor
    mask_BL: Tensor
    null_BLD: Tensor
    null_mask_BL: Tensor
    latent_CFHW: list[tuple[int, ...]]
    cond: list[dict[str, Tensor]]
    null_cond: dict[str, Tensor] = field(default_factory=dict)


def with_frames(reader: EntryReader, clips: Sequence[CachedClip], null_key: str) -> Prompts:
    """For image-to-video: the captions of clips, with these clips' frames and sizes. null_key:

    of the empty prompt's text.
    """
    batches = [reader.batch([clip], [0]) for clip in clips]
    text, mask = (torch.cat([getattr(b, name) for b in batches]) for name in ("text_BLD", "text_mask_BL"))
    sizes, cond = [tuple(b.streams["video"].shape[1:]) for b in batches], [b.cond for b in batches]
    return Prompts(
        [clip.caption for clip in clips], text, mask, *reader.text([null_key]), sizes, cond, reader.pooled([null_key])
    )


def with_size(
    reader: EntryReader, prompts: Sequence[str], keys: Sequence[str], null_key: str, latent_CFHW: tuple[int, ...]
) -> Prompts:
    """For text-to-video: prompts, by the keys of their texts, all of one size."""
    cond, sizes = [reader.pooled([key]) for key in keys], [latent_CFHW] * len(keys)
    return Prompts(list(prompts), *reader.text(keys), *reader.text([null_key]), sizes, cond, reader.pooled([null_key]))


def shard_indices(num_items: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """(item, whether it counts) for one rank; lists of all ranks are equally long and together count every item once."""
    rounds = -(-num_items // world_size)
    return [(min(i * world_size + rank, num_items - 1), i * world_size + rank < num_items) for i in range(rounds)]


class Validator:
    """Runs validation on the training model.

    num_clips, get_clip: the held-out clips as batches of one, on the host. decode: normalised latents [B, C, F, H, W]
    [B, 3, F, H, W]. conditions: what the model is given; guidance_scale: what models that take it were told in
    training.
    interval: the noise levels that are trained.
    """

    def __init__(
        self,
        section: Validation,
        model: nn.Module,
        patch: Patch,
        meshes: Meshes,
        shard: SequenceShard,
        device: torch.device,
        seed: int,
        num_clips: int,
        get_clip: Callable[[int], Batch],
        prompts: Prompts | None,
        decode: Callable[[Tensor], Tensor],
        fps: float,
        folder: Path,
        conditioning: ConditioningSpec,
        guidance_scale: float,
        interval: tuple[float, float],
    ):
        self.section, self.model, self.patch, self.mesh, self.device, self.seed = (
            section,
            model,
            patch,
            meshes.batch,
            device,
            seed,
        )
        self.shard, self.sequence_mesh = shard, meshes.sequence
        self.is_first = (
            meshes.sequence.get_local_rank() == 0 and meshes.pp.get_local_rank() == 0
        )  # of the ranks that share a clip
        self.num_clips, self.get_clip, self.prompts = num_clips, get_clip, prompts
        self.conditioning, self.guidance_scale, self.interval = conditioning, guidance_scale, interval
        self.decode, self.fps, self.folder = decode, fps, folder

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean squared error of the velocity on the held-out clips at each noise level, and their mean; {} if no clip
        is held out.

        The noise of (clip, level) is the same at every call and in every layout, so the numbers of one run can be
        compared.
        """
        if not self.num_clips:
            return {}
        low, high = self.interval
        sigmas = [low + (high - low) * share for share in self.section.timesteps]
        sums, counts = torch.zeros(len(sigmas), dtype=torch.float64), torch.zeros(len(sigmas), dtype=torch.float64)
        for index, num_loss_elements in shard_indices(self.num_clips, self.mesh.get_local_rank(), self.mesh.size()):
            batch = self.get_clip(index).to(self.device)
            for k, level in enumerate(sigmas):
                ids = torch.tensor([index * len(sigmas) + k])
                noise = draw_noise(
                    self.seed, ids, tuple(batch.streams["video"].shape[1:]), self.device, stream="validation"
                )
                one = torch.ones(1, device=self.device)
                told = self.conditioning, self.guidance_scale
                loss = (
                    compute_loss(self.model, self.patch, batch, noise, level * one, one, self.shard, *told).sum().item()
                )
                if num_loss_elements:
                    sums[k] += loss
                    counts[k] += self.conditioning.num_loss_elements(batch.streams["video"])
        sums = reduce_over(self.mesh, reduce_over(self.sequence_mesh, sums, "sum"), "sum")
        counts = reduce_over(self.mesh, counts, "sum")
        losses = {f"loss_t{level:g}": (s / c).item() for level, s, c in zip(sigmas, sums, counts, strict=True)}
        return losses | {"loss": sum(losses.values()) / len(losses)}

    def sample(self, step: int) -> list[tuple[str, Tensor]]:
        """Sample every prompt, write `step-N/K_prompt.mp4`, and return (prompt, uint8 frames [F, H, W, 3]) in order, on
        rank 0 at least.
        """
        if self.prompts is None:
            return []
        p, c, mine = self.prompts, self.section, []
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, num_loss_elements in shard_indices(len(p.prompts), self.mesh.get_local_rank(), self.mesh.size()):
            text, mask, null, null_mask = (
                x.to(self.device) for x in (p.text_BLD[index, None], p.mask_BL[index, None], p.null_BLD, p.null_mask_BL)
            )
            cond, null_cond = ({name: x.to(self.device) for name, x in d.items()} for d in (p.cond[index], p.null_cond))
            settings = c.sample_steps, c.guidance_scale, c.sample_shift
            latents = sample_latents(
                self.model,
                self.patch,
                text,
                mask,
                null,
                null_mask,
                p.latent_CFHW[index],
                [index],
                self.seed,
                *settings,
                shard=self.shard,
                conditioning=self.conditioning,
                cond=cond,
                null_cond=null_cond,
                embedded_guidance=c.embedded_guidance,
            )
            if num_loss_elements and self.is_first:
                frames = self.decode(latents)[0].permute(1, 2, 3, 0).cpu()
                write_mp4(folder / f"{index}_{file_name(p.prompts[index])}.mp4", frames.numpy(), self.fps)
                mine.append((index, frames))
        clips = sorted((x for clips in gather_objects(mine, self.mesh.get_group()) for x in clips), key=lambda x: x[0])
        return [(p.prompts[index], frames) for index, frames in clips]


def file_name(prompt: str) -> str:
    """A short file name made of a prompt's letters and digits."""
    words = "".join(ch if ch.isalnum() else " " for ch in prompt).split()
    return "_".join(words)[:60] or "empty"


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about validation, one line per mistake."""
    v = config.validation
    if not v.timesteps:
        yield "validation.timesteps: empty; give at least one sigma, such as [0.5]"
    if len(set(v.timesteps)) < len(v.timesteps):
        yield f"validation.timesteps: given {list(v.timesteps)}; remove what appears twice"
    if v.enable and not v.path and v.holdout == 0 and v.num_videos == 0:
        yield (
            "validation.enable: there is nothing to validate; set validation.path, validation.holdout above 0 or "
            "validation.num_videos above 0"
        )
