"""What a comparison says of its runs: pairs, pools, alarms, and a page that is whole by itself."""

import csv
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from framework.reporting.comparison import (
    Comparison,
    Failure,
    RunResult,
    alarms,
    between_evaluations,
    difference,
    distances,
    held_out_points,
    pooled_gains,
    read_run,
    rise,
)
from framework.reporting.comparison_clips import page_frames, read_clips, spread, write_clips
from framework.reporting.comparison_page import page, write_page
from framework.reporting.comparison_tables import write_tables
from framework.reporting.report import gain_table
from framework.types import VideoBatch, Window
from tests.support import holds, normal, refuted


def result(
    arm: str = "one",
    seed: int = 0,
    trained: Sequence[float] = (0.1,) * 20,
    held_out: Sequence[float] = (0.5, 0.6, 0.7),
    shift: float = 0.2,
    **more: object,
) -> RunResult:
    """A made-up run: rewards of its rollouts, and held-out totals at equal distances from the start to the end."""
    before = {name: 0.5 + 0.05 * normal(i, 6, 2) for i, name in enumerate(("VQ", "TA"))}
    after = {name: value + shift + 0.01 * normal(10 + seed, 6, 2) for name, value in before.items()}
    steps = len(trained)
    records = [
        {"step": s + 1, "samples_seen": 4 * (s + 1), "reward/VQ/mean": value, "reward/total": value,
         "time/core_s": 2.0 * (s + 1), "train/penalty": 0.0, "train/kl": 0.01 * s}
        for s, value in enumerate(trained)
    ]  # fmt: skip
    for i, value in enumerate(held_out):
        step = round(i * steps / (len(held_out) - 1))
        scores = {f"eval/reward/{name}": value for name in ("VQ", "TA", "total")}
        records.append({"step": step, "samples_seen": 4 * step, **scores})
    facts = {"steps": steps, "samples": 4 * steps, "core_s": 2.0 * steps, "peak_rss_mib": None, "command": "armillary"}
    return RunResult(arm=arm, seed=seed, folder=Path("nowhere"), before=before, after=after, records=records,
                     **{**facts, **more})  # fmt: skip


RISING = [0.3 + 0.02 * s for s in range(20)]


# alarms


def test_a_trained_reward_that_rises_while_the_held_out_falls_gives_an_alarm() -> None:
    (vq, ta, total) = alarms(result(trained=RISING, held_out=(0.5, 0.45, 0.3), shift=-0.2))
    assert vq == ("one, seed 0: held-out VQ fell by 0.200 since step 0, while the rollouts gained in VQ +0.300, "
                  "total +0.300")  # fmt: skip
    assert "held-out TA" in ta and "held-out total" in total


def test_a_fall_from_the_best_evaluation_counts_even_above_the_start() -> None:
    (line, *_) = alarms(result(trained=RISING, held_out=(0.5, 0.9, 0.7)))
    assert "fell by 0.200 since step 10" in line


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        (RISING, (0.5, 0.6, 0.7)),
        (RISING[::-1], (0.7, 0.6, 0.5)),
        ([0.4, 0.5] * 10, (0.7, 0.6, 0.5)),
        (RISING, (0.5, 0.7, 0.6999)),
        (RISING[:7], (0.7, 0.6, 0.5)),
        ([*RISING[:10], *[0.6, 0.5] * 5], (0.5, 0.9, 0.7)),
    ],
    ids=["both rise", "both fall", "flat", "within the interval", "seven steps", "rose before the best only"],
)
def test_anything_else_gives_none(trained: list[float], held_out: tuple[float, ...]) -> None:
    assert alarms(result(trained=trained, held_out=held_out)) == []


def test_a_rise_is_the_difference_of_the_outer_quarters_in_standard_errors() -> None:
    moved = rise([0.0, 2.0, 9.0, 9.0, 9.0, math.nan, 9.0, 4.0, 6.0])
    assert moved is not None and moved.change == 4.0 and moved.error == pytest.approx(math.sqrt(2.0))
    assert moved.certain and not rise([0.0, 3.0, 9.0, 9.0, 9.0, 9.0, 4.0, 4.0]).certain
    assert rise([1.0] * 7) is None


# pairs and pools


def test_the_pooled_gain_is_the_mean_of_the_seeds() -> None:
    runs = [result(seed=seed) for seed in range(3)]
    each = [{gain.signal: gain.gain for gain in gain_table(run.before, run.after)} for run in runs]
    for gain in pooled_gains(runs):
        assert gain.gain == pytest.approx(sum(gains[gain.signal] for gains in each) / 3, abs=1e-12)
        assert gain.low < gain.gain < gain.high


def test_a_difference_pairs_the_seeds_that_both_have() -> None:
    ours, theirs = [result(seed=s) for s in (2, 0)], [result("two", seed=s, shift=0.1) for s in (0, 1, 2)]
    (vq, *_) = difference(ours, theirs)
    slow = [(b.after["VQ"] - a.after["VQ"]).mean() for a, b in ((theirs[2], ours[0]), (theirs[0], ours[1]))]
    assert vq.gain == pytest.approx(float(sum(slow) / 2), abs=1e-12)
    with pytest.raises(ValueError, match="one and two have no seed in common"):
        difference(ours, theirs[1:2])


def check_between(steps: list[int], values: list[float], shift: int = 0) -> None:
    steps = sorted({0, *steps})
    series = [(i + 1, value) for i, value in enumerate(values)]
    for i, found in enumerate(between_evaluations(series, steps)):
        wanted = [v for s, v in series if (s == 1 if i == 0 else s in range(steps[i - 1] + 1, steps[i] + 1 + shift))]
        assert math.isnan(found) if not wanted else found == pytest.approx(sum(wanted) / len(wanted))


def test_a_point_stands_for_the_rollouts_since_the_evaluation_before_it() -> None:
    drawn = (st.lists(st.integers(1, 12), max_size=4), st.lists(st.floats(-1, 1), min_size=12, max_size=12))
    holds(check_between, *drawn)
    refuted(lambda steps, values: check_between(steps, values, 1), *drawn)


def test_points_know_clips_and_core_seconds_and_distances_that_are_always_zero_are_left_out() -> None:
    run = result(held_out=(0.5, 0.6, 0.7))
    points = held_out_points(run)
    assert [(p.step, p.samples, p.core_s) for p in points] == [(0, 0, 0.0), (10, 40, 20.0), (20, 80, 40.0)]
    assert points[1].scores == {"VQ": 0.6, "TA": 0.6, "total": 0.6}
    assert set(distances(run)) == {"kl"}


def test_runs_that_were_judged_otherwise_are_not_compared() -> None:
    other = result("two")
    del other.before["TA"], other.after["TA"]
    with pytest.raises(ValueError, match="not alike"):
        Comparison((result(), other))
    with pytest.raises(ValueError, match="at least one"):
        Comparison(())


def write_folder(folder: Path, run: RunResult) -> None:
    folder.mkdir()
    tensors = {f"{side}.{name}": value for side, scores in (("before", run.before), ("after", run.after))
               for name, value in scores.items()}  # fmt: skip
    save_file(tensors, folder / "evaluation.safetensors")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.records))
    (folder / "summary.json").write_text(json.dumps({"steps": 20, "samples": 80, "training_core_s": 40.0}))


def test_a_folder_is_read_as_it_was_written_and_damage_is_named(tmp_path: Path) -> None:
    run = result()
    write_folder(tmp_path / "run", run)
    found = read_run("one", 0, tmp_path / "run")
    assert torch.equal(found.after["VQ"], run.after["VQ"]) and found.core_s == 40.0 and found.peak_rss_mib is None
    (tmp_path / "run" / "memory.json").write_text('{"peak_rss_mib": 321.5}')
    assert read_run("one", 0, tmp_path / "run").peak_rss_mib == 321.5
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the summary of a run"):
        read_run("one", 0, tmp_path / "run")


# the page


class Reader(HTMLParser):
    """Collects elements and refuses what is not closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def whole(tmp_path: Path, arms: Sequence[str] = ("one", "two")) -> Comparison:
    frames = torch.randint(0, 256, (2, 5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_clips(tmp_path, VideoBatch(frames, 8.0, ((Window(0, 5, "x"),),) * 2), (0, 1))
    blocks = {name: 0.5 + 0.1 * normal(i, 6, 2, 4) for i, name in enumerate(("VQ", "TA"))}
    clips = read_clips(tmp_path)
    runs = tuple(result(arm, seed).judged(blocks, clips) for arm in arms for seed in range(2))
    captions = ("a red <circle>", "a blue square")
    return Comparison(runs, (Failure("three-0", "it <broke>"),), {arm: "train.seed = 0" for arm in arms}, blocks, clips,
                      captions, (0, 3), 0, "armillary compare")  # fmt: skip


def test_the_page_is_whole_by_itself_and_says_everything_in_words(tmp_path: Path) -> None:
    text = page(whole(tmp_path), ["cost.csv"])
    found = read(text)
    assert not found.named("script") and not found.named("iframe")
    for tag, attributes in found.elements:
        for name in ("src", "poster", "href", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:" if tag != "a" else "#"), (tag, value[:60])
    assert "url(" not in text and "@import" not in text
    assert all(image["alt"] for image in found.named("img")) and len(found.named("img")) >= 12
    films = found.named("video")
    assert len(films) == 2 * 3 and all({"controls", "loop", "muted", "aria-label"} <= set(film) for film in films)
    anchors, links = [a.get("id") for _, a in found.elements], [a["href"] for a in found.named("a")]
    assert all(link[1:] in anchors for link in links)
    assert "it <broke>" in found.text and "a red <circle>" in found.text and "cost.csv" in found.text
    assert "train/kl" in text and "train/penalty" not in text


@pytest.mark.parametrize("missing", ["blocks and videos", "failures", "a second arm", "a second seed"])
def test_what_is_not_there_is_left_out(missing: str, tmp_path: Path) -> None:
    full = whole(tmp_path)
    given = {
        "blocks and videos": Comparison(tuple(run.judged({}, ()) for run in full.runs)),
        "failures": Comparison(full.runs),
        "a second arm": Comparison(full.runs[:2]),
        "a second seed": Comparison(full.runs[::2]),
    }[missing]
    found = read(page(given))
    assert "did not finish" not in found.text and "Held-out reward" in found.text
    assert ("minus one" in found.text) == (missing != "a second arm")


def test_an_alarm_stands_at_the_top(tmp_path: Path) -> None:
    hacked = result(trained=RISING, held_out=(0.5, 0.45, 0.3), shift=-0.2)
    found = read(page(Comparison((hacked,))))
    assert "the reward may be hacked" in found.text and "fell by 0.200 since step 0" in found.text
    assert "the reward may be hacked" not in read(page(Comparison((result(),)))).text


def test_text_from_a_run_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'"
    found = read(page(Comparison((result(evil),), (Failure("x", evil),), {evil: evil}, command=evil)))
    assert not found.named("script") and found.text.count("<script>alert(1)") >= 5


def test_equal_comparisons_give_equal_pages_and_a_report_may_be_written_again(tmp_path: Path) -> None:
    comparison = whole(tmp_path)
    for _ in range(2):
        write_page(comparison, tmp_path / "report.html", write_tables(comparison, tmp_path))
    assert (tmp_path / "report.html").read_text() == page(
        comparison, ["held_out.csv", "differences.csv", "cost.csv", "curves.csv", "blocks.csv"]
    )


def test_the_tables_hold_every_number_once(tmp_path: Path) -> None:
    paths = write_tables(whole(tmp_path), tmp_path)
    rows = {path.stem: list(csv.DictReader(path.open(encoding="utf-8"))) for path in paths}
    assert len(rows["held_out"]) == 2 * 3 * 3 and len(rows["differences"]) == 3 and len(rows["cost"]) == 4
    assert len(rows["blocks"]) == 5 * 2 * 4
    assert {row["quantity"] for row in rows["curves"]} == {
        "held_out/VQ", "held_out/TA", "held_out/total", "trained/VQ", "trained/total", "distance/kl",
    }  # fmt: skip
    pooled = next(row for row in rows["held_out"] if row["seed"] == "pooled" and row["signal"] == "total")
    assert float(pooled["low"]) < float(pooled["gain"]) < float(pooled["high"])


def test_tall_frames_are_made_small_and_small_ones_are_kept() -> None:
    small = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert page_frames(small) is small
    assert page_frames(torch.full((2, 3, 480, 832), 7, dtype=torch.uint8)).unique().tolist() == [7]
    assert page_frames(torch.zeros(2, 3, 480, 832, dtype=torch.uint8)).shape == (2, 3, 192, 333)
    assert spread(24, 6) == (0, 4, 8, 12, 16, 20) and spread(2, 6) == (0, 1)
