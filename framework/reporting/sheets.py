"""Clips as pictures that a person can judge at a glance: contact sheets, and before and after side by side."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from framework.reporting.videos import check_frames

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (31, 35, 40)
MUTED: Colour = (101, 109, 118)
RULE: Colour = (221, 225, 230)
AFTER: Colour = (9, 105, 218)
BETTER: Colour = (26, 127, 55)
WORSE: Colour = (190, 40, 46)

MARGIN = 20
GAP = 4
"""Pixels between frames of a row."""


@functools.cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it, so that pictures look the same on every machine."""
    import matplotlib  # late: only pictures with text need it

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def wrap_text(text: str, width: int, lines: int, size: int = 13) -> list[str]:
    """Break text at spaces into at most ``lines`` lines of ``width`` pixels; what does not fit ends in "…"."""

    def fits(line: str) -> bool:
        return font(size).getlength(line) <= width

    wrapped: list[str] = []
    words = text.split()
    while words and len(wrapped) < lines:
        line = words.pop(0)
        while words and fits(f"{line} {words[0]}"):
            line = f"{line} {words.pop(0)}"
        cut = not fits(line) or bool(words and len(wrapped) == lines - 1)
        while cut and line and not fits(line + "…"):
            line = line[:-1]
        wrapped.append(line.rstrip() + "…" if cut else line)
    return wrapped


def thumbnail(frame: Tensor, height: int) -> Image.Image:
    """A frame uint8 [3, H, W] at about ``height`` pixels: enlarged by a whole factor, or smoothly reduced."""
    image = Image.fromarray(frame.cpu().permute(1, 2, 0).contiguous().numpy())
    if image.height <= height:
        factor = height // image.height
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Row:
    """One clip of a sheet: its frames [T, 3, H, W], a label before them and lines of (text, colour) behind them."""

    frames: Tensor
    label: str = ""
    label_colour: Colour = MUTED
    end: tuple[tuple[str, Colour], ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A caption and the clips that belong to it."""

    caption: str
    rows: tuple[_Row, ...]


def _column(draw: ImageDraw.ImageDraw, x: int, middle: float, lines: Sequence[tuple[str, Colour]], size: int) -> None:
    """Lines of text below each other, vertically centred on ``middle``."""
    step = round(size * 1.4)
    for i, (line, colour) in enumerate(lines):
        draw.text((x, middle + (i - (len(lines) - 1) / 2) * step), line, colour, font(size), anchor="lm")


def _sheet(entries: Sequence[_Entry], title: str, end_title: str, every: int, height: int) -> Image.Image:
    """Title, frame numbers, then per entry its caption on the left and its rows of every ``every``-th frame."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    shown = range(0, len(entries[0].rows[0].frames), every)
    strips = [[[thumbnail(row.frames[t], height) for t in shown] for row in entry.rows] for entry in entries]
    wide, high = strips[0][0][0].size
    caption_width = 190
    label_width = max(round(font(13).getlength(row.label)) for entry in entries for row in entry.rows)
    end_width = max(
        [font(13).getlength(end_title), *(font(13).getlength(t) for e in entries for r in e.rows for t, _ in r.end)]
    )
    label_x = MARGIN + caption_width + 14
    frames_x = label_x + (label_width + 12 if label_width else 0)
    end_x = frames_x + len(shown) * (wide + GAP) - GAP + 14
    width = end_x + (round(end_width) + MARGIN if end_width else MARGIN - 14)
    top = MARGIN + (38 if title else 0) + 20
    tall = [len(entry.rows) * (high + GAP) - GAP for entry in entries]
    space = 14 if len(entries[0].rows) > 1 else GAP + 2  # rows of one caption stand closer than captions
    page = Image.new("RGB", (width, top + sum(tall) + space * (len(entries) - 1) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, font(19, bold=True), anchor="lt")
    numbered = max(1, -(-48 // (wide + GAP)))  # narrow frames: a number over every second or third
    for i, t in enumerate(shown):
        if i % numbered == 0:
            text = f"frame {t}" if i == 0 and wide >= 56 else str(t)
            draw.text((frames_x + i * (wide + GAP) + wide / 2, top - 7), text, MUTED, font(11), anchor="ms")
    draw.text((end_x, top - 7), end_title, MUTED, font(11), anchor="ls")
    y = top
    for entry, entry_strips, entry_height in zip(entries, strips, tall, strict=True):
        if y > top and len(entry.rows) > 1:
            draw.line([(MARGIN, y - space / 2), (width - MARGIN, y - space / 2)], RULE)
        lines = wrap_text(entry.caption, caption_width, max(1, (entry_height + 5) // 18))
        _column(draw, MARGIN, y + entry_height / 2, [(line, INK) for line in lines], 13)
        for row, strip in zip(entry.rows, entry_strips, strict=True):
            _column(draw, label_x, y + high / 2, [(row.label, row.label_colour)], 13)
            for i, image in enumerate(strip):
                page.paste(image, (frames_x + i * (wide + GAP), y))
            _column(draw, end_x, y + high / 2, row.end, 13)
            y += high + GAP
        y += space - GAP
    return page


def contact_sheet(
    frames: Tensor, captions: Sequence[str], every: int = 3, *, title: str = "", height: int = 64
) -> Image.Image:
    """One row per clip: its caption, then every ``every``-th frame.

    frames: uint8 [N, T, 3, H, W]. captions: N. height: pixels of a thumbnail. Raises ValueError for other counts.
    """
    check_frames(frames, "[N, T, 3, H, W]")
    _check_counts(len(frames), captions=captions)
    entries = [_Entry(text, (_Row(clip),)) for text, clip in zip(captions, frames, strict=True)]
    return _sheet(entries, title, "", every, height)


def before_after_sheet(
    before: Tensor,
    after: Tensor,
    captions: Sequence[str],
    scores_before: Sequence[float] | Tensor,
    scores_after: Sequence[float] | Tensor,
    every: int = 3,
    *,
    title: str = "Same caption, same noise: before and after alignment",
    height: int = 64,
) -> Image.Image:
    """Per caption a row of frames before and one after, each with its total reward; the gain stands under the latter.

    before, after: uint8 [N, T, 3, H, W] of one shape. captions, scores: N. Raises ValueError for other counts.
    """
    _check_pairs(before, after)
    _check_counts(len(before), captions=captions, scores_before=scores_before, scores_after=scores_after)
    entries = []
    for i, text in enumerate(captions):
        first, second = float(scores_before[i]), float(scores_after[i])
        entries.append(
            _Entry(
                text,
                (
                    _Row(before[i], "before", MUTED, ((f"{first:.3f}", MUTED),)),
                    _Row(after[i], "after", AFTER, ((f"{second:.3f}", INK), _gain(first, second))),
                ),
            )
        )
    return _sheet(entries, title, "reward", every, height)


def before_after_animation(
    before: Tensor,
    after: Tensor,
    captions: Sequence[str],
    scores_before: Sequence[float] | Tensor,
    scores_after: Sequence[float] | Tensor,
    columns: int = 3,
    *,
    height: int = 128,
) -> Tensor:
    """A grid of pairs that play side by side, with captions and rewards: frames uint8 [T, 3, H', W'] of even size.

    before, after: uint8 [N, T, 3, H, W] of one shape. captions, scores: N. columns: pairs per row. height: pixels of
    a frame. The result goes into `write_mp4` or `write_gif` as it is. Raises ValueError for other counts.
    """
    _check_pairs(before, after)
    _check_counts(len(before), captions=captions, scores_before=scores_before, scores_after=scores_after)
    _check_counts(len(before), captions=captions, scores_before=scores_before, scores_after=scores_after)
    n, time = before.shape[:2]
    columns = min(columns, n)
    scores = [(float(first), float(second)) for first, second in zip(scores_before, scores_after, strict=True)]
    wide, high = thumbnail(before[0, 0], height).size
    foot_texts = [(f"{first:.3f}", f"{second:.3f}", _gain(first, second)) for first, second in scores]
    words = max(font(12).getlength(f"after  {second}   {gain}") for _, second, (gain, _) in foot_texts)
    slot = max(wide, round(words))  # narrow frames: the numbers below them keep their place
    pair, head, foot, space = 2 * slot + GAP, 42, 24, 22
    cell = head + high + foot
    rows = -(-n // columns)
    size = 2 * MARGIN + columns * (pair + space) - space, 2 * MARGIN + rows * cell + (rows - 1) * space
    page = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), PAPER)
    draw = ImageDraw.Draw(page)
    corners = [(MARGIN + i % columns * (pair + space), MARGIN + i // columns * (cell + space) + head) for i in range(n)]
    for i, (x, y) in enumerate(corners):
        first, second, (gain, colour) = foot_texts[i]
        lines = wrap_text(captions[i], pair, 2)
        _column(draw, x, y - head / 2, [(line, INK) for line in lines], 13)
        draw.text((x, y + high + 8), f"before  {first}", MUTED, font(12), anchor="lt")
        draw.text((x + slot + GAP, y + high + 8), f"after  {second}", AFTER, font(12), anchor="lt")
        draw.text((x + pair, y + high + 8), gain, colour, font(12), anchor="rt")
    still = torch.from_numpy(np.array(page)).permute(2, 0, 1)
    movie = still.repeat(time, 1, 1, 1)
    for i, (x, y) in enumerate(corners):
        for t in range(time):
            for left, clip in ((x, before), (x + slot + GAP, after)):
                pixels = torch.from_numpy(np.array(thumbnail(clip[i, t], height))).permute(2, 0, 1)
                movie[t, :, y : y + high, left : left + wide] = pixels
    return movie


def _gain(before: float, after: float) -> tuple[str, Colour]:
    """The difference with its sign, and the colour that says whether it is good."""
    return f"{after - before:+.3f}", BETTER if after >= before else WORSE


def _check_pairs(before: Tensor, after: Tensor) -> None:
    check_frames(before, "[N, T, 3, H, W]")
    check_frames(after, "[N, T, 3, H, W]")
    if before.shape != after.shape:
        raise ValueError(f"before and after must have one shape, got {list(before.shape)} and {list(after.shape)}")


def _check_counts(clips: int, **lists: Sequence | Tensor) -> None:
    for name, values in lists.items():
        if len(values) != clips:
            raise ValueError(f"{clips} clips need as many {name}, got {len(values)}")
