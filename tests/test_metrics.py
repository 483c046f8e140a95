"""What is logged can be read back: by a JSON parser, by TensorBoard, and after a crash."""

import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from framework.data.shapes import CAPTIONS, ClipFactors, render_clips
from framework.reporting.metrics import MetricsLogger, cut_back, encode_line, read_metrics, to_floats
from framework.types import VideoBatch

FRAMES, FPS = 21, 8.0


def shape_clips(n: int = 3) -> Tensor:
    latents = render_clips(CAPTIONS[:n], FRAMES, ClipFactors.clean(n), torch.Generator().manual_seed(0))
    return VideoBatch.from_signed(latents.transpose(1, 2), FPS, [str(c) for c in CAPTIONS[:n]]).frames


def read_board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


# metrics.jsonl


def check_strict_json(encode: Callable[[Mapping[str, float]], str], record: Mapping[str, float]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = encode(record)
    read = json.loads(line, parse_constant=refuse)
    assert "\n" not in line and list(read) == sorted(record)
    for key, value in record.items():
        assert read[key] == value or read[key] == {"nan": "nan", "inf": "inf", "-inf": "-inf"}[str(float(value))]


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.floats(), max_size=6))
@settings(deadline=None)
def test_every_line_is_json_with_sorted_keys_and_exact_floats(record: dict[str, float]) -> None:
    check_strict_json(encode_line, record)


def test_the_json_check_notices_pythons_own_nan_and_unsorted_keys() -> None:
    with pytest.raises(AssertionError, match="not JSON"):
        check_strict_json(json.dumps, {"train/loss": math.nan})
    with pytest.raises(AssertionError):
        check_strict_json(json.dumps, {"b": 1.0, "a": 2.0})


def test_a_log_call_writes_one_line_that_reads_back(tmp_path: Path) -> None:
    values = {"train/loss": torch.tensor(0.1), "train/kl": torch.tensor(math.nan), "memory/peak_gb": 2, "a": -math.inf}
    with MetricsLogger(tmp_path) as log:
        floats = log.log(7, values, samples_seen=336)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["train/kl"] == "nan" and json.loads(line)["step"] == 7
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["train/loss"] == floats["train/loss"] == torch.tensor(0.1).item()
    assert math.isnan(record["train/kl"]) and record["a"] == -math.inf
    assert record["memory/peak_gb"] == 2 and record["samples_seen"] == 336


def test_lines_are_on_disk_before_the_logger_closes(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log:
        log.log(0, {"train/loss": 1.0}, samples_seen=0)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def check_one_transfer(
    convert: Callable[[Mapping[str, float | Tensor]], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        **{f"t{i}": torch.tensor(float(i), dtype=torch.bfloat16) for i in range(5)},
        "graph": torch.tensor(2.0, requires_grad=True) * 3,
        "f": 0.5,
        "count": torch.tensor(2**30 + 1),
        "flag": torch.tensor(True),
    }
    transfers: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__float__", "cpu", "numpy"):
            original = getattr(Tensor, name)

            def counted(self: Tensor, *args, original=original, name=name):
                transfers.append(name)
                return original(self, *args)

            patch.setattr(Tensor, name, counted)
        floats = convert(values)
    assert transfers == ["tolist"]
    assert floats == {**{f"t{i}": float(i) for i in range(5)}, "graph": 6.0, "f": 0.5, "count": 2**30 + 1, "flag": 1.0}
    assert list(floats) == list(values)


def test_all_tensors_come_to_the_host_in_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_transfer(to_floats, monkeypatch)


def test_the_transfer_check_notices_one_item_call_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_one_transfer(
            lambda values: {tag: torch.as_tensor(value).item() for tag, value in values.items()}, monkeypatch
        )


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(1), "0.5", None, 1j])
def test_what_is_not_one_number_is_refused_by_its_tag(tmp_path: Path, value) -> None:
    with MetricsLogger(tmp_path) as log, pytest.raises(ValueError, match="'train/loss' must be"):
        log.log(0, {"train/loss": value}, samples_seen=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("tag", ["step", "samples_seen", ""])
def test_reserved_and_empty_tags_are_refused(tmp_path: Path, tag: str) -> None:
    with MetricsLogger(tmp_path) as log, pytest.raises(ValueError, match="may not be called"):
        log.log(0, {tag: 1.0}, samples_seen=0)


# runs that stop and go on


Position = dict[str, int] | None


def run(folder: Path, start: int, stop: int, position: Position = None, keep_at: int | None = None) -> Position:
    """Log steps; the position after one of them."""
    kept = None
    with MetricsLogger(folder, position=position) as log:
        for step in range(start, stop):
            log.log(step, {"train/loss": 1 / (1 + step)}, samples_seen=48 * step)
            kept = log.position() if step == keep_at else kept
    return kept


def check_goes_on(folder: Path, whole: Path, first: int) -> None:
    """Stopped at 5 and killed while it wrote; the checkpoint was at 3."""
    position = run(folder, 0, 6, keep_at=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "trai')
    run(folder, first, 9, position)
    assert (whole / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    scalars = read_board(folder / "tb").Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(9))


def test_a_resumed_run_leaves_the_same_record_as_one_that_never_stopped(tmp_path: Path) -> None:
    run(tmp_path / "whole", 0, 9)
    check_goes_on(tmp_path / "parts", tmp_path / "whole", 4)


def test_the_record_check_sees_a_step_that_is_repeated(tmp_path: Path) -> None:
    run(tmp_path / "whole", 0, 9)
    with pytest.raises(AssertionError):
        check_goes_on(tmp_path / "parts", tmp_path / "whole", 3)


def test_events_are_cut_in_the_file_and_not_only_hidden(tmp_path: Path) -> None:
    position = run(tmp_path, 0, 6, keep_at=3)
    cut_back(tmp_path, position)
    assert [event.step for event in read_board(tmp_path / "tb").Scalars("train/loss")] == [0, 1, 2, 3]
    cut_back(tmp_path, {"metrics.jsonl": 0})
    assert list((tmp_path / "tb").iterdir()) == []


def test_event_files_that_somebody_removed_stop_no_run(tmp_path: Path) -> None:
    position = run(tmp_path, 0, 6, keep_at=3)
    for path in (tmp_path / "tb").iterdir():
        path.unlink()
    run(tmp_path, 4, 9, position)
    assert [event.step for event in read_board(tmp_path / "tb").Scalars("train/loss")] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("change", [lambda text: text[:-200], lambda text: "x" + text, lambda text: ""])
def test_a_record_that_is_not_what_was_written_is_refused_and_left_alone(tmp_path: Path, change) -> None:
    position = run(tmp_path, 0, 6, keep_at=5)
    record = tmp_path / "metrics.jsonl"
    record.write_text(change(record.read_text()))
    before = record.read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not what this run wrote"):
        MetricsLogger(tmp_path, position=position)
    assert record.read_text() == before


def test_the_record_of_another_run_is_not_continued_unasked(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=str(tmp_path / "metrics.jsonl")):
        MetricsLogger(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", ["{}", "[1]", "not json", '{"step": 1, "samples_seen": "many"}', '{"step": 1}'])
def test_a_line_that_is_not_ours_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "samples_seen": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    assert line in path.read_text()


# TensorBoard


def test_the_event_file_holds_scalars_the_config_as_it_is_and_a_playing_gif(tmp_path: Path) -> None:
    config = "train.steps = 3\n# *not* markdown\n\nNFT.beta = 0.1"
    with MetricsLogger(tmp_path) as log:
        log.text("config/operative", config)
        for step in range(3):
            log.log(step, {"reward/VQ/mean": torch.tensor(step / 4), "train/kl": math.nan}, samples_seen=48 * step)
        log.videos("samples/video", 2, shape_clips(), FPS)
    board = read_board(tmp_path / "tb")
    assert [(e.step, e.value) for e in board.Scalars("reward/VQ/mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert [e.value for e in board.Scalars("train/samples_seen")] == [0, 48, 96]
    (text,) = board.Tensors("config/operative/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert [line.removeprefix("    ") for line in shown.split("\n")] == config.split("\n")
    check_gif(tmp_path / "tb")


def check_gif(folder: Path) -> None:
    (event,) = read_board(folder).Images("samples/video")
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.format == "GIF" and getattr(image, "n_frames", 1) == FRAMES
        assert image.size == (event.width, event.height)
        assert event.step == 2 and min(image.size) >= 128  # two by two clips of at least 64 pixels


def test_the_gif_check_notices_a_missing_video_and_a_missing_frame(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "none"):
        pass
    with pytest.raises(KeyError):
        check_gif(tmp_path / "none" / "tb")
    with MetricsLogger(tmp_path / "short") as log:
        log.videos("samples/video", 2, shape_clips()[:, 1:], FPS)
    with pytest.raises(AssertionError):
        check_gif(tmp_path / "short" / "tb")


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is not None, reason="moviepy is installed, so torch can write")
def test_the_gif_check_notices_that_torchs_add_video_writes_nothing(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_video("samples/video", shape_clips(), 2, fps=8)
    with pytest.raises(KeyError):
        check_gif(tmp_path)


def test_videos_of_another_form_are_refused(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as log, pytest.raises(ValueError, match=r"uint8 \[N, T, 3, H, W\]"):
        log.videos("samples/video", 0, shape_clips().float(), FPS)
