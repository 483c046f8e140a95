"""`armillary generate` as it is used: scripts with switches and cuts, given frames, a person at the keyboard."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from backbones.history import SinkWindow
from benchmarks.measure import LiveBytes
from framework.adapters import EXPORTED, LoRA, save_for_diffusers
from framework.cli import main
from framework.commands.generate import BlockNoise, generate
from framework.commands.interactive import Lines, converse
from framework.data.given_frames import given_latents, read_frames, whole_blocks
from framework.data.script import Cue, Script
from framework.film import film, scripted
from framework.kernels import Consistency
from framework.reporting.videos import write_mp4
from framework.rollout import noise_shape
from framework.schedules import FewStepSchedule
from tests.backbones.tiny_stack import lora_lines, save_stack, stack_lines, tiny_wan_generator
from tests.support import PROMPTS, perturb, tiny_generator

A, B, C = PROMPTS[:3]
EMBEDDED = ["generate", "--gin_file", "embedded/generate.gin"]


def frames_of(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(0, 3, 1, 2)


def made(folder: Path, **options) -> list[Tensor]:
    """The videos of `generate` on a fresh tiny generator."""
    return [frames_of(path) for path in generate(generator=tiny_generator(), output_dir=str(folder), **options)]


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of a refused command."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert code != 0 and len(lines) == 1 and "Traceback" not in out + err, err
    return lines[0]


# Scripts


def test_several_prompts_make_a_video_each_and_speed_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*EMBEDDED, "--output_dir", str(tmp_path / "v"), "--blocks", "8", "--prompt", A]
    assert main([*arguments, "--prompt", f"{A} [1s] | {B} [1s] | # {C}"]) == 0
    out = capsys.readouterr().out
    assert "latency of a block: median" in out and "p95" in out and "first frame after" in out
    assert "48 frames in" in out and "frames per second (2 streams" in out
    assert [len(frames_of(path)) for path in sorted((tmp_path / "v").glob("*.mp4"))] == [24, 24]


def test_equal_seeds_make_equal_files_alone_and_in_batches(tmp_path: Path):
    prompts = [A, f"{A} | # {B}", C, f"{C} | # {A}"]
    together = made(tmp_path / "a", prompts=prompts, blocks=4)
    assert all(
        torch.equal(*pair) for pair in zip(together, made(tmp_path / "b", prompts=prompts, blocks=4), strict=True)
    )
    alone = made(tmp_path / "c", prompts=prompts, blocks=4, clips_per_batch=1)
    for one, other in zip(together, alone, strict=True):
        assert (one.int() - other.int()).abs().float().mean() < 1  # other roundings, and what the codec makes of them
    assert not torch.equal(made(tmp_path / "d", prompts=prompts[:1], blocks=4, seed=1)[0], together[0])


def test_switch_frames_say_when_lists_without_lengths_switch(tmp_path: Path):
    listed = made(tmp_path / "a", prompts=[f"{A} | {B}"], blocks=4, switch_frames=(3,))
    written = made(tmp_path / "b", prompts=[f"{A} [3f] | {B}"], blocks=4)
    shared = made(tmp_path / "c", prompts=[f"{A} | {B}"], blocks=4)
    assert torch.equal(listed[0], written[0]) and not torch.equal(listed[0], shared[0])


@pytest.mark.parametrize(("text", "start", "blocks"), [(f"{A} [3s] | {B}", 24, 9), (f"{A} [22f] | # {B}", 24, 9)])
def test_a_prompt_that_the_video_is_too_short_to_show_is_refused(
    text: str, start: int, blocks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = refusal(capsys, main([*EMBEDDED, "--output_dir", str(tmp_path / "v"), "--prompt", text]))
    assert f"{B!r} would start at latent frame {start}" in line and f"give --blocks {blocks} or more" in line
    assert not (tmp_path / "v").exists()
    assert len(made(tmp_path / "v", prompts=[f"{A} [{start}f] | {B}"], blocks=blocks)) == 1


def test_a_prompt_that_the_generator_cannot_read_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = refusal(capsys, main([*EMBEDDED, "--output_dir", str(tmp_path / "v"), "--prompt", "a pink elephant"]))
    assert "a pink elephant" in line and not (tmp_path / "v").exists()


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"clips_per_batch": 0}, {"scale": 0}])
def test_nothing_of_nothing_is_refused(wrong: dict[str, int], tmp_path: Path):
    with pytest.raises(ValueError, match=f"generate.{next(iter(wrong))} must be at least 1"):
        made(tmp_path / "v", prompts=[A], **wrong)


# Adapters


def test_an_adapter_is_taken_from_a_run_its_folder_or_exported_weights(tmp_path: Path):
    trained = tiny_generator()
    LoRA(rank=2).attach(trained.network, 0)
    perturb(trained.network, 1)
    tiny = tiny_generator()
    with torch.no_grad():  # the adapter alone was moved
        for name, parameter in trained.network.named_parameters():
            if ".lora_" not in name:
                parameter.copy_(tiny.network.get_parameter(name.replace(".base_layer", "")))
    run = tmp_path / "run"
    LoRA(rank=2).save(trained.network, run / "adapter")
    exported = tmp_path / "exported" / EXPORTED
    exported.parent.mkdir()
    save_for_diffusers(trained.network, exported)
    wanted = made(tmp_path / "v0", prompts=[A], blocks=2, adapter=str(run))
    assert not torch.equal(wanted[0], made(tmp_path / "v1", prompts=[A], blocks=2)[0])
    for i, place in enumerate((run / "adapter", exported, exported.parent)):
        assert torch.equal(made(tmp_path / f"w{i}", prompts=[A], blocks=2, adapter=str(place))[0], wanted[0]), place


# Given frames


def lossless(path: Path, frames: Tensor, fps: float = 8.0) -> None:
    """An mp4 that holds exactly these frames, but for the rounding of its colours."""
    write_mp4(path, frames, fps, crf=0)


def test_a_video_goes_on_from_a_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (whole,) = made(tmp_path / "a", prompts=[A], blocks=5, scale=1)
    lossless(tmp_path / "given.mp4", whole[:6])
    (further,) = made(tmp_path / "b", prompts=[A], blocks=5, scale=1, image=str(tmp_path / "given.mp4"))
    assert len(further) == 15
    distance = (further.int() - whole.int()).abs().float().mean((1, 2, 3))
    assert distance[:6].max() < 10 < 30 < (further[:6].int() - whole[6:12].int()).abs().float().mean()  # codec
    (short,) = generate(generator=tiny_generator(), output_dir=str(tmp_path / "s"), prompts=[A], blocks=2)
    assert frames_of(short).shape[-1] == 64  # enlarged to be looked at, and read at its own size
    (longer,) = made(tmp_path / "l", prompts=[A], blocks=5, scale=1, image=str(short))
    assert (longer[:6].int() - whole[:6].int()).abs().float().mean() < 10
    lossless(tmp_path / "slow.mp4", whole[:6], 4.0)
    made(tmp_path / "c", prompts=[A], blocks=5, image=str(tmp_path / "slow.mp4"))
    assert "has 4 frames per second, the video 8" in capsys.readouterr().out


def test_given_pixels_become_the_latents_that_decode_to_them():
    generator = tiny_generator()
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latents = given_latents(generator, pixels, "x", "cpu")
    assert latents.shape == (1, 3, 6, 16, 16)
    assert torch.equal(((generator.decode(latents)[0] + 1) * 127.5).round().to(torch.uint8), pixels)


def test_a_picture_is_one_frame_in_its_own_colours_and_turned_upright(tmp_path: Path):
    pixels = np.arange(3 * 8 * 4, dtype=np.uint8).reshape(8, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    frames, fps = read_frames(tmp_path / "a.png")
    assert fps is None and torch.equal(frames[0], torch.from_numpy(pixels).permute(2, 0, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    Image.fromarray(pixels).save(tmp_path / "b.jpg", exif=exif)
    assert read_frames(tmp_path / "b.jpg")[0].shape == (1, 3, 4, 8)
    Image.fromarray(pixels).convert("P").save(tmp_path / "c.png")
    assert read_frames(tmp_path / "c.png")[0].shape == (1, 3, 8, 4)


def test_frames_of_whole_blocks_are_counted_as_the_decoder_does():
    recipe = tiny_generator().recipe
    assert [whole_blocks(recipe, n) for n in (1, 3, 4, 6, 8)] == [(3,), (3,), (3, 6), (6,), (6, 9)]
    real = replace(recipe, temporal_stride=4)
    assert [whole_blocks(real, n) for n in (1, 9, 12, 21)] == [(9,), (9,), (9, 21), (21,)]


@pytest.mark.parametrize(
    ("file", "more", "said"),
    [
        ("nowhere.png", [], ["nowhere.png", "is not a file"]),
        ("broken.png", [], ["broken.png", "cannot be read"]),
        ("broken.mp4", [], ["broken.mp4", "cannot be read"]),
        ("large.png", [], ["32x16 pixels", "16x16", "crop or scale it to 16x16"]),
        ("one.png", [], ["has 1 frames", "continues 3 frames", "a single picture needs a frame-wise recipe"]),
        ("four.mp4", [], ["has 4 frames", "continues 3 or 6 frames"]),
        ("six.mp4", ["--blocks", "2"], ["fills 2 blocks", "raise --blocks"]),
        ("six.mp4", ["--blocks", "4", "--prompt", f"{A} [3f] | # {B}"], ["a cut falls into the 6 latent frames"]),
    ],
)
def test_frames_that_cannot_be_continued_are_refused_in_one_line(
    file: str, more: Sequence[str], said: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    clip = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"no picture")
    Image.new("RGB", (32, 16)).save(tmp_path / "large.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    lossless(tmp_path / "six.mp4", clip)
    lossless(tmp_path / "four.mp4", clip[:4])
    arguments = [*EMBEDDED, "--output_dir", str(tmp_path / "v"), "--image", str(tmp_path / file), "--prompt", A, *more]
    line = refusal(capsys, main(arguments))
    assert all(words in line for words in said), line
    assert not (tmp_path / "v").exists()


# A person at the keyboard


class Typed(io.StringIO):
    """A standard input whose lines come when the stream has made so many blocks: [(blocks, line), …]."""

    def __init__(self, lines: Sequence[tuple[int, str]]) -> None:
        super().__init__()
        self.lines, self.blocks, self.moved = list(lines), 0, threading.Condition()
        self.read: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for block, line in self.lines:
            with self.moved:
                assert self.moved.wait_for(lambda block=block: self.blocks >= block, timeout=20)
            self.read.append(line)
            yield line + "\n"

    def count(self, blocks: int) -> None:
        with self.moved:
            self.blocks = blocks
            self.moved.notify_all()


def typed(
    monkeypatch: pytest.MonkeyPatch, folder: Path, lines: Sequence[tuple[int, str]], **options
) -> tuple[list[Path], list[dict]]:
    """Run `generate --interactive` while the lines are typed; what has been typed is there for the next block."""
    script = Typed(lines)
    monkeypatch.setattr("sys.stdin", script)

    class Patient(Lines):
        made = 0

        def ready(self) -> str | None:
            type(self).made += 1
            script.count(self.made)
            due = sum(block <= self.made for block, _ in lines)
            while len(script.read) < due or (due == len(lines) and self._lines.empty()):
                threading.Event().wait(0.001)
            return super().ready()

    monkeypatch.setattr("framework.commands.generate.Lines", Patient)
    paths = generate(generator=tiny_generator(), output_dir=str(folder), interactive=True, **options)
    log = folder / "prompts.jsonl"
    return paths, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_stream_follows_what_is_typed_until_it_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = [(0, A), (1, ""), (2, B), (3, "nonsense"), (4, ":stop"), (5, f"# {C}"), (6, ""), (7, ":quit"), (7, A)]
    (path,), log = typed(monkeypatch, tmp_path / "v", lines)
    assert log == [
        {"frame": 0, "prompt": A, "cut": False},
        {"frame": 6, "prompt": B, "cut": False},
        {"frame": 15, "prompt": C, "cut": True},
    ]
    (scripted,) = made(tmp_path / "w", prompts=[f"{A} [6f] | {B} [9f] | # {C}"], blocks=7)
    streamed = frames_of(path)
    assert len(streamed) == 21 and not torch.equal(streamed, scripted)  # other prompts, other noise
    out = capsys.readouterr().out
    assert "not taken: " in out and "nonsense" in out and "':stop' is no command" in out


def test_a_stream_nobody_interrupts_is_the_video_of_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (path,), log = typed(monkeypatch, tmp_path / "v", [(0, A)], blocks=4)
    assert torch.equal(frames_of(path), made(tmp_path / "w", prompts=[A], blocks=4)[0])
    assert log == [{"frame": 0, "prompt": A, "cut": False}]


def test_the_first_prompt_may_be_given_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, log = typed(monkeypatch, tmp_path / "v", [(1, B), (2, ":quit")], prompts=[A])
    assert [(line["frame"], line["prompt"]) for line in log] == [(0, A), (3, B)]


def test_a_stream_that_never_began_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i, lines in enumerate(([], [(0, "")], [(0, ":quit")])):
        paths, log = typed(monkeypatch, tmp_path / f"v{i}", lines)
        assert paths == [] and log == [] and not list((tmp_path / f"v{i}").glob("*.mp4"))


def test_ctrl_c_ends_the_stream_and_keeps_its_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Impatient(Lines):
        asked = 0

        def ready(self) -> str | None:
            self.asked += 1
            if self.asked == 3:
                raise KeyboardInterrupt
            return ""

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{A}\n"))
    monkeypatch.setattr("framework.commands.generate.Lines", Impatient)
    (path,) = generate(generator=tiny_generator(), output_dir=str(tmp_path / "v"), interactive=True)
    assert len(frames_of(path)) == 9


def test_the_end_of_the_input_ends_a_stream_without_a_length_and_no_other():
    def told(blocks: int | None) -> list[tuple]:
        before = set(threading.enumerate())
        lines = Lines(io.StringIO(f"\n{A}\n{B}\n"))
        for thread in set(threading.enumerate()) - before:
            thread.join()  # all is read before the first block is made
        return [(d.prompts, d.cut) for d in converse(lines, None, blocks)]

    assert told(None) == [((A,), False), ((B,), False)]
    assert told(4) == [((A,), False), ((B,), False), ((None,), False), ((None,), False)]


def test_a_script_is_no_first_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*EMBEDDED, "--output_dir", str(tmp_path / "v"), "--interactive", "--prompt", f"{A} | {B}"]
    assert "--interactive takes at most one --prompt" in refusal(capsys, main(arguments))


# A stack of the real form


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a released checkpoint, tiny and random."""
    return save_stack(tmp_path_factory.mktemp("released"))


def with_stack(
    folder: Path, *more: str, command: str = "generate", config: str = "backbones/longlive.gin"
) -> list[str]:
    lines = (*stack_lines(folder), *lora_lines(config), *more)
    return [command, "--gin_file", config, *(word for line in lines for word in ("--gin_param", line))]


def test_a_stack_of_the_real_form_streams_switches_and_cuts(
    released: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    arguments = with_stack(released, "generate.blocks = 4")
    script = "a red disc [0.6s] | a blue disc [0.8s] | # a dog"
    assert main([*arguments, "--output_dir", str(tmp_path / "v"), "--prompt", script, "--prompt", "a cat"]) == 0
    switched, plain = (frames_of(path) for path in sorted((tmp_path / "v").glob("*.mp4")))
    assert len(plain) == 1 + 4 * 11
    assert len(switched) == (1 + 4 * 5) + (1 + 4 * 5), "each shot begins with the one frame of its first latent"
    assert "first frame after" in capsys.readouterr().out


def test_a_stack_of_the_real_form_goes_on_from_given_frames(
    released: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    size = 8 * 8
    clip = torch.randint(0, 256, (9, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_mp4(tmp_path / "given.mp4", clip, 16.0)
    Image.new("RGB", (size, size)).save(tmp_path / "one.png")
    arguments = [*with_stack(released), "--prompt", "a cat", "--blocks", "2"]
    given = ["--image", str(tmp_path / "given.mp4"), "--output_dir", str(tmp_path / "v")]
    assert main([*arguments, *given]) == 0
    (path,) = (tmp_path / "v").glob("*.mp4")
    assert len(frames_of(path)) == 21
    capsys.readouterr()
    line = refusal(
        capsys, main([*arguments, "--image", str(tmp_path / "one.png"), "--output_dir", str(tmp_path / "w")])
    )
    assert "continues 9 frames" in line and "frame-wise" in line


def test_a_frame_wise_recipe_goes_on_from_one_picture(released: Path, tmp_path: Path):
    size = 8 * 8
    Image.effect_noise((size, size), 60).convert("RGB").save(tmp_path / "one.png")
    line = "wan.WanRecipe.file = 'self_forcing_dmd.pt'"
    arguments = with_stack(released, line, config="backbones/causal_forcing_framewise.gin")
    for name, more in (("a", ["--image", str(tmp_path / "one.png")]), ("b", [])):
        assert (
            main([*arguments, *more, "--prompt", "a cat", "--blocks", "3", "--output_dir", str(tmp_path / name)]) == 0
        )
    given, plain = (frames_of(next((tmp_path / name).glob("*.mp4"))) for name in "ab")
    assert len(given) == len(plain) == 1 + 4 * 2 and not torch.equal(given, plain)


@pytest.mark.slow
def test_a_stack_of_the_real_form_takes_no_more_memory_for_a_longer_video(released: Path):
    """Behind a window, decoder included: ten times the length, at most 1.02 times the bytes."""
    policy = SinkWindow(sink=3, window=6)
    generator = tiny_wan_generator(released, policy=policy, schedule=FewStepSchedule((1000,)))
    generator.encode_text(["a cat", "a dog"])  # embedded once

    def peak(blocks: int) -> int:
        script = Script("s", (Cue("a cat"), Cue("a dog", 6)))
        noise = BlockNoise(0, noise_shape(generator, Consistency(), 1), "cpu")
        with LiveBytes() as counter:
            takes = film(generator, scripted([script], 3, blocks), lambda block: noise([(0, "")], block), Consistency())
            assert sum(take.frames.shape[1] for take in takes) == 1 + 4 * (3 * blocks - 1)
        return counter.peak

    peak(1)  # what else is made once is there
    assert peak(40) <= 1.02 * peak(4)
