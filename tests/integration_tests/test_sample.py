"""`python -m titan_video.sample`: the clips of a checkpoint are those that validation made of the same weights."""

import numpy as np
import pytest

from tests.helpers import run_ranks


def run_sample(argv):
    import os

    from titan_video import sample

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # one process without a launcher
        del os.environ[name]
    sample.main([str(a) for a in argv])


def output_of_sample(argv):
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_sample(argv)
    return out.getvalue()


def decode(path):
    import av

    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def trained(shared_front):
    options = {
        "validation.enable": "true",
        "validation.num_videos": 1,
        "validation.sample_steps": 3,
        "validation.solver": "unipc",
        "validation.negative_prompt": "a yellow circle moves down",
        "validation.path": "embedded:shapes-12",
        "training.steps": 4,
        "checkpoint.interval": 2,
        "ema.decay": 0.5,
    }
    return shared_front.run("trained", options).ok()


def test_the_newest_checkpoint_gives_the_clip_of_the_last_validation(trained, tmp_path):
    (validated,) = (trained.folder / "samples" / "step-4").glob("*.mp4")
    prompt = validated.stem.partition("_")[2].replace("_", " ")
    run_ranks(run_sample, 1, [trained.folder, "--prompt", prompt, "--out", tmp_path / "a" / "x.mp4"], init=False)
    assert np.array_equal(decode(tmp_path / "a" / "x.mp4"), decode(validated))


def test_every_option_is_heard(trained, tmp_path):
    step = trained.folder / "checkpoint" / "step-2"
    base = [step, "--prompt", "a red circle moves left", "--out", tmp_path / "x.mp4"]
    seen = []
    for extra in (
        [],
        ["--seed", 1],
        ["--steps", 1],
        ["--guidance", 1],
        ["--shift", 9],
        ["--weights", "model"],
        ["--solver", "euler"],
        ["--negative-prompt", ""],
        ["--prompt", "a blue square moves up"],
    ):
        run_ranks(run_sample, 1, [*base, *extra], init=False)
        seen.append(decode(tmp_path / "x.mp4"))
    assert all(clip.shape == (9, 64, 64, 3) for clip in seen)
    assert not any(np.array_equal(seen[0], clip) for clip in seen[1:])
    run_ranks(run_sample, 1, [*base, "--size", "5x32x48", "--fps", 12], init=False)
    assert decode(tmp_path / "x.mp4").shape == (5, 32, 48, 3)


def test_a_prompt_that_is_cut_is_named(trained, tmp_path):
    prompts = ["a red circle moves left", f"a red circle {'and more ' * 7}moves left"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, prompts[1]]))
    options = ["--steps", 1, "--guidance", 1, "--out", tmp_path / "clips", "--prompts", tmp_path / "prompts.txt"]
    (output,) = run_ranks(output_of_sample, 1, [trained.folder, *options], init=False)
    assert output.count("is cut to encoder.max_text_length") == 1 == output.count("not read: 'and more moves left'")


def test_a_file_of_prompts_gives_a_clip_of_each(trained, tmp_path):
    """The first line's clip is that of --prompt alone; the model is loaded once."""
    prompts, one = ["a red circle moves left", "a blue square moves up"], tmp_path / "one.mp4"
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([prompts[0], "", prompts[1], ""]).encode())
    run_ranks(run_sample, 1, [trained.folder, "--prompt", prompts[0], "--out", one], init=False)
    argv = [trained.folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "clips"]
    run_ranks(run_sample, 1, argv, init=False)
    names = [f"{i}_{prompt.replace(' ', '_')}.mp4" for i, prompt in enumerate(prompts)]
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == names
    first, second = (decode(tmp_path / "clips" / name) for name in names)
    assert np.array_equal(first, decode(one)) and not np.array_equal(first, second)


@pytest.mark.parametrize("content, words", [(b"\xff", "UTF-8"), (b"\n \n", "no prompt"), (None, "No such file")])
def test_a_file_of_prompts_that_cannot_be_read_is_named(tmp_path, content, words):
    from titan_video.ingest.files.text import read_prompts

    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^--prompts: .*p.txt.*{words}"):
        read_prompts(tmp_path / "p.txt", "--prompts")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["{folder}/checkpoint/step-7"], "step-7"),
        (["{folder}/checkpoint"], "step-2, step-4"),
        (["/"], "config.toml"),
        (["{folder}", "--size", "16x64x64"], "4k+1"),
        (["{folder}", "--steps", "0"], "--steps"),
        (["{folder}", "--guidance", "0.5"], "--guidance"),
        (["{folder}", "--low-guidance", "3"], "--low"),
    ],
)
def test_mistakes_end_with_a_message(trained, tmp_path, argv, words):
    argv = [a.format(folder=trained.folder) for a in argv]
    with pytest.raises(AssertionError, match=f"SystemExit: error: .*{words}".replace("+", r"\+")):
        run_ranks(run_sample, 1, [*argv, "--prompt", "x", "--out", tmp_path / "x.mp4"], init=False)
    assert not (tmp_path / "x.mp4").exists()
