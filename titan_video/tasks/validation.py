"""Validation: held-out loss by noise level, and clips sampled from prompts.

Every rank takes part and runs the model equally often, as all ranks gather sharded weights together. Clips and prompts
are distributed over the `batch` axis; a rank without one left repeats another, whose result is not counted. The other
axes share each clip's work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_video.config.job_config import JobConfig, Validation
from titan_video.data.latent_cache import CachedClip
from titan_video.data.loader import EntryReader
from titan_video.distributed.parallel_dims import Meshes
from titan_video.distributed.utils import gather_objects, reduce_over
from titan_video.flow.noise import draw_noise
from titan_video.tasks.denoising import Denoising
from titan_video.tasks.sampling import Prompt, SamplerSettings, file_name, sample_latents
from titan_video.tasks.task import Evaluation
from titan_video.tools import heartbeat
from titan_video.tools.files import optional_write
from titan_video.tools.video import write_mp4


@dataclass(frozen=True)
class PromptSet:
    """Prompts to sample, on the host, with the size of each clip; null: the negative prompt."""

    texts: list[str]
    prompts: list[Prompt]
    null: Prompt
    latent_CFHW: list[tuple[int, ...]]


def build_prompts(reader: EntryReader, clips: Any, latent_CFHW: tuple[int, ...], negative: str) -> PromptSet | None:
    """What validation samples: for image-to-video the clips of the prompts, with their conditioning frames and sizes;
    else the prompts, at the size latent_CFHW. clips: ingest.prepare.Clips. negative: the negative prompt.
    """
    cache, texts = reader.cache, clips.prompts
    if not texts:
        return None
    null = _read_prompt(reader, cache.text_key(negative))
    if not cache.conditioning.num_cond_frames:
        prompts = [_read_prompt(reader, cache.text_key(text)) for text in texts]
        return PromptSet(texts, prompts, null, [latent_CFHW] * len(texts))
    batches = [reader.batch([clip], [0]) for clip in clips.of_prompts]
    prompts = [Prompt(b.text_BLD, b.text_mask_BL, b.cond) for b in batches]
    sizes = [tuple(b.streams["video"].shape[1:]) for b in batches]
    return PromptSet([clip.caption for clip in clips.of_prompts], prompts, null, sizes)


def _read_prompt(reader: EntryReader, key: str) -> Prompt:
    text_BLD, mask_BL = reader.text([key])
    return Prompt(text_BLD, mask_BL, reader.pooled([key]))


def shard_indices(num_items: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """(item, whether it counts) for one rank; the lists of all ranks are equally long and count every item once."""
    rounds = -(-num_items // world_size)
    return [(min(i * world_size + rank, num_items - 1), i * world_size + rank < num_items) for i in range(rounds)]


class Validator:
    """Evaluates a denoising task with the training model; `Denoising.evaluator`.

    model: the model or its pipeline. clips: held out; the reader reads each as a batch of one. prompts: to sample, or
    None. output: decodes and writes what is sampled.
    """

    def __init__(
        self,
        section: Validation,
        task: Denoising,
        model: Callable[..., Tensor],
        meshes: Meshes,
        clips: Sequence[CachedClip],
        prompts: PromptSet | None,
        reader: EntryReader,
        output: "ClipWriter",
    ):
        self.section, self.task, self.model = section, task, model
        self.batch_mesh, self.sequence_mesh = meshes.batch, meshes.sequence
        self.writes = meshes.sequence.get_local_rank() == 0 and meshes.pp.get_local_rank() == 0  # once for each clip
        self.clips, self.reader, self.prompts, self.output = clips, reader, prompts, output
        self.scores: Callable[[Validator], dict[str, float]] | None = None  # further numbers, after step 0

    def __call__(self, step: int) -> Evaluation:
        heartbeat.enter(f"validation of step {step}")
        scores = self.scores(self) if self.scores and step else {}
        return Evaluation(self.losses() | scores, self.sample(step), folder=str(self.output.step_folder(step)))

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean squared error of the velocity on the held-out clips by noise level, and the mean; {} without clips.
        Squared whatever training.loss is, so that runs can be compared.

        The noise of (clip, level) is the same at every call and in every layout: numbers are comparable.
        """
        if not self.clips:
            return {}
        task = self.task
        low, high = task.flow.interval
        sigmas = [low + (high - low) * share for share in self.section.timesteps]
        sums = torch.zeros(len(sigmas), dtype=torch.float64)
        counts = torch.zeros(len(sigmas), dtype=torch.float64)
        for index, is_counted in self._own_items(len(self.clips)):
            batch = self.reader.batch([self.clips[index]], [index]).to(task.device)
            shape = tuple(batch.streams["video"].shape[1:])
            for k, sigma in enumerate(sigmas):
                ids = torch.tensor([index * len(sigmas) + k])
                noise = draw_noise(task.seed, ids, shape, task.device, stream="validation")
                inputs = task.add_noise(batch, noise, sigma_B=sigma * torch.ones(1, device=task.device))
                loss = task.loss(self.model(**inputs.kwargs), inputs, penalty=torch.square).sum().item()
                if is_counted:
                    sums[k] += loss
                    counts[k] += task.num_loss_elements(batch)
        sums = reduce_over(self.batch_mesh, reduce_over(self.sequence_mesh, sums, "sum"), "sum")
        counts = reduce_over(self.batch_mesh, counts, "sum")
        losses = {f"loss_t{sigma:g}": (s / c).item() for sigma, s, c in zip(sigmas, sums, counts, strict=True)}
        return losses | {"loss": sum(losses.values()) / len(losses)}

    def sample(self, step: int) -> list[tuple[str, Tensor]]:
        """Sample every prompt and write its clip; return (prompt, frames [F, H, W, 3]) in order, on rank 0."""
        p, sampled = self.prompts, []
        if p is None:
            return []
        for index, is_counted in self._own_items(len(p.prompts)):
            latents = self.sample_latents(p.prompts[index], p.null, p.latent_CFHW[index], [index])
            if is_counted and self.writes:
                sampled.append((index, self.output.write(step, index, p.texts[index], latents)))
        gathered = [clip for clips in gather_objects(sampled, self.batch_mesh.get_group()) for clip in clips]
        return [(p.texts[index], frames) for index, frames in sorted(gathered, key=lambda clip: clip[0])]

    def sample_latents(self, prompt: Prompt, null: Prompt, latent_CFHW: tuple[int, ...], ids: Sequence[int]) -> Tensor:
        """Latents of a batch of clips, sampled as [validation] says. Arguments: see sampling.sample_latents."""
        c, task = self.section, self.task
        settings = SamplerSettings(
            num_steps=c.sample_steps,
            guidance_scale=c.guidance_scale,
            shift=c.sample_shift,
            embedded_guidance=c.embedded_guidance,
            seed=task.seed,
            solver=c.solver,
            param_dtype=task.param_dtype,
        )
        prompt, null = prompt.to(task.device), null.to(task.device)
        return sample_latents(self.model, task.args, prompt, null, latent_CFHW, ids, settings, task.shard)

    def _own_items(self, num_items: int) -> list[tuple[int, bool]]:
        return shard_indices(num_items, self.batch_mesh.get_local_rank(), self.batch_mesh.size())


@dataclass(frozen=True)
class ClipWriter:
    """Decodes sampled latents and writes them as mp4 files.

    decode: normalised latents [B, C, F, H, W] -> uint8 frames [B, 3, F, H, W].
    """

    decode: Callable[[Tensor], Tensor]
    folder: Path
    fps: float

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def write(self, step: int, index: int, prompt: str, latents_BCFHW: Tensor) -> Tensor:
        """Write `step-N/K_prompt.mp4` of a batch of one; return its frames, uint8 [F, H, W, 3], on the host.

        A file that cannot be written is a warning.
        """
        frames = self.decode(latents_BCFHW)[0].permute(1, 2, 3, 0).cpu()
        path = self.step_folder(step) / f"{index}_{file_name(prompt)}.mp4"
        with optional_write("sampled clips", path):
            write_mp4(path, frames.numpy(), self.fps, "sampled clip")
        return frames


def build_validator(
    section: Validation,
    task: Denoising,
    model: Callable[..., Tensor],
    meshes: Meshes,
    clips: Any,
    reader: EntryReader,
    latent_CFHW: tuple[int, ...],
    output: ClipWriter,
) -> Validator:
    """The validator of a run. section: with the model's own values (ingest.sampling_defaults). clips, latent_CFHW: see
    build_prompts.
    """
    prompts = build_prompts(reader, clips, latent_CFHW, section.negative_prompt)
    validator = Validator(section, task, model, meshes, clips.held_out, prompts, reader=reader, output=output)
    validator.scores = clips.scores
    return validator


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about validation, one line per mistake."""
    v = config.validation
    if 0 < v.guidance_scale < 1:
        yield f"validation.guidance_scale: given {v.guidance_scale:g}; legal: 0 (the model's own), 1 (off) and above"
    if not v.timesteps:
        yield "validation.timesteps: empty; give at least one sigma, such as [0.5]"
    if v.num_scored and not config.data.path.startswith("embedded:"):
        yield f"validation.num_scored: given {v.num_scored}, but only embedded:shapes can be scored; set it to 0"
    if len(set(v.timesteps)) < len(v.timesteps):
        yield f"validation.timesteps: given {list(v.timesteps)}; remove what appears twice"
    if v.enable and not v.path and v.holdout == 0 and v.num_videos == 0:
        yield (
            "validation.enable: there is nothing to validate; set validation.path, validation.holdout above 0 or "
            "validation.num_videos above 0"
        )
