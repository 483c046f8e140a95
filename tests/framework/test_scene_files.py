"""Scenes are read as they are written, in both notations, and what is wrong is named with its file and line."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import strategies as st

from framework.data.scene_files import scene_of_line, scene_of_record
from framework.data.scenes import PromptFile, ShapesCaptions, ShapesSwitches
from framework.data.shapes import parse_caption
from framework.types import Scene
from tests.support import holds, refuted

WORDS = st.text("abc é#,.-'", min_size=1, max_size=12).map(str.strip).filter(lambda w: w and not w.startswith("#"))
PARTS = st.lists(st.tuples(WORDS, st.integers(1, 40)), min_size=1, max_size=4)


def segments(scene: Scene) -> list[tuple[str, int]]:
    return [(segment.prompt, segment.start) for segment in scene.segments]


def expected(parts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Prompts and the frames they start at, of prompts and how many frames each lasts."""
    return [(prompt, sum(length for _, length in parts[:i])) for i, (prompt, _) in enumerate(parts)]


# Reading back what was written


def check_line(read: Callable[..., Scene], parts: Sequence[tuple[str, int]]) -> None:
    in_frames = " | ".join(f"{prompt} [{length}f]" for prompt, length in parts)
    assert segments(read(in_frames, "here")) == expected(parts)
    *timed, (last, _) = parts
    in_seconds = "|".join([*(f" {prompt} [{length / 4}s] " for prompt, length in timed), last])
    assert segments(read(in_seconds, "here", 4.0)) == expected(parts)


def check_record(read: Callable[..., Scene], parts: Sequence[tuple[str, int]]) -> None:
    listed = [{"prompt": prompt, "start": start} for prompt, start in expected(parts)]
    assert segments(read(json.dumps({"segments": listed}), "here")) == expected(parts)
    del listed[0]["start"]
    assert segments(read(json.dumps({"segments": listed}), "here")) == expected(parts)
    assert segments(read(json.dumps({"prompt": parts[0][0]}), "here")) == [(parts[0][0], 0)]


def test_a_line_says_what_follows_what_and_for_how_long():
    holds(partial(check_line, scene_of_line), PARTS)


def test_a_record_says_what_starts_where():
    holds(partial(check_record, scene_of_record), PARTS)


def test_the_reading_check_sees_seconds_taken_for_frames():
    def seconds_as_frames(line: str, where: str, latent_fps: float | None = None) -> Scene:
        return scene_of_line(line, where, 1.0)

    long = PARTS.map(lambda parts: [(prompt, 8 + length) for prompt, length in parts])
    refuted(partial(check_line, seconds_as_frames), long)


def test_prompts_without_lengths_share_a_clip_equally():
    assert segments(scene_of_line("a | b | c", "here", None, 21)) == [("a", 0), ("b", 7), ("c", 14)]
    assert segments(scene_of_line("a", "here", None, 21)) == [("a", 0)]


def test_a_length_in_seconds_is_rounded_to_a_frame():
    assert segments(scene_of_line("a [1.2s] | b [1.3s] | c", "here", 8.0)) == [("a", 0), ("b", 10), ("c", 20)]


# Refusals


@pytest.mark.parametrize(
    ("line", "latent_fps", "said"),
    [
        ("a |  | b", 4.0, "prompt 2 of 3 between '|' is empty"),
        ("| b", 4.0, "prompt 1 of 2"),
        ("a [5s] |", 4.0, "prompt 2 of 2"),
        ("[5s] | b", 4.0, "prompt 1 of 2"),
        ("a [5s] | # b", 4.0, "'#' asks for a cut"),
        ("a | b", 4.0, "every prompt but the last needs its length"),
        ("a [5s] | b | c", 4.0, "every prompt but the last needs its length"),
        ("a [5s] | b", None, "PromptFile.latent_fps"),
        ("a [0f] | b", 4.0, r"each after the one before it, got \[0, 0\]"),
        ("a [0.01s] | b", 4.0, r"got \[0, 0\]"),
    ],
)
def test_a_line_that_says_nothing_definite_is_refused(line: str, latent_fps: float | None, said: str):
    with pytest.raises(ValueError, match=said.replace("|", r"\|")) as error:
        scene_of_line(line, "scenes.txt:7", latent_fps)
    assert str(error.value).startswith("scenes.txt:7: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "nothing else, got list"),
        ("{}", r"nothing else, got \[\]"),
        ('{"prompt": "a", "segments": []}', "nothing else"),
        ('{"prompt": "a", "negative_prompt": "b"}', r"got \['negative_prompt', 'prompt'\]"),
        ('{"segments": []}', "at least one"),
        ('{"segments": "a"}', "must be a list"),
        ('{"segments": ["a"]}', "segment 1 must be an object"),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b"}]}', 'segment 2 must be an object with "prompt" and "start"'),
        ('{"segments": [{"prompt": "a", "cut": true}]}', "segment 1 must be an object"),
        ('{"segments": [{"prompt": "  "}]}', "not blank"),
        ('{"segments": [{"prompt": 3}]}', "not blank, got 3"),
        ('{"segments": [{"prompt": "a", "start": 0.0}]}', "frame number ≥ 0, got 0.0"),
        ('{"segments": [{"prompt": "a", "start": true}]}', "got True"),
        ('{"segments": [{"prompt": "a", "start": -1}]}', "got -1"),
        ('{"segments": [{"prompt": "a", "start": NaN}]}', "got nan"),
        ('{"segments": [{"prompt": "a", "start": 3}]}', r"start at frame 0.*got \[3\]"),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 0}]}', r"got \[0, 0\]"),
    ],
)  # fmt: skip
def test_a_record_of_another_form_is_refused(record: str, said: str):
    with pytest.raises(ValueError, match=said) as error:
        scene_of_record(record, "scenes.jsonl:3")
    assert str(error.value).startswith("scenes.jsonl:3: ") and "\n" not in str(error.value)


# Files


def test_a_file_of_either_notation_is_read_and_an_error_names_its_line(tmp_path: Path):
    text, records = tmp_path / "scenes.txt", tmp_path / "scenes.jsonl"
    text.write_text("plain\n\n a [2s] | b \n", encoding="utf-8")
    scenes = PromptFile(str(text), latent_fps=4.0).scenes()
    assert [segments(s) for s in scenes] == [[("plain", 0)], [("a", 0), ("b", 8)]]
    assert [s.key for s in scenes] == ["0:plain", "2:a [2s] | b"]
    records.write_text('{"prompt": "plain"}\n{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 8}]}\n')
    assert [segments(s) for s in PromptFile(str(records)).scenes()] == [segments(s) for s in scenes]
    for file, wrong in ((text, "a | b"), (records, "{}")):
        file.write_text(f"\n\n{wrong}\n")
        with pytest.raises(ValueError, match=rf"{file.name}:3: "):
            PromptFile(str(file)).scenes()


# The embedded world


@pytest.mark.parametrize("held_out", [False, True])
def test_switches_of_the_embedded_world_turn_an_object_and_keep_to_their_side_of_the_split(held_out: bool):
    scenes = ShapesSwitches(12, held_out=held_out).scenes()
    side = {s.prompt for s in ShapesCaptions(held_out=held_out).scenes()}
    assert len({s.key for s in scenes}) == len(scenes) > 8
    for scene in scenes:
        first, second = scene.segments
        old, new = parse_caption(first.prompt), parse_caption(second.prompt)
        assert (old.colour, old.shape) == (new.colour, new.shape) and old.direction != new.direction
        assert {first.prompt, second.prompt} <= side and second.start == 12


def test_switches_of_the_embedded_world_are_the_same_first_ones_whatever_the_limit():
    everything = ShapesSwitches().scenes()
    assert ShapesSwitches(limit=5).scenes() == everything[:5]
    assert len({scene.prompt for scene in everything[:24]}) > 12  # not the partners of a few captions


@pytest.mark.parametrize("wrong", [{"switch": 0}, {"limit": 0}])
def test_no_switch_and_no_scene_are_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match=r"ShapesSwitches\.switch and limit"):
        ShapesSwitches(**wrong)
