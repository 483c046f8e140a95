"""Scenes are read as they are written, in both notations, and what is wrong is named with its file and line."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from framework.config.load import load_config
from framework.data.scene_files import scene_of_line, scene_of_record, script_of_line, script_of_record
from framework.data.scenes import Grouped, PromptFile, SceneSource, ShapesCaptions, ShapesSwitches
from framework.data.script import Cue, Script
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


# Cuts


def cues(script: Script) -> list[tuple[str, int, bool]]:
    return [(cue.prompt, cue.start, cue.cut) for cue in script.cues]


def test_a_mark_before_a_prompt_that_is_not_the_first_is_a_cut():
    read = script_of_line("# a [2f] | b [3s] |# c [1f]| d # e", "here", 2.0)
    assert cues(read) == [("# a", 0, False), ("b", 2, False), ("c", 8, True), ("d # e", 9, False)]
    assert read.cuts == (8,)
    record = '{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 3, "cut": true}]}'
    assert cues(script_of_record(record, "here")) == [("a", 0, False), ("b", 3, True)]


def test_a_scene_to_train_on_has_no_cut():
    record = '{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 3, "cut": true}]}'
    with pytest.raises(ValueError, match="here: '#' asks for a cut"):
        scene_of_record(record, "here")
    with pytest.raises(ValueError, match="the first segment cannot be a cut"):
        Script("s", (Cue("a", 0, True),))


CUES = st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=5, unique_by=lambda cue: cue[0])


def check_on_blocks(aligned: Callable[[Script, int], Script], size: int, later: list[tuple[int, bool]]) -> None:
    """Block by block: what has started by the end of the block before it is in force, and a cut among it is made."""
    script = Script("s", (Cue("0"), *(Cue(str(start), start, cut) for start, cut in sorted(later))))
    found = aligned(script, size)
    for frame in range(size, 60, size):
        started = [cue for cue in script.cues if frame - size < cue.start <= frame]
        wanted = None if not started else (started[-1].prompt, any(cue.cut for cue in started))
        cue = found.at(frame)
        assert (None if cue is None else (cue.prompt, cue.cut)) == wanted


def test_cues_take_effect_with_the_first_block_at_or_after_their_frame():
    holds(partial(check_on_blocks, Script.on_blocks), st.integers(1, 6), CUES)

    def earlier(script: Script, size: int) -> Script:
        return replace(script, cues=tuple(replace(c, start=c.start // size * size) for c in script.cues))

    far = CUES.map(lambda later: [(6 * start, cut) for start, cut in later])
    refuted(partial(check_on_blocks, lambda s, n: earlier(s, n).on_blocks(n)), st.integers(4, 5), far)


def test_scripts_and_scenes_agree_on_when_a_prompt_takes_effect():
    def check(size: int, later: list[tuple[int, bool]]) -> None:
        script = Script("s", (Cue("0"), *(Cue(str(start), start) for start, _ in sorted(later))))
        assert script.on_blocks(size).scene() == script.scene().on_blocks(size)

    holds(check, st.integers(1, 6), CUES)


# Lists of prompts that say nothing of time


def test_a_list_of_prompts_switches_at_its_frames_at_those_of_the_file_or_shares_the_clip():
    four = '{"prompts": ["a", "b", "c", "d"]}'
    switched = [("a", 0), ("b", 39), ("c", 75), ("d", 111)]
    own = '{"prompts": ["a", "b", "c", "d"], "switch_frames": [39, 75, 111]}'
    assert segments(scene_of_record(own, "here", None, (1, 2, 3))) == switched
    assert segments(scene_of_record(four, "here", None, (39, 75, 111))) == switched
    assert segments(scene_of_record(four, "here", 40)) == [("a", 0), ("b", 10), ("c", 20), ("d", 30)]
    assert segments(script_of_line("a | b | c | d", "here", None, 99, (39, 75, 111)).scene()) == switched
    assert segments(script_of_line("a [5f] | b", "here", None, None, (39,)).scene()) == [("a", 0), ("b", 5)]
    assert segments(scene_of_record('{"prompts": ["a"]}', "here", None, (39, 75))) == [("a", 0)]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"prompts": []}', "at least one text"),
        ('{"prompts": "a"}', "must be a list"),
        ('{"prompts": ["a", " "]}', "segment 2 must be a text that is not blank"),
        ('{"prompts": ["a", "b"]}', "nothing says when 2 prompts switch"),
        ('{"prompts": ["a", "b"], "switch_frames": [1, 2]}', 'switch 1 times, but "switch_frames" has 2'),
        ('{"prompts": ["a"], "switch_frames": [1]}', 'switch 0 times, but "switch_frames" has 1'),
        ('{"prompts": ["a", "b"], "switch_frames": "3"}', "must be a list of latent frame numbers"),
        ('{"prompts": ["a", "b"], "switch_frames": [1.5]}', "must be a list of latent frame numbers"),
        ('{"prompts": ["a", "b"], "switch_frames": [0]}', r"got \[0, 0\]"),
        ('{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 3, "cut": 1}]}', '"cut" of segment 2'),
    ],
)  # fmt: skip
def test_a_list_of_another_form_is_refused(record: str, said: str):
    with pytest.raises(ValueError, match=said) as error:
        scene_of_record(record, "scenes.jsonl:3")
    assert str(error.value).startswith("scenes.jsonl:3: ") and "\n" not in str(error.value)


def test_switch_frames_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"3 prompts switch 2 times, but switch_frames has 1 frames: \[7\]"):
        script_of_line("a | b | c", "here", None, None, (7,))


# Refusals


@pytest.mark.parametrize(
    ("line", "latent_fps", "said"),
    [
        ("a |  | b", 4.0, "prompt 2 of 3 between '|' is empty"),
        ("a [9] | b", 4.0, r"'a \[9\]' ends in no length; write \[5s\]"),
        ("a [10 s] | b", 4.0, "ends in no length"),
        ("a [2s] | b [3 Frames]", 4.0, "ends in no length"),
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


def test_a_column_of_prompts_is_read_as_it_stands(tmp_path: Path):
    table = tmp_path / "prompts.csv"
    table.write_text('id,prompt,time\n1,"a cat | 4k, # best",2023\n2,"two\nlines",2023\n', encoding="utf-8-sig")
    scenes = PromptFile(str(table)).scenes()
    assert [segments(scene) for scene in scenes] == [[("a cat | 4k, # best", 0)], [("two lines", 0)]]
    for text, said in (
        ("id,text\n1,a\n", r"prompts\.csv:1: the first line must name a column 'prompt', got \['id', 'text'\]"),
        ("id,prompt\n1,a\n2,\n", r"prompts\.csv:3: the column 'prompt' is empty"),
        ("id,prompt\n1\n", r"prompts\.csv:2: the column 'prompt' is empty"),
        ("prompt\n", "holds no prompt"),
        ("", "holds no prompt"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=said):
            PromptFile(str(table)).scenes()


def test_a_cut_in_a_file_to_train_on_is_named_with_its_line(tmp_path: Path):
    file = tmp_path / "scenes.txt"
    file.write_text("a\n\nb [2f] | # c\n")
    assert [script.cuts for script in PromptFile(str(file)).scripts()] == [(), (2,)]
    with pytest.raises(ValueError, match=r"scenes\.txt:3: '#' asks for a cut"):
        PromptFile(str(file)).scenes()


# Single prompts grouped into scenes


@dataclass(frozen=True)
class Listed(SceneSource):
    """Scenes as given."""

    given: tuple[Scene, ...]

    def scenes(self) -> tuple[Scene, ...]:
        return self.given


def singles(count: int) -> Listed:
    return Listed(tuple(Scene.single(f"p{i}") for i in range(count)))


def check_grouped(group: Callable[[int, int, int], tuple[Scene, ...]], count: int, size: int, seed: int) -> None:
    scenes = group(count, size, seed)
    used = [segment.prompt for scene in scenes for segment in scene.segments]
    assert len(scenes) == count // size and len(used) == len(set(used))
    assert all([s.start for s in scene.segments] == [7 * i for i in range(size)] for scene in scenes)
    assert group(count, size, seed) == scenes


SIZES = st.integers(4, 30), st.integers(2, 4), st.integers(0, 99)


def test_grouping_uses_every_prompt_once_and_depends_on_the_seed_alone():
    def grouped(count: int, size: int, seed: int) -> tuple[Scene, ...]:
        return Grouped(singles(count), size, 7, seed).scenes()

    holds(partial(check_grouped, grouped), *SIZES)
    assert grouped(20, 2, 0) != grouped(20, 2, 1)

    def overlapping(count: int, size: int, seed: int) -> tuple[Scene, ...]:
        return grouped(count, size, seed)[:-1] + grouped(count, size, seed)[:1]

    refuted(partial(check_grouped, overlapping), *SIZES)


def test_a_rewriting_model_sees_the_prompts_of_a_scene_once():
    asked: list[list[str]] = []

    def rewrite(prompts: Sequence[str]) -> list[str]:
        asked.append(list(prompts))
        return [f"{prompt} of {len(prompts)}" for prompt in prompts]

    source = Grouped(singles(7), 3, 7, 0, rewrite)
    plain = Grouped(singles(7), 3, 7, 0).scenes()
    for _ in range(2):
        assert [[s.prompt for s in scene.segments] for scene in source.scenes()] == [
            [f"{s.prompt} of 3" for s in scene.segments] for scene in plain
        ]
    assert asked == [[s.prompt for s in scene.segments] for scene in plain]


@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        (singles(3), {"segments": 1}, r"Grouped\.segments must be at least 2"),
        (singles(3), {"segment_frames": 0}, r"segment_frames at least 1"),
        (singles(1), {}, r"Grouped\.segments=2 needs as many prompts, the source has 1"),
        (ShapesSwitches(limit=2), {}, "switches by itself"),
        (singles(2), {"rewrite": lambda prompts: prompts[:1]}, "must return 2 texts"),
        (singles(2), {"rewrite": lambda prompts: ["", "x"]}, "must return 2 texts"),
    ],
)
def test_what_cannot_be_grouped_is_refused(source: SceneSource, more: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Grouped(source, **more).scenes()


def test_grouping_and_its_rewriting_model_can_be_named_in_gin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "story_plugin.py").write_text(
        "def upper(prompts: list[str], /, mark: str = '!') -> list[str]:\n"
        "    return [prompt.upper() + mark for prompt in prompts]\n"
    )
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path)
    lines = (
        "train.scenes = @scenes.Grouped()", "scenes.Grouped.source = @scenes.PromptFile()",
        "scenes.PromptFile.path = 'prompts.txt'", "scenes.Grouped.rewrite = @story_plugin.upper",
        "story_plugin.upper.mark = '?'",
    )  # fmt: skip
    built = load_config(
        "train", gin_files=["embedded/nft.gin"], gin_params=lines, plugins=["story_plugin.py"],
        flags={"output_dir": "nowhere"},
    ).build()["scenes"]  # fmt: skip
    (scene,) = built.scenes()
    assert sorted(segment.prompt for segment in scene.segments) == ["A?", "B?"]


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
