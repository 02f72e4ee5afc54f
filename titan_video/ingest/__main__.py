"""The data commands: `python -m titan_video.data COMMAND --help` says what each does, its options, and an example."""

import argparse
import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from titan_video.checkpoint.files import list_steps
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import main_guard, parse_args
from titan_video.data.batching import Batching, Bucket, Work, batch_size_errors, gradient_accumulation
from titan_video.distributed.utils import broadcast_from_rank0, init_distributed
from titan_video.encoders import build_encoders
from titan_video.ingest.cache.encode_table import share_index
from titan_video.ingest.plan.build import Planner
from titan_video.ingest.plan.captions import with_cut_captions
from titan_video.ingest.plan.entries import Plan
from titan_video.ingest.plan.planned import ALL, Part, Tables, plan_on_ranks, probe_part, write_report
from titan_video.ingest.plan.report import decode_all, export, report
from titan_video.ingest.prepare import Preparation, open_run_cache, sampled_negatives
from titan_video.ingest.sampling_defaults import sampling_section
from titan_video.ingest.started import as_started
from titan_video.models import get_args, get_spec
from titan_video.models.layers import token_shape
from titan_video.tools.device import get_device
from titan_video.tools.files import writing
from titan_video.tools.parts import resolve

USAGE = """usage: python -m titan_video.data plan CONFIG.toml [--export N] [--ranks N] [--decode] [--part I/N] ...
       python -m titan_video.data encode CONFIG.toml [--part I/N] ...
       python -m titan_video.data import FILE.toml [OUT.toml]"""
HELP = {
    "": f"""{USAGE}

Look at the data of a run before it trains, or prepare it. CONFIG.toml is the TOML of the run.

  plan     what becomes of each clip: kept, trimmed, split, or dropped with the reason; nothing is encoded
  encode   the plan, then the latent cache: a run with the same [data], [encoder] and model starts at once
  import   the sections [data] and [training] for a data set TOML of diffusion-pipe or musubi-tuner

`python -m titan_video.data COMMAND --help` has the options of one; docs/data.md explains all.""",
    "plan": """usage: python -m titan_video.data plan CONFIG.toml [--export N] [--ranks N] [--decode] [--part I/N] ...

Examine every clip and say what becomes of it: buckets, what is dropped and why, what lies beside the clips and is not
read, captions that the text encoder cuts, micro-batches and their cost. Every clip is in DUMP_FOLDER/data_plan.jsonl.
Nothing is encoded, and no weights are read.

  CONFIG.toml              the TOML of the run
  --export N               write N training clips as mp4 to DUMP_FOLDER/plan_clips: what the encoder will see
  --ranks N                data-parallel ranks of the last table (default: 8, or the most that divide the step)
  --decode                 decode every clip, as encoding will, and drop damaged ones
  --part I/N               look at part I (from 0 on) of N of the files, and make no plan: for jobs on many machines;
                           the same command without it makes the plan. Under torchrun all ranks look at files
  --data.file FILE.toml    [data] and [training], as `import` writes them, above those of CONFIG.toml
  --section.field V        any option of train.py, above both: `python train.py --help` lists them

example: python -m titan_video.data plan train_configs/wan2.1_t2v_1.3b.toml --data.path my_clips --export 8""",
    "encode": """usage: python -m titan_video.data encode CONFIG.toml [--part I/N] [--section.field V]

Plan the clips and encode what the latent cache lacks, on all ranks. It can be stopped at any moment and goes on from
there; a run with the same [data], [encoder] and model finds everything in the cache (data.cache_folder).

  CONFIG.toml              the TOML of the run
  --part I/N               encode part I (from 0 on) of N of what is missing: for jobs on many machines
  --data.file FILE.toml    [data] and [training], as `import` writes them, above those of CONFIG.toml
  --section.field V        any option of train.py, above both: `python train.py --help` lists them

example: torchrun --nproc_per_node 8 -m titan_video.data encode train_configs/wan2.1_t2v_1.3b.toml --data.path A""",
    "import": """usage: python -m titan_video.data import FILE.toml [OUT.toml]

Print [data] and [training] for a data set TOML of diffusion-pipe ([[directory]]) or musubi-tuner ([[datasets]]), or
write them to OUT.toml. Every key is mapped, or named on stderr with what becomes of it: read these lines.

  FILE.toml                the data set TOML of the other trainer
  OUT.toml                 the file to write; pass it to any command with --data.file OUT.toml

example: python -m titan_video.data import dataset.toml data.toml
         ./run_train.sh --data.file data.toml""",
}


class DataCommand:
    """What `plan` and `encode` share: the configuration, the model's arguments, and the plan."""

    def __init__(self, config: JobConfig):
        self.config = config
        spec, model = get_spec(config.model.name), config.model
        self.args = get_args(spec, model.flavor, model.hf_assets_path, config.encoder.max_text_length)
        self.geometry = spec.geometry(self.args)
        self.folder = Path(config.job.dump_folder)
        self.cache_folder = Path(config.data.cache_folder or self.folder / "cache")
        # A resumed run reads from its own report which clips it once left out.
        is_run = bool(list_steps(self.folder / config.checkpoint.folder))
        self.plan_file = self.folder / ("data_plan.new.jsonl" if is_run else "data_plan.jsonl")

    def planner(self) -> Planner:
        stills = not self.args.conditioning.num_cond_frames
        return Planner.of(self.config.data, self.cache_folder, self.geometry.temporal_stride, stills=stills)

    def plan(self) -> Plan:
        """Make the plan of data.path with all ranks; the first one prints it and writes its report."""
        tables = Tables.of(self.cache_folder, self.folder)
        plan = plan_on_ranks(self.planner(), self.config.data.num_workers, tables)

        def show() -> Plan:
            plan.require_clips()
            shown = self._with_cut_captions(plan)
            write_report(shown, self.plan_file, plan.entries.key)
            print(f"{shown.summary()}\n  every clip: {self.plan_file}")
            return shown

        return broadcast_from_rank0(show)

    def probe(self, part: Part) -> None:
        """Look at one part of the clips. A plan of all finds what was seen."""
        count = probe_part(self.planner(), self.config.data.num_workers, part)
        print(f"{count} files are looked at in part {part.index} of {part.count}; `plan` without --part makes the plan")

    def _with_cut_captions(self, plan: Plan) -> Plan:
        """The tokenizer of the encoders decides; a plan can also be made where these are not there."""
        config = self.config
        try:
            encoders = build_encoders(config.encoder, config.model.hf_assets_path, "cpu")
            return with_cut_captions(plan, encoders)
        except (ValueError, ImportError) as e:
            return replace(plan, remarks=(*plan.remarks, f"the length of captions is not checked: {e}"))

    def work(self, bucket: Bucket) -> Work:
        tokens = token_shape(self.geometry.latent_shape(bucket)[1:], self.args.patch).num_tokens
        return Work(tokens, self.args.flops(tokens))

    def show(self, ranks: int, num_exported: int, decode: bool) -> None:
        """Print the plan and its report for training on `ranks` data-parallel ranks (0: 8, or the most below that among
        which a step can be divided).
        """
        config, plan = self.config, self.plan()
        if dist.get_rank() > 0:
            return
        if decode:
            plan = self._decode_all(plan)
        ranks = ranks or next((n for n in (8, 4, 2) if not any(batch_size_errors(config, n))), 1)
        micro_batches = gradient_accumulation(config, ranks) * ranks
        batching = Batching.of(config.data, config.training, config.parallelism, micro_batches)
        text_bytes = self.args.text_len * self.args.text_dim * (2 if config.encoder.dtype == "bfloat16" else 4)
        print(report(plan, batching, ranks, self.work, self.geometry.latent_shape, text_bytes, seed=config.debug.seed))
        for path in export(plan, num_exported, self.folder / "plan_clips"):
            print(f"  written: {path}")

    def _decode_all(self, plan: Plan) -> Plan:
        frames, start = sum(e.bucket[0] for e in plan.entries if e.kept), time.perf_counter()
        plan = decode_all(plan, self.config.data.num_workers)
        plan.write_jsonl(self.plan_file)
        rate = frames / (time.perf_counter() - start)
        print(f"after decoding every clip, {rate:,.0f} frames a second:\n{plan.summary()}")
        plan.require_clips()
        return plan

    def encode(self, part: Part) -> None:
        """Fill the latent cache with all ranks. A later run with the same [data], [encoder] and model finds everything
        there. part: of what is missing.
        """
        config, plan = self.config, self.plan()
        device = get_device(int(os.environ.get("LOCAL_RANK", 0)))
        encoders = build_encoders(config.encoder, config.model.hf_assets_path, device)
        cache = open_run_cache(config, encoders, self.args.conditioning, None)
        ready = Preparation.of(config, self.args, encoders, cache, None)
        texts = sampled_negatives(sampling_section(config, self.args, config.data.sizes[0]))
        planned = ready.encode(broadcast_from_rank0(lambda: ready.planned(plan)), self.plan_file, texts, part)
        if part.count == 1 and "encode_seconds" not in planned.counts and os.access(cache.folder, os.W_OK):
            share_index(cache, None)  # parts may have encoded all, and listed nothing
        if dist.get_rank() == 0:
            print(f"{len(planned.clips)} clips in {self.cache_folder}")


def import_toml(file: str, out: str = "") -> None:
    """Print our TOML for another trainer's, or write it to `out`. What differs is printed to stderr."""
    import_file = resolve("titan_video.ingest.importers:import_file", asked_by="import")
    text, lines = import_file(file)
    if lines:
        print("\n  ".join([f"{file}: what is not as it was there:", *lines]), file=sys.stderr)
    if not out:
        print(text, end="")
        return
    with writing("configuration", out, len(text.encode())):
        Path(out).write_text(text, encoding="utf-8")


def command_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `plan` and `encode` that are none of the configuration, and the remaining arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=USAGE)
    parser.add_argument("--part", type=part_of, default=None)
    if argv[0] == "plan":
        parser.add_argument("--export", type=int, default=0)
        parser.add_argument("--ranks", type=int, default=0)
        parser.add_argument("--decode", action="store_true")
    return parser.parse_known_args(argv[2:])


def part_of(text: str) -> Part:
    """I/N. ArgumentTypeError: it is none."""
    index, _, count = text.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"given {text}; legal: I/N, part I of N, such as 0/16 to 15/16")
    return Part(int(index), int(count))


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(HELP[argv[0] if argv[0] in HELP else ""])
        return
    if len(argv) < 2 or argv[0] not in ("plan", "encode", "import") or argv[1].startswith("--"):
        sys.exit(USAGE)
    if argv[0] == "import":
        if len(argv) > 3:
            sys.exit(f"error: {' '.join(argv[3:])}: import takes one file, and the name of one to write\n{USAGE}")
        with main_guard():
            return import_toml(*argv[1:])
    who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    logging.basicConfig(level=logging.INFO, format=f"{who}%(message)s")
    options, overrides = command_options(argv)
    with main_guard():
        command = DataCommand(as_started(parse_args(["--job.config_file", argv[1], *overrides])))
        init_distributed(torch.device("cpu"), timeout_seconds=24 * 3600)  # an idle rank waits for the others' encoding
        try:
            if argv[0] == "encode":
                command.encode(options.part or ALL)
            elif options.part:
                command.probe(options.part)
            else:
                command.show(options.ranks, options.export, options.decode)
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
