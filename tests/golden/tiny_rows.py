"""What a rewards file does not say about its batch, read off what it does say: seeds of frames, text, token ids.

    first row   its six first pixels are the first six draws of its seed
    others      the packaged seeds, consecutive ones, or those with which the sum of all pixels comes out
    text        the file's own token rows; ids of special tokens stand at fixed places of a row

A seed counts as found where the whole sum agrees to a billionth: what it is then compared with is not weakened.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.preprocess import MEAN, STD, normalise, patchify, token_count

SEEDS, FEW_SEEDS = 1 << 14, 1 << 10
"""How many seeds are tried for one row, and for each of two."""
PLACES = {
    "videoalign": ("video", 6, {"VQ": 10, "MQ": 18, "TA": 25}),
    "hpsv3": ("image", 5, {"reward": 16}),
}
"""Per model: the vision token, where the first of them stands, and where the reward tokens stand behind the last."""


def drawn_frames(row: Mapping[str, Any]) -> Tensor:
    """Frames [T, 3, H, W] of a row in 0 … 255, float32; an image is one frame."""
    *count, height, width = row["shape"]
    drawn = np.random.RandomState(row["frame_seed"]).randint(0, 256, (*count, 3, height, width))
    return torch.from_numpy(drawn.astype(np.float32)).view(*(count or [1]), 3, height, width)


def patch_sum(row: Mapping[str, Any]) -> float:
    """The sum of a row's patches."""
    return float(patchify(normalise(drawn_frames(row)))[0].double().sum())


def known_rows(
    model: str, layout: Any, total: float | None, packaged: Sequence[Mapping[str, Any]], tokens_of: Callable
) -> list[dict[str, Any]]:
    """The rows of a batch: the packaged ones, or what a file's ``layout`` says, with seeds that fit it.

    total: of all patches, where the file says it. tokens_of: (row, grid) → token ids of a row with a text seed. Raises
    ValueError where a file has another batch and no seeds are found.
    """
    if not isinstance(layout, dict) or "grid_thw" not in layout:
        return [dict(row) for row in packaged]
    images = len(packaged[0]["shape"]) == 2
    grids = [tuple(grid) for grid in layout["grid_thw"]]
    rows = [{"shape": ([] if images else [2 * t]) + [14 * h, 14 * w]} for t, h, w in grids]
    same = len(rows) == len(packaged)
    first = layout.get("pixel_values_row0_first6")
    found = _seeds(
        model,
        None if first is None or total is None else tuple(round((x * STD[0] + MEAN[0]) * 255) for x in first),
        total or 0.0,
        tuple(tuple(row["shape"]) for row in rows),
        tuple(row["frame_seed"] for row in packaged),
    )
    for row, seed in zip(rows, found, strict=True):
        row["frame_seed"] = seed
    for i, grid in enumerate(grids):
        text = {name: value for name, value in packaged[i].items() if name.startswith("text")} if same else {}
        given = layout.get("input_ids")
        if given is None and not text:
            raise ValueError(f"{model}: {len(rows)} rows, and neither input_ids nor a config says their text")
        rows[i] |= text if text and (given is None or tokens_of(text, grid) == given[i]) else {"input_ids": given[i]}
    return rows


@functools.cache
def _seeds(
    model: str,
    pixels: tuple[int, ...] | None,
    total: float,
    shapes: tuple[tuple[int, ...], ...],
    packaged: tuple[int, ...],
) -> tuple[int, ...]:
    """Of the frames of each row. pixels: the first ones of the first row, None where there is nothing to go by."""
    if pixels is not None:
        starts = (
            packaged[0] if _starts(packaged[0], pixels) else next((n for n in range(SEEDS) if _starts(n, pixels)), None)
        )
        for seeds in () if starts is None else _candidates(starts, total, shapes, packaged):
            sums = [patch_sum({"shape": shape, "frame_seed": n}) for shape, n in zip(shapes, seeds, strict=True)]
            if abs(sum(sums) - total) <= 1e-9 * max(1.0, abs(total)):
                return seeds
    if len(shapes) == len(packaged):
        return packaged  # pixels and scores miss if they are not the ones
    raise ValueError(f"{model}: no seeds are found for the {len(shapes)} rows of frames; say them in the file's config")


def _candidates(
    first: int, total: float, shapes: Sequence[tuple[int, ...]], packaged: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Seeds of all rows that may be the ones, likely ones first."""
    if len(shapes) == len(packaged):
        yield first, *packaged[1:]
    for step in range(1, 101):
        yield tuple(first + step * i for i in range(len(shapes)))
        if len(shapes) < 4:  # then the sum finds any others
            break
    left = total - _quick_sum(shapes[0], first)
    if len(shapes) == 2:
        yield from ((first, n) for n in range(SEEDS) if abs(_quick_sum(shapes[1], n) - left) < 1e-2)
    if len(shapes) == 3:
        second, third = (np.array([_quick_sum(shape, n) for n in range(FEW_SEEDS)]) for shape in shapes[1:])
        for a, b in zip(*np.nonzero(np.abs(second[:, None] + third - left) < 1e-2), strict=True):
            yield first, int(a), int(b)


def _starts(seed: int, pixels: Sequence[int]) -> bool:
    return tuple(np.random.RandomState(seed).randint(0, 256, len(pixels)).tolist()) == tuple(pixels)


def _quick_sum(shape: Sequence[int], seed: int) -> float:
    """`patch_sum` up to the rounding of float32."""
    *count, height, width = shape
    drawn = np.random.RandomState(seed).randint(0, 256, (*(count or [1]), 3, height, width))
    sums, size = drawn.sum((0, 2, 3)), drawn[:, 0].size
    total = sum((s / 255 - size * mean) / std for s, mean, std in zip(sums, MEAN, STD, strict=True))
    return float(total) * (1 if count else 2)  # an image fills both frames of its patches


def known_tokens(model: str, layout: Any, packaged: Mapping[str, int], vocabulary: int) -> dict[str, int]:
    """Ids of the special tokens where a file's rows have them at the places that its README names, else the packaged.

    Ids that a row does not have move out of the way of those that it has.
    """
    if not isinstance(layout, dict) or not {"input_ids", "grid_thw"} <= layout.keys():
        return dict(packaged)
    vision, at, places = PLACES[model]
    readings = []
    for row, grid in zip(layout["input_ids"], layout["grid_thw"], strict=True):
        end = at + token_count(tuple(grid))
        if len(row) <= end + 1 + max(places.values()) or len(set(row[at:end])) != 1:
            return dict(packaged)
        read = {"vision_start": row[at - 1], vision: row[at], "vision_end": row[end]}
        readings.append(read | {name: row[end + 1 + place] for name, place in places.items()})
    read = readings[0]
    if any(left != right for left, right in pairwise(readings)) or len(set(read.values())) < len(read):
        return dict(packaged)
    ids = dict(read)
    free = (token for token in range(vocabulary - 1, -1, -1) if token not in {*read.values(), *packaged.values()})
    for name, token in packaged.items():
        if name not in ids:
            ids[name] = token if token not in ids.values() and token < vocabulary else next(free)
    return ids
