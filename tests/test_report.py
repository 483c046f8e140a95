"""Tables and curves say what the numbers say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from framework.reporting.metrics import read_metrics
from framework.reporting.report import (
    EVALUATION_TAG,
    GAIN_HEADERS,
    ROLLOUT_TAG,
    _series,
    format_table,
    gain_cells,
    gain_table,
    markdown_table,
    reward_curve,
    running_mean,
)
from framework.reporting.statistics import clustered_bootstrap


def scores(seed: int, shift: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(24, 8, generator=generator) + shift for name in ("VQ", "MQ", "TA")}


# gains


def check_rows(rows: list, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert [row.signal for row in rows] == [*before, "total"]
    for row in rows[:-1]:
        old, new = before[row.signal].double(), after[row.signal].double()
        assert row.before == pytest.approx(old.mean().item()) and row.after == pytest.approx(new.mean().item())
        assert (row.gain, row.low, row.high) == clustered_bootstrap(new - old)
        assert row.gain == pytest.approx(row.after - row.before)
    for column in ("before", "after", "gain"):
        mean = np.mean([getattr(row, column) for row in rows[:-1]])
        assert getattr(rows[-1], column) == pytest.approx(mean)


def test_the_table_holds_paired_means_and_the_total_is_the_mean_of_the_signals() -> None:
    before, after = scores(0), scores(1, shift=0.1)
    check_rows(gain_table(before, after), before, after)


def test_the_table_check_notices_swapped_sides_and_lost_pairs() -> None:
    before, after = scores(0), scores(1, shift=0.1)
    with pytest.raises(AssertionError):
        check_rows(gain_table(after, before), before, after)
    unpaired = {name: value.flip(0) for name, value in after.items()}
    with pytest.raises(AssertionError):
        check_rows(gain_table(before, unpaired), before, after)


def test_nothing_gained_is_a_row_of_exact_zeros() -> None:
    for row in gain_table(scores(0), scores(0)):
        assert (row.gain, row.low, row.high) == (0, 0, 0)


def test_unpaired_non_finite_and_doubly_named_scores_are_refused() -> None:
    before, after = scores(0), scores(1)
    with pytest.raises(ValueError, match="same signals"):
        gain_table(before, {"VQ": after["VQ"]})
    with pytest.raises(ValueError, match="'MQ' has scores of shape"):
        gain_table(before, {**after, "MQ": after["MQ"][:, :4]})
    failed = after["TA"].clone()
    failed[3, 5] = torch.nan
    with pytest.raises(ValueError, match="1 of 192 pairs of 'TA'"):
        gain_table(before, {**after, "TA": failed})
    with pytest.raises(ValueError, match="'total' is the mean"):
        gain_table({"total": before["VQ"]}, {"total": after["VQ"]})


# tables


def test_a_table_is_aligned_on_both_sides() -> None:
    text = format_table([["VQ", 0.5, "x"], ["a longer name", -10.25, "note"]], ["signal", "mean", "remark"])
    assert text.split("\n") == [
        "signal            mean  remark",
        "─────────────  ───────  ──────",
        "VQ               0.500  x",
        "a longer name  -10.250  note",
    ]


def test_gains_carry_their_sign() -> None:
    (first, *_) = gain_cells(gain_table(scores(0), scores(0, shift=0.25)))
    assert first[0] == "VQ" and first[3:] == ["+0.250", "+0.250", "+0.250"]
    assert len(GAIN_HEADERS) == len(first)


def test_markdown_has_one_line_a_row_right_aligned_numbers_and_no_stray_bars() -> None:
    lines = markdown_table([["a|b", 1.0], ["c", 2]], ["name", "value"]).split("\n")
    assert lines == ["| name | value |", "| :--- | ---: |", "| a\\|b | 1.000 |", "| c | 2 |"]


@pytest.mark.parametrize("table", [format_table, markdown_table])
def test_tables_without_rows_and_rows_that_do_not_fit(table) -> None:
    assert table([], ["one", "two"]).startswith(("one  two", "| one | two |"))
    with pytest.raises(ValueError, match="3 cells under 2 headers"):
        table([[1, 2, 3]], ["one", "two"])


@given(st.lists(st.tuples(st.text("ab |", max_size=9), st.floats(-99, 99)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_all_lines_of_a_table_end_where_their_numbers_end(rows: list[tuple[str, float]]) -> None:
    lines = format_table(rows, ["name", "value"]).split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == len(rows) + 2


# curves


def write_run(path: Path, steps: int = 12) -> None:
    lines = []
    for step in range(steps):
        line: dict[str, float | str] = {"step": step, "samples_seen": 48 * step, "train/loss": 0.1}
        if step:
            line |= {"reward/VQ/mean": 0.5 + step / 100, "reward/VQ/std": 0.1, "reward/total": 0.4}
        if step % 4 == 0:
            line |= {"eval/reward/VQ": 0.6 + step / 100, "eval/reward/total": "nan" if step == 4 else 0.5}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")


def test_curves_are_read_per_signal_against_samples(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl")
    records = read_metrics(tmp_path / "metrics.jsonl")
    rollouts, held_out = _series(records, ROLLOUT_TAG), _series(records[::-1], EVALUATION_TAG)
    assert set(rollouts) == set(held_out) == {"VQ", "total"}
    assert rollouts["VQ"] == pytest.approx(np.array([[48 * s, 0.5 + s / 100] for s in range(1, 12)]))
    assert held_out["VQ"] == pytest.approx(np.array([[0, 0.6], [192, 0.64], [384, 0.68]]))


def test_the_reward_curve_is_a_picture_with_ink_that_is_not_overwritten(tmp_path: Path) -> None:
    write_run(tmp_path / "metrics.jsonl")
    out = tmp_path / "pictures" / "reward.png"
    reward_curve(tmp_path / "metrics.jsonl", out)
    with Image.open(out) as image:
        assert image.width > 800
        picture = np.asarray(image.convert("RGB")).reshape(-1, 3)
    blue, grey = np.array([9, 105, 218]), np.array([140, 149, 159])
    for colour in (blue, grey):
        assert (np.abs(picture - colour).max(1) < 3).sum() > 200
    with pytest.raises(FileExistsError, match=str(out)):
        reward_curve(tmp_path / "metrics.jsonl", out)
    reward_curve(tmp_path / "metrics.jsonl", out, overwrite=True)
    assert [p.name for p in out.parent.iterdir()] == ["reward.png"]


def test_a_run_of_one_step_and_one_of_many_signals_can_be_drawn(tmp_path: Path) -> None:
    line = {"step": 0, "samples_seen": 0} | {f"eval/reward/s{i}": i / 10 for i in range(6)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    reward_curve(tmp_path / "metrics.jsonl", tmp_path / "reward.png")
    assert (tmp_path / "reward.png").stat().st_size > 0


def test_a_run_without_rewards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"samples_seen": 0, "step": 0, "train/loss": 1.0}\n')
    with pytest.raises(ValueError, match="holds no reward"):
        reward_curve(tmp_path / "metrics.jsonl", tmp_path / "reward.png")
    assert not (tmp_path / "reward.png").exists()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.integers(0, 4))
@settings(deadline=None, max_examples=40)
def test_a_running_mean_is_the_mean_of_the_neighbours_that_exist(values: list[float], reach: int) -> None:
    slow = []
    for i in range(len(values)):
        near = [values[j] for j in range(len(values)) if abs(i - j) <= reach]
        slow.append(sum(near) / len(near))
    assert running_mean(np.array(values), reach) == pytest.approx(slow, abs=1e-12)


def test_a_running_mean_leaves_out_what_failed() -> None:
    assert running_mean(np.array([1.0, np.nan, 3.0]), 1).tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(running_mean(np.array([np.nan]), 1)).all()
