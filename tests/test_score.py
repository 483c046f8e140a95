"""`armillary score` gives every video its reward and its place in the picture, and names what it could not score."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from framework.cli import main
from framework.commands.score import Prompts, score, windows_of
from framework.config.load import load_config
from framework.data.shapes import CAPTIONS, ClipFactors, render_clips
from framework.interfaces import RewardModel
from framework.reporting.read_videos import Clip, read_clip, reduce_frames
from framework.reporting.score_sheets import Strip, best_and_worst, score_sheet, thumbnails
from framework.reporting.videos import enlarge, visible_scale, write_mp4
from framework.types import Scene, Scores, Segment, VideoBatch
from rewards.shapes import ShapesReward
from tests.rewards.tiny_encoders import noise_clips, save_clip
from tests.support import Brightness, close, holds, over, refuted

TEXTS = [str(caption) for caption in CAPTIONS[::24]]


def shapes(count: int = 4) -> VideoBatch:
    """Clean clips of the embedded world, the last ones spoilt by noise."""
    captions = list(CAPTIONS[::24][:count])
    latents = render_clips(captions, 12, ClipFactors.clean(count), torch.Generator().manual_seed(0))
    latents[count // 2 :] += 0.4 * torch.randn(latents[count // 2 :].shape, generator=torch.Generator().manual_seed(1))
    return VideoBatch.from_signed(latents.transpose(1, 2), 8.0, TEXTS[:count])


def write(folder: Path, videos: VideoBatch) -> list[str]:
    """The clips as `generate` writes them."""
    files = [folder / f"{i}.mp4" for i in range(len(videos))]
    for file, clip in zip(files, videos.frames, strict=True):
        write_mp4(file, clip, videos.fps, visible_scale(clip.shape[-1]))
    return [str(file) for file in files]


def table(folder: Path, name: str = "scores.csv") -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def prompts_file(folder: Path, lines: list[str]) -> str:
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "prompts.txt")


# files


@over(st.integers(2, 21), st.integers(2, 21), st.sampled_from([1, 2, 3, 4]), st.integers(0, 9), examples=15)
def test_reducing_undoes_enlarging(height: int, width: int, scale: int, seed: int):
    frames = noise_clips(2, 3, height, width, seed=seed)
    assert torch.equal(reduce_frames(enlarge(frames, scale), scale, "x.mp4"), frames)


@pytest.mark.parametrize(("height", "width", "fps"), [(16, 16, 8.0), (15, 17, 23.976), (66, 100, 16.0)])
def test_a_written_video_is_read_in_its_own_size_and_rate(tmp_path: Path, height: int, width: int, fps: float):
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 3, width), indexing="ij")
    waves = torch.stack([(x + y * c + t / 4).sin() for t in range(5) for c in range(3)]).view(5, 3, height, width)
    frames = (127 + 80 * waves).to(torch.uint8)
    write_mp4(tmp_path / "a.mp4", frames, fps, visible_scale(height))
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.frames.shape == frames.shape and clip.fps == pytest.approx(fps, abs=1e-3)
    assert float((clip.frames.float() - frames.float()).abs().mean()) < 5
    whole = read_clip(tmp_path / "a.mp4", 1)
    assert whole.frames.shape[-1] == visible_scale(height) * width + visible_scale(height) * width % 2


def test_videos_of_the_embedded_world_have_nearly_the_scores_of_what_was_written(tmp_path: Path):
    videos = shapes()
    write(tmp_path, videos)
    frames = torch.stack([read_clip(tmp_path / f"{i}.mp4").frames for i in range(len(videos))])
    exact, read = (ShapesReward().score(replace(videos, frames=f)).values for f in (videos.frames, frames))
    for name in exact:
        close(read[name], exact[name], atol=0.06)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"no video" * 99), "cannot be read as a video: Invalid data found"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "no video in it"),
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_bytes(b""), "cannot be read as a video: "),
    ],
)
def test_what_is_no_video_is_one_line_with_its_name(tmp_path: Path, spoil: Callable[[Path], object], message: str):
    file = tmp_path / "some video.mp4"
    write_mp4(file, noise_clips(30, 3, 64, 64), 8.0)
    spoil(file)
    with pytest.raises(ValueError) as caught:
        read_clip(file)
    assert str(caught.value).startswith(f"{file}: {message}") and "\n" not in str(caught.value)


def check_cut(read: Callable[[Path], object], file: Path, whole: bytes) -> None:
    """A file that ends too early is never taken for a shorter video."""
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"cannot be read as a video|only \d+ of 30 frames are in it"):
            read(file)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path):
    write_mp4(tmp_path / "a.mp4", noise_clips(30, 3, 16, 16), 8.0)
    whole = (tmp_path / "a.mp4").read_bytes()
    check_cut(read_clip, tmp_path / "a.mp4", whole)


def test_a_video_that_was_resized_since_does_not_pass_for_the_original(tmp_path: Path):
    """Tools that resize a video keep what it says of itself."""
    write_mp4(tmp_path / "a.mp4", noise_clips(4, 3, 16, 16), 8.0, 4)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        target.metadata.update(source.metadata)
        stream = target.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in source.decode(video=0):
            target.mux(stream.encode(frame.reformat(32, 32, "yuv420p")))
        target.mux(stream.encode(None))
    assert read_clip(tmp_path / "a.mp4").frames.shape[-1] == 16
    with pytest.raises(ValueError, match=r"has 32×32 pixels and says of itself '.*enlarged 4 times': it was resized"):
        read_clip(tmp_path / "b.mp4")
    assert read_clip(tmp_path / "b.mp4", 2).frames.shape[-1] == 16


def test_a_factor_that_does_not_divide_the_size_is_refused(tmp_path: Path):
    write_mp4(tmp_path / "a.mp4", noise_clips(2, 3, 16, 18), 8.0)
    with pytest.raises(ValueError, match=r"a.mp4: 18×16 pixels cannot be reduced 4 times; give another --scale"):
        read_clip(tmp_path / "a.mp4", 4)


# prompts and windows


def test_one_prompt_is_for_all_videos_and_more_are_one_for_each(tmp_path: Path):
    clip = Clip(noise_clips(10, 3, 4, 4), 5.0)
    for prompts in (Prompts(["a"], None), Prompts((), prompts_file(tmp_path, ["a"]))):
        assert [prompts.windows(i, clip)[0].prompt for i in (0, 1)] == ["a", "a"] and len(prompts) == 1
    for prompts in (Prompts(["a", "b"], None), Prompts((), prompts_file(tmp_path, ["a", "b"]))):
        assert [prompts.windows(i, clip)[0].prompt for i in (0, 1)] == ["a", "b"] and len(prompts) == 2
    assert Prompts([""], None).windows(0, clip)[0].prompt == ""


def test_prompts_that_follow_each_other_are_windows_in_true_time():
    clip = Clip(noise_clips(20, 3, 4, 4), 5.0)
    found = Prompts(["a [2s] | b [1s] | c"], None).windows(0, clip)
    assert [(w.start, w.stop, w.prompt) for w in found] == [(0, 10, "a"), (10, 15, "b"), (15, 20, "c")]
    shared = Prompts(["a | b"], None).windows(0, clip)
    assert [(w.start, w.stop) for w in shared] == [(0, 10), (10, 20)]


STARTS = st.lists(st.integers(1, 30), max_size=4, unique=True).map(lambda starts: [0, *sorted(starts)])


def check_windows(cut: Callable[[Scene, int], tuple], starts: list[int], frames: int) -> None:
    """Every frame is judged by the prompt that was in force at it, and by no other."""
    scene = Scene("s", tuple(Segment(f"p{start}", start) for start in starts))
    windows = cut(scene, frames)
    covered = [prompt for w in windows for prompt in [w.prompt] * (w.stop - w.start)]
    assert covered == [scene.segment_at(t).prompt for t in range(frames)]
    assert all(w.start < w.stop for w in windows)


def test_windows_cover_a_clip_prompt_by_prompt():
    holds(partial(check_windows, windows_of), STARTS, st.integers(1, 30))
    refuted(partial(check_windows, lambda scene, n: windows_of(scene, max(1, n - 1))), STARTS, st.integers(1, 30))


# the command


def test_a_table_and_a_picture_per_signal_are_written_and_the_clean_clips_come_first(tmp_path: Path):
    files = write(tmp_path, shapes())
    folder = score(
        reward=ShapesReward(), videos=files, prompts=TEXTS[:4], output_dir=str(tmp_path / "scores"), sort_by="VQ"
    )
    rows = table(folder)
    assert [row["video"] for row in rows] == files and [row["prompt"] for row in rows] == TEXTS[:4]
    assert all((row["width"], row["height"], row["frames"], row["fps"]) == ("16", "16", "12", "8.0") for row in rows)
    assert min(float(row["VQ"]) for row in rows[:2]) > max(float(row["VQ"]) for row in rows[2:]) + 0.2
    shown = (folder / "scores.md").read_text(encoding="utf-8").splitlines()[2:]
    ranked = sorted(rows, key=lambda row: -float(row["VQ"]))
    assert [line.split("|")[4].strip() for line in shown] == [row["video"] for row in ranked]
    for signal in ("VQ", "MQ", "TA"):
        with Image.open(folder / f"contact_sheet_{signal}.png") as page:
            assert page.width > 400 and page.height > 300
    assert (folder / "config.gin").exists() and (folder / "env.json").exists()


def check_kept(judge: Callable[..., object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a good video, a broken one, one that is missing, and one of a size that the reward does not judge."""
    (good,) = write(tmp_path, shapes(1))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_mp4(tmp_path / "large.mp4", noise_clips(4, 3, 40, 40), 8.0)
    files = [str(tmp_path / name) for name in ("broken.mp4", "gone.mp4", "large.mp4")]
    with pytest.raises(ValueError, match="3 of 4 videos could not be scored"):
        judge(
            reward=ShapesReward(), videos=[files[0], good, *files[1:]], prompts=TEXTS[:1],
            output_dir=str(tmp_path / "scores"),
        )  # fmt: skip
    rows = table(tmp_path / "scores")
    assert [bool(row["VQ"]) for row in rows] == [False, True, False, False]
    assert (
        all(row["problem"].startswith(row["video"] + ": ") for row in rows if not row["VQ"]) and not rows[1]["problem"]
    )
    lines = capsys.readouterr().err.splitlines()
    assert all(any(file in line for line in lines) for file in files) and len(lines) == 3
    assert (tmp_path / "scores" / "contact_sheet_VQ.png").exists()


def test_what_cannot_be_read_or_scored_is_named_and_nothing_else_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    check_kept(score, tmp_path, capsys)


def test_the_check_of_what_is_kept_sees_a_command_that_stops_at_the_first_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def strict(reward: RewardModel, file: str, *rest: object) -> None:
        raise ValueError(f"{file}: 3 of 4 videos could not be scored")

    monkeypatch.setattr("framework.commands.score.judge", strict)
    with pytest.raises((AssertionError, FileNotFoundError)):
        check_kept(score, tmp_path, capsys)


class Motion(RewardModel):
    """Needs two frames, and gives NaN for fewer."""

    @property
    def signals(self) -> tuple[str, ...]:
        return ("motion",)

    def score(self, videos: VideoBatch) -> Scores:
        moving = videos.frames.float().diff(dim=1).abs().mean((1, 2, 3, 4))
        return Scores.of({"motion": moving})


def test_a_score_that_failed_is_no_zero_and_counts_as_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_mp4(tmp_path / "still.mp4", noise_clips(1, 3, 16, 16), 8.0)
    write_mp4(tmp_path / "moves.mp4", noise_clips(9, 3, 16, 16), 8.0)
    files = [str(tmp_path / name) for name in ("still.mp4", "moves.mp4")]
    with pytest.raises(ValueError, match="1 of 2 videos could not be scored"):
        score(reward=Motion(), videos=files, prompts=["x"], output_dir=str(tmp_path / "scores"))
    rows = table(tmp_path / "scores")
    assert rows[0]["motion"] == "" and float(rows[1]["motion"]) > 20
    assert "still.mp4: motion could not be scored" in capsys.readouterr().err
    assert "—" in (tmp_path / "scores" / "scores.md").read_text(encoding="utf-8")


class Ratio(Motion):
    """A reward with a mistake that one clip shows."""

    def score(self, videos: VideoBatch) -> Scores:
        return Scores.of({"motion": torch.tensor([1 / (videos.frames.shape[1] - 4)])})


def test_a_reward_that_fails_with_anything_loses_one_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, frames in (("good", 9), ("bad", 4), ("fine", 6)):
        write_mp4(tmp_path / f"{name}.mp4", noise_clips(frames, 3, 16, 16), 8.0)
    files = [str(tmp_path / f"{name}.mp4") for name in ("good", "bad", "fine")]
    with pytest.raises(ValueError, match="1 of 3 videos could not be scored"):
        score(reward=Ratio(), videos=files, prompts=["x"], output_dir=str(tmp_path / "scores"))
    assert [row["motion"] for row in table(tmp_path / "scores")] == [str(torch.tensor(0.2).item()), "", "0.5"]
    assert "bad.mp4: ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_clips_of_any_size_and_length_are_judged_one_by_one(tmp_path: Path):
    sizes = [(5, 16, 30), (12, 48, 24), (3, 90, 61)]
    files = []
    for i, (frames, height, width) in enumerate(sizes):
        files.append(str(tmp_path / f"{i}.mp4"))
        write_mp4(files[-1], torch.full((frames, 3, height, width), 60 * (i + 1), dtype=torch.uint8), 8.0 * (i + 1))
    folder = score(reward=Brightness(), videos=files, prompts=[""], output_dir=str(tmp_path / "scores"))
    for i, (row, (frames, height, width)) in enumerate(zip(table(folder), sizes, strict=True)):
        assert (int(row["frames"]), int(row["height"]), int(row["width"])) == (frames, height, width)
        assert float(row["fps"]) == 8 * (i + 1) and abs(float(row["bright"]) * 255 - 60 * (i + 1)) < 3


def test_windows_of_several_prompts_are_written_too(tmp_path: Path):
    files = write(tmp_path, shapes(1))
    folder = score(
        reward=ShapesReward(), videos=files, prompts=[f"{TEXTS[0]} | {TEXTS[1]}"], output_dir=str(tmp_path / "scores")
    )
    rows, whole = table(folder, "windows.csv"), table(folder)[0]
    assert [(row["start"], row["stop"], row["prompt"]) for row in rows] == [("0", "6", TEXTS[0]), ("6", "12", TEXTS[1])]
    assert math.isclose(sum(float(row["TA"]) for row in rows) / 2, float(whole["TA"]), abs_tol=1e-6)
    assert float(rows[0]["TA"]) > float(rows[1]["TA"]) + 0.1


def test_nothing_is_overwritten_and_what_is_wrong_from_the_start_writes_nothing(tmp_path: Path):
    files = write(tmp_path, shapes(2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    given = {"reward": ShapesReward(), "videos": files, "output_dir": str(tmp_path / "new")}
    with pytest.raises(ValueError, match="holds another run already"):
        score(**given | {"prompts": TEXTS[:1], "output_dir": str(tmp_path / "full")})  # type: ignore[arg-type]
    for change, message in (
        ({}, "no prompt to judge by"),
        ({"prompts": TEXTS[:3]}, "3 prompts for 2 videos; give one for all, or one each in their order"),
        ({"prompts": TEXTS[:1], "prompt_file": "x.txt"}, "give --prompt or --prompts, not both"),
        ({"prompts": TEXTS[:1], "sort_by": "QV"}, r"score.sort_by='QV' is no signal of ShapesReward"),
        ({"prompts": TEXTS[:1], "rows": 1}, "score.rows must be at least 2"),
        ({"prompt_file": str(tmp_path / "none.txt")}, "is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            score(**given | change)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


# the command line


def test_the_command_scores_with_a_named_reward_or_with_that_of_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files, prompts = write(tmp_path, shapes()), prompts_file(tmp_path, TEXTS[:4])
    for i, reward in enumerate((["--reward", "shapes.ShapesReward"], ["--gin_file", "embedded/nft.gin"])):
        folder = tmp_path / f"run{i}"
        assert main(["score", *files, *reward, "--prompts", prompts, "--output_dir", str(folder)]) == 0
        assert "saved to" in capsys.readouterr().out
    left, right = (table(tmp_path / name) for name in ("run0", "run1"))
    assert left == right and len(left) == 4
    assert load_config("score", gin_files=[str(tmp_path / "run1" / "config.gin")]).build()["videos"] == tuple(files)


def test_a_failure_has_an_exit_code_and_a_wrong_command_line_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (good,) = write(tmp_path, shapes(1))
    shared = ["--prompt", TEXTS[0], "--reward", "shapes.ShapesReward", "--output_dir", str(tmp_path / "run")]
    assert main(["score", good, str(tmp_path / "gone.mp4"), *shared]) == 1
    assert "armillary: error: 1 of 2 videos could not be scored" in capsys.readouterr().err
    assert main(["score", good, "--prompt", "x"]) == 2
    assert "score needs --reward, the name of a part, or a --gin_file with a REWARD" in capsys.readouterr().err
    assert main(["score", good, "--prompt", "x", "--reward", "shapes.ShapesRewards"]) == 2
    assert (
        "--reward: unknown name 'shapes.ShapesRewards'; did you mean 'shapes.ShapesReward'" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["score", "--reward", "shapes.ShapesReward"])


def test_the_packaged_clip_reward_scores_with_a_folder_of_ones_own(tmp_path: Path):
    save_clip(tmp_path / "clip")
    write_mp4(tmp_path / "a.mp4", noise_clips(9, 3, 30, 40), 8.0)
    model = f"encoders.load_clip.model = {str(tmp_path / 'clip')!r}"
    command = ["score", str(tmp_path / "a.mp4"), "--gin_file", "rewards/clip.gin", "--gin_param", model]
    assert main([*command, "--prompt", "a dog | a cat", "--output_dir", str(tmp_path / "run")]) == 0
    assert -1 <= float(table(tmp_path / "run")[0]["CLIP"]) <= 1
    assert len(table(tmp_path / "run", "windows.csv")) == 2


@pytest.mark.parametrize("name", ["rewards/clip.gin", "rewards/vbench.gin"])
def test_the_packaged_reward_files_are_right_to_train_with_and_to_score_with(name: str):
    load_config("train", gin_files=["embedded/nft.gin", name], flags={"output_dir": "unused"})
    load_config("score", gin_files=["score.gin", name], flags={"videos": ("a.mp4",)})


# pictures


def strips(count: int) -> list[Strip]:
    frames = [torch.full((3, 3, 20, 20), 8 * i, dtype=torch.uint8) for i in range(count)]
    return [Strip(thumbnails(f), f"{i}.mp4", f"prompt {i}", float(i)) for i, f in enumerate(frames)]


@over(st.integers(1, 30), st.integers(2, 12))
def test_of_many_videos_the_best_and_the_worst_are_shown_and_the_rest_is_counted(count: int, most: int):
    rows = best_and_worst(strips(count), most)
    shown = [row.score for row in rows if isinstance(row, Strip)]
    assert shown == sorted(shown, reverse=True) and len(shown) == min(count, most)
    assert shown[0] == count - 1 and shown[-1] == 0
    assert len(shown) + sum(row for row in rows if isinstance(row, int)) == count


def brightest_per_row(page: Image.Image, count: int) -> list[int]:
    """The grey of each row's frames, from the top."""
    pixels = np.asarray(page)[..., 0]
    column = pixels[:, page.width - 60]
    found = [int(value) for value in column if value != 255]
    return list(dict.fromkeys(found))[:count]


def test_the_picture_shows_the_clips_in_falling_order():
    page = score_sheet(strips(5), "What it likes")
    assert brightest_per_row(page, 5) == [32, 24, 16, 8, 0]
    with pytest.raises(ValueError, match="at least one clip and room for two rows"):
        score_sheet([], "nothing")


def test_thumbnails_go_from_the_first_frame_to_the_last():
    clip = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 3, 8, 8)
    found = [int(np.asarray(image)[0, 0, 0]) for image in thumbnails(clip)]
    assert found == [0, 4, 8, 12, 17, 21, 25, 29]
    assert len(thumbnails(clip[:1])) == 1 and len(thumbnails(clip[:3])) == 3
