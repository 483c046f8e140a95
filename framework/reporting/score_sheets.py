"""What a reward likes, to be looked at: clips of any size below each other, the best first."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch import Tensor

from framework.reporting.sheets import (
    AFTER,
    GAP,
    INK,
    MARGIN,
    MUTED,
    PAPER,
    RULE,
    font,
    thumbnail,
    wrap_text,
)

HEIGHT, SHOWN = 80, 8
"""Pixels of a thumbnail; frames of a clip that are shown, evenly spaced from the first to the last."""
WORDS, NUMBERS = 230, 100


@dataclass(frozen=True)
class Strip:
    """A clip as a row of a sheet: its thumbnails, its name, its prompt and its score."""

    frames: tuple[Image.Image, ...]
    name: str
    prompt: str
    score: float


def thumbnails(frames: Tensor) -> tuple[Image.Image, ...]:
    """Some frames of a clip uint8 [T, 3, H, W], from the first to the last."""
    last = len(frames) - 1
    chosen = sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)})
    return tuple(thumbnail(frames[t], HEIGHT) for t in chosen)


def best_and_worst(strips: Sequence[Strip], most: int) -> list[Strip | int]:
    """Strips in falling order of their scores; of more than ``most`` the best and the worst, with the number of those
    left out between them."""
    ranked = sorted(strips, key=lambda strip: -strip.score)
    if len(ranked) <= most:
        return list(ranked)
    top = most - most // 2
    return [*ranked[:top], len(ranked) - most, *ranked[-(most // 2) :]]


def score_sheet(strips: Sequence[Strip], title: str, most: int = 24) -> Image.Image:
    """Rows of score, name and prompt, frames; a bar shows where each score lies between the lowest and the highest.

    Raises ValueError where there is nothing to show, or room for fewer than two rows.
    """
    if not strips or most < 2:
        raise ValueError(f"a sheet needs at least one clip and room for two rows, got {len(strips)} and {most}")
    rows = best_and_worst(strips, most)
    shown = [row for row in rows if isinstance(row, Strip)]
    wide = max(image.width for strip in shown for image in strip.frames)
    columns = max(len(strip.frames) for strip in shown)
    frames_x = MARGIN + NUMBERS + WORDS + 28
    width = max(frames_x + columns * (wide + GAP) - GAP, MARGIN + round(font(19, bold=True).getlength(title))) + MARGIN
    heights = [30 if isinstance(row, int) else max(image.height for image in row.frames) + 12 for row in rows]
    top = MARGIN + 40
    page = Image.new("RGB", (width, top + sum(heights) + MARGIN - 12), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font(19, bold=True), anchor="lt")
    low, high = min(strip.score for strip in strips), max(strip.score for strip in strips)
    y, rank = top, 0
    for row, height in zip(rows, heights, strict=True):
        middle = y + (height - 12) / 2
        if isinstance(row, int):
            draw.text((MARGIN, y + 9), f"… {row} more …", MUTED, font(13), anchor="lm")
            rank += row
        else:
            rank += 1
            share = (row.score - low) / (high - low) if high > low else 1.0
            draw.text((MARGIN, middle - 8), f"{rank}", MUTED, font(11), anchor="lm")
            draw.text((MARGIN + NUMBERS - 14, middle - 8), f"{row.score:.3f}", INK, font(15, bold=True), anchor="rm")
            draw.rectangle([(MARGIN, middle + 8), (MARGIN + NUMBERS - 14, middle + 11)], RULE)
            if share > 0:
                draw.rectangle([(MARGIN, middle + 8), (MARGIN + share * (NUMBERS - 14), middle + 11)], AFTER)
            _words(draw, MARGIN + NUMBERS + 8, middle, row, height)
            for i, image in enumerate(row.frames):
                page.paste(image, (frames_x + i * (wide + GAP), y))
        y += height
    return page


def _words(draw: ImageDraw.ImageDraw, x: int, middle: float, strip: Strip, height: int) -> None:
    """The name, then as much of the prompt as there is room for, vertically centred."""
    named = [(line, MUTED, 11) for line in wrap_text(strip.name, WORDS, 1, size=11)]
    lines = named + [(line, INK, 13) for line in wrap_text(strip.prompt, WORDS, max(1, (height - 24) // 18))]
    for i, (line, colour, size) in enumerate(lines):
        draw.text((x, middle + (i - (len(lines) - 1) / 2) * 18), line, colour, font(size), anchor="lm")
