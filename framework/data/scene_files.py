"""The notations of scenes: a line of text, ``a [5s] | b [5s] | # c``, and a JSON object per line."""

import json
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from framework.data.script import Cue, Script
from framework.types import Scene

LENGTH = re.compile(r"(?P<prompt>.*?)\s*\[(?P<number>\d{1,9}(?:\.\d{1,9})?)(?P<unit>[sf])\]", re.DOTALL)
"""A prompt and how long it holds, in seconds or in latent frames."""
NEARLY_LENGTH = re.compile(r".*\[\s*\d+(\.\d+)?\s*(s|f|secs?|seconds?|frames?)?\s*\]", re.DOTALL | re.IGNORECASE)
"""What was meant as a length, by the look of it."""
RECORDS = ({"prompt"}, {"segments"}, {"prompts"}, {"prompts", "switch_frames"})
"""The keys that a JSON object may have."""


def scene_of_line(line: str, where: str, latent_fps: float | None = None, frames: int | None = None) -> Scene:
    """The scene of `script_of_line`. Raises ValueError for what that refuses, and for a cut (``| # c``)."""
    return _without_cuts(script_of_line(line, where, latent_fps, frames), where)


def scene_of_record(line: str, where: str, frames: int | None = None, switch_frames: Sequence[int] = ()) -> Scene:
    """The scene of `script_of_record`. Raises ValueError for what that refuses, and for a cut."""
    return _without_cuts(script_of_record(line, where, frames, switch_frames), where)


def _without_cuts(script: Script, where: str) -> Scene:
    try:
        return script.scene()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def script_of_line(
    line: str,
    where: str,
    latent_fps: float | None = None,
    frames: int | None = None,
    switch_frames: Sequence[int] = (),
) -> Script:
    """``a [5s] | b [20f] | # c``: prompts in order, each with its length in seconds or latent frames; # is a cut.

    The last needs no length. latent_fps: latent frames per second, for lengths in seconds; a switch is rounded to a
    frame. Prompts without any length start at frame 0 and at ``switch_frames``, or share the ``frames`` of the whole
    clip equally. where: file and line, for errors. Raises ValueError for an empty prompt, a missing length and a
    length that rounds to nothing.
    """
    parts = [part.strip() for part in line.split("|")]
    cuts = [number > 0 and part.startswith("#") for number, part in enumerate(parts)]
    parts = [part[1:].strip() if cut else part for part, cut in zip(parts, cuts, strict=True)]
    read = [
        (m["prompt"], float(m["number"]), m["unit"]) if (m := LENGTH.fullmatch(p)) else (p, None, "") for p in parts
    ]
    for number, (prompt, _, _) in enumerate(read):
        if not prompt:
            raise ValueError(f"{where}: prompt {number + 1} of {len(read)} between '|' is empty in {line.strip()!r}")
        if len(read) > 1 and NEARLY_LENGTH.fullmatch(prompt):
            raise ValueError(f"{where}: {prompt!r} ends in no length; write [5s] for seconds, [20f] for frames")
    lengths = [(number, unit) for _, number, unit in read[:-1]]
    if all(number is None for number, _ in lengths) and (frames is not None or switch_frames):
        starts = _given_starts(len(read), where, frames, switch_frames)
    else:
        starts = _starts(lengths, where, latent_fps)
    return _script(line.strip(), [prompt for prompt, _, _ in read], starts, cuts, where)


def _given_starts(count: int, where: str, frames: int | None, switch_frames: Sequence[int]) -> list[int]:
    """First frame of every prompt of a list that says nothing of time."""
    if count > 1 and switch_frames:
        if len(switch_frames) != count - 1:
            raise ValueError(
                f"{where}: {count} prompts switch {count - 1} times, but switch_frames has {len(switch_frames)} "
                f"frames: {list(switch_frames)}"
            )
        return [0, *switch_frames]
    if count > 1 and frames is None:
        raise ValueError(
            f'{where}: nothing says when {count} prompts switch; add "switch_frames" to the record, or set '
            f"PromptFile.switch_frames or PromptFile.frames"
        )
    return [(frames or 0) * i // count for i in range(count)]


def _starts(lengths: Sequence[tuple[float | None, str]], where: str, latent_fps: float | None) -> list[int]:
    """First frame of every prompt, from the lengths of all but the last."""
    exact: list[float] = [0.0]
    for number, unit in lengths:
        if number is None:
            raise ValueError(f"{where}: every prompt but the last needs its length: 'a [5s] | b' or 'a [20f] | b'")
        if unit == "s" and latent_fps is None:
            raise ValueError(
                f"{where}: a length in seconds needs PromptFile.latent_fps, the generator's latent frames per second; "
                f"or write it in latent frames, '[20f]'"
            )
        exact.append(number * (latent_fps or 0.0) if unit == "s" else number)
    return [round(start) for start in accumulate(exact)]


def script_of_record(line: str, where: str, frames: int | None = None, switch_frames: Sequence[int] = ()) -> Script:
    """``{"prompt": "a"}``, ``{"prompts": ["a", "b"], "switch_frames": [21]}``, or
    ``{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 21}, {"prompt": "c", "start": 42, "cut": true}]}``.

    Frames are latent frames. Prompts without switch frames of their own take ``switch_frames``, or share ``frames``.
    Raises ValueError that names file and line for anything else.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or set(record) not in RECORDS:
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f'{where}: a scene is an object with "prompt", "segments" or "prompts" (and "switch_frames") and nothing '
            f"else, got {keys}"
        )
    if "prompts" in record:
        return _listed(record, where, frames, switch_frames)
    segments = record.get("segments", [record])
    if not isinstance(segments, list) or not segments:
        raise ValueError(f'{where}: "segments" must be a list of at least one segment')
    read = [_segment(segment, number, where) for number, segment in enumerate(segments)]
    prompts, starts = [prompt for prompt, _, _ in read], [start for _, start, _ in read]
    return _script(" | ".join(prompts), prompts, starts, [cut for _, _, cut in read], where)


def _listed(record: dict[str, Any], where: str, frames: int | None, switch_frames: Sequence[int]) -> Script:
    """The script of a list of prompts."""
    prompts, switches = record["prompts"], record.get("switch_frames", switch_frames)
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f'{where}: "prompts" must be a list of at least one text')
    prompts = [_prompt(prompt, number, where) for number, prompt in enumerate(prompts)]
    if not isinstance(switches, list | tuple) or any(type(frame) is not int for frame in switches):
        raise ValueError(f'{where}: "switch_frames" must be a list of latent frame numbers, got {switches!r}')
    if "switch_frames" in record and len(switches) != len(prompts) - 1:
        raise ValueError(
            f'{where}: {len(prompts)} prompts switch {len(prompts) - 1} times, but "switch_frames" has {len(switches)}'
        )
    starts = _given_starts(len(prompts), where, frames, switches)
    return _script(" | ".join(prompts), prompts, starts, [False] * len(prompts), where)


def _segment(segment: Any, number: int, where: str) -> tuple[str, int, bool]:
    """(prompt, first frame, whether it is a cut) of one segment of a record."""
    needed, known = ({"prompt"}, {"prompt", "start"}) if number == 0 else ({"prompt", "start"},) * 2
    if not isinstance(segment, dict) or not needed <= set(segment) <= known | ({"cut"} if number else set()):
        raise ValueError(
            f'{where}: segment {number + 1} must be an object with "prompt" and "start" (the first may leave start '
            f'out, the others may have "cut")'
        )
    start, cut = segment.get("start", 0), segment.get("cut", False)
    prompt = _prompt(segment["prompt"], number, where)
    if type(start) is not int or start < 0:
        raise ValueError(f"{where}: the start of segment {number + 1} must be a frame number ≥ 0, got {start!r}")
    if type(cut) is not bool:
        raise ValueError(f'{where}: "cut" of segment {number + 1} must be true or false, got {cut!r}')
    return prompt, start, cut


def _prompt(prompt: Any, number: int, where: str) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"{where}: the prompt of segment {number + 1} must be a text that is not blank, got {prompt!r}"
        )
    return prompt.strip()


def _script(key: str, prompts: Sequence[str], starts: Sequence[int], cuts: Sequence[bool], where: str) -> Script:
    """Raises ValueError that names the place where the starts do not rise from 0."""
    try:
        return Script(key, tuple(Cue(*cue) for cue in zip(prompts, starts, cuts, strict=True)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
