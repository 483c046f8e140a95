"""`armillary evaluate` reports what a reward says of segments and of time, and hands clips on to VBench."""

import csv
import json
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from framework.cli import main
from tests.backbones.tiny_stack import lora_lines, save_stack, stack_lines


def flags(*lines: str) -> list[str]:
    return [word for line in lines for word in ("--gin_param", line)]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


SWITCHES = flags(
    "evaluation.HeldOut.scenes = @scenes.ShapesSwitches()", "scenes.ShapesSwitches.switch = 6",
    "scenes.ShapesSwitches.limit = 3", "evaluation.HeldOut.controls = None", "evaluation.HeldOut.members = 2",
    "evaluation.HeldOut.blocks = 5", "evaluation.HeldOut.clips_per_batch = 4",
    "evaluate.timeline = @timeline.Timeline()", "timeline.Timeline.reward = @shapes.ShapesReward()",
    "timeline.Timeline.seconds = 0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "scores"
    arguments = ["evaluate", "--gin_file", "embedded/evaluate.gin", "--vbench", "--output_dir", str(folder)]
    assert main([*arguments, *SWITCHES]) == 0
    return folder


def test_segments_average_to_the_clips_scores(scored: Path):
    scores, rows = load_file(scored / "scores.safetensors"), table(scored / "segments.csv")
    assert len(rows) == 3 * 2 * 3 * 2  # scenes, members, signals, segments
    for signal, value in scores.items():
        for scene in range(3):
            for member in range(2):
                parts = [
                    float(row["score"])
                    for row in rows
                    if (row["signal"], row["scene"], row["member"]) == (signal, str(scene), str(member))
                ]
                assert sum(parts) / 2 == pytest.approx(float(value[scene, member]), abs=1e-6)
    assert {(row["start"], row["stop"]) for row in rows} == {("0.0", "0.75"), ("0.75", "1.875")}


def test_intervals_cover_the_clip_under_the_prompt_in_force(scored: Path):
    rows = [row for row in table(scored / "intervals.csv") if row["signal"] == "VQ" and row["scene"] == "0"]
    first = [row for row in rows if row["member"] == "0"]
    assert [(row["start"], row["stop"]) for row in first] == [
        ("0.0", "0.5"),
        ("0.5", "1.0"),
        ("1.0", "1.5"),
        ("1.5", "1.875"),
    ]
    prompts = [row["prompt"] for row in table(scored / "segments.csv")[:2]]
    assert [row["prompt"] for row in first] == [prompts[0], prompts[0], prompts[1], prompts[1]]


def test_the_tables_name_clips_segments_intervals_and_time(scored: Path):
    text = (scored / "scores.md").read_text(encoding="utf-8")
    for title in ("whole clips", "per prompt segment", "per interval of 0.5 s", "consistency over time"):
        assert f"**{title}**" in text


def test_every_clip_is_handed_on_under_its_prompts(scored: Path):
    listed = json.loads((scored / "vbench" / "prompts.json").read_text(encoding="utf-8"))
    rows = table(scored / "segments.csv")
    wanted = {" | ".join(row["prompt"] for row in rows if row["scene"] == str(s))[:10] for s in range(3)}
    assert len(listed) == 6 and {prompt[:10] for prompt in listed.values()} == wanted
    for name, prompt in listed.items():
        assert name in (f"{prompt}-0.mp4", f"{prompt}-1.mp4")
        with av.open(str(scored / "vbench" / name)) as container:
            frames = [frame for frame in container.decode(video=0)]
        assert len(frames) == 15 and (frames[0].width, frames[0].height) == (16, 16)


def test_a_stack_of_the_real_form_is_judged_on_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "stack").mkdir()
    stack = save_stack(tmp_path / "stack")
    prompts = tmp_path / "held_out.csv"
    prompts.write_text("prompt\na red disc / a blue square\na dog\n")
    config = "backbones/longlive.gin"
    lines = (
        *stack_lines(stack), *lora_lines(config), f"held_out/scenes.PromptFile.path = {str(prompts)!r}",
        "JUDGE = @tiny_stack.PixelReward()", "evaluation.HeldOut.members = 1", "evaluation.HeldOut.blocks = 2",
    )  # fmt: skip
    arguments = [
        "evaluate",
        "--gin_file",
        "evaluate.gin",
        "--gin_file",
        config,
        "--plugin",
        "tests.backbones.tiny_stack",
    ]
    assert main([*arguments, "--output_dir", str(tmp_path / "scores"), "--vbench", *flags(*lines)]) == 0
    assert sorted(path.name for path in (tmp_path / "scores" / "vbench").iterdir()) == [
        "a dog-0.mp4", "a red disc _ a blue square-0.mp4", "prompts.json",
    ]  # fmt: skip
    rows = table(tmp_path / "scores" / "intervals.csv")
    assert {row["signal"] for row in rows} == {"VQ", "MQ", "TA"} and {row["stop"] for row in rows} == {"1.3125"}
    scores = load_file(tmp_path / "scores" / "scores.safetensors")
    assert torch.isfinite(torch.stack(list(scores.values()))).all()
    assert "consistency over time" not in capsys.readouterr().out, "one interval says nothing of time"
