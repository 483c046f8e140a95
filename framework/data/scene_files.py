"""The two notations of scenes: a line of text, ``a [5s] | b [5s] | c``, and a JSON object per line."""

import json
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from framework.types import Scene, Segment

LENGTH = re.compile(r"(?P<prompt>.*?)\s*\[(?P<number>\d{1,9}(?:\.\d{1,9})?)(?P<unit>[sf])\]", re.DOTALL)
"""A prompt and how long it holds, in seconds or in latent frames."""


def scene_of_line(line: str, where: str, latent_fps: float | None = None, frames: int | None = None) -> Scene:
    """``a [5s] | b [20f] | c``: prompts in order, each with its length in seconds or latent frames.

    The last needs no length. latent_fps: latent frames per second, for lengths in seconds; a switch is rounded to a
    frame. frames: of the whole clip, which prompts without any length share equally. where: file and line, for errors.
    Raises ValueError for an empty prompt, a missing length, a length that rounds to nothing, and a cut (``| # c``).
    """
    parts = [part.strip() for part in line.split("|")]
    read = [
        (m["prompt"], float(m["number"]), m["unit"]) if (m := LENGTH.fullmatch(p)) else (p, None, "") for p in parts
    ]
    for number, (prompt, _, _) in enumerate(read):
        if not prompt:
            raise ValueError(f"{where}: prompt {number + 1} of {len(read)} between '|' is empty in {line.strip()!r}")
        if number and prompt.startswith("#"):
            raise ValueError(
                f"{where}: '#' asks for a cut, which forgets the past, and only switches that keep it are supported; "
                f"remove '#' from {prompt!r}"
            )
    lengths = [(number, unit) for _, number, unit in read[:-1]]
    if all(number is None for number, _ in lengths) and frames is not None:
        starts = [frames * i // len(read) for i in range(len(read))]
    else:
        starts = _starts(lengths, where, latent_fps)
    return _scene(line.strip(), [prompt for prompt, _, _ in read], starts, where)


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


def scene_of_record(line: str, where: str) -> Scene:
    """``{"prompt": "a"}`` or ``{"segments": [{"prompt": "a"}, {"prompt": "b", "start": 21}]}``; start in latent frames.

    Raises ValueError that names file and line for anything else.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or set(record) not in ({"prompt"}, {"segments"}):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f'{where}: a scene is an object with "prompt" or "segments" and nothing else, got {keys}')
    segments = record.get("segments", [record])
    if not isinstance(segments, list) or not segments:
        raise ValueError(f'{where}: "segments" must be a list of at least one segment')
    read = [_segment(segment, number, where) for number, segment in enumerate(segments)]
    prompts, starts = [prompt for prompt, _ in read], [start for _, start in read]
    return _scene(" | ".join(prompts), prompts, starts, where)


def _segment(segment: Any, number: int, where: str) -> tuple[str, int]:
    """(prompt, first frame) of one segment of a record."""
    needed = {"prompt"} if number == 0 else {"prompt", "start"}
    if not isinstance(segment, dict) or not needed <= set(segment) <= {"prompt", "start"}:
        raise ValueError(
            f'{where}: segment {number + 1} must be an object with "prompt" and "start" (the first may leave start out)'
        )
    prompt, start = segment["prompt"], segment.get("start", 0)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"{where}: the prompt of segment {number + 1} must be a text that is not blank, got {prompt!r}"
        )
    if type(start) is not int or start < 0:
        raise ValueError(f"{where}: the start of segment {number + 1} must be a frame number ≥ 0, got {start!r}")
    return prompt.strip(), start


def _scene(key: str, prompts: Sequence[str], starts: Sequence[int], where: str) -> Scene:
    """Raises ValueError where the starts do not rise from 0."""
    if starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueError(
            f"{where}: segments must start at frame 0 and then each after the one before it, got {list(starts)}"
        )
    return Scene(key, tuple(Segment(prompt, start) for prompt, start in zip(prompts, starts, strict=True)))
