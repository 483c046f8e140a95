"""The embedded world: one coloured shape that drifts over a 16×16 torus, with captions that say what it does.

Pixels are latents (RGB in [−1, 1]); wrap-around keeps "moves left" true for ever, so streams of any length are well
defined. The world is flawed on purpose, as the data of real generators is: in `PreferenceWorld` every caption is true,
but exposure, blur, speed and steadiness vary from clip to clip without a word about it. A model trained on it produces
good and bad clips for one caption, and only a reward can tell it which ones people prefer.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 16
"""Height and width in pixels; also the period of the torus."""
RADIUS = 3.2
"""Every shape has the area π r² of a circle of this radius (pixels)."""
BACKGROUND = 0.08
"""Grey level of the background in [0, 1]."""
PALETTE = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "magenta": (0.85, 0.20, 0.85),
    "cyan": (0.20, 0.85, 0.90),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
SPEEDS = {"slowly": 0.6, "quickly": 1.3}
"""Pixels per frame."""
VOCABULARY = ("a", "moves", *PALETTE, *SHAPES, *DIRECTIONS, *SPEEDS)


@dataclass(frozen=True)
class Caption:
    """What a caption of the world says: four words that matter out of six."""

    colour: str
    shape: str
    direction: str
    speed: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction} {self.speed}"

    @property
    def velocity(self) -> tuple[float, float]:
        """(x, y) in pixels per frame; y points down."""
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]


CAPTIONS: tuple[Caption, ...] = tuple(
    Caption(*words) for words in itertools.product(PALETTE, SHAPES, DIRECTIONS, SPEEDS)
)
"""All 144 captions."""


def parse_caption(text: str) -> Caption:
    """Read a caption back. Raises ValueError that shows the grammar."""
    words = text.lower().strip().rstrip(".").split()
    grammar = "a COLOUR SHAPE moves DIRECTION SPEED"
    if len(words) == 6 and words[0] == "a" and words[3] == "moves":
        caption = Caption(words[1], words[2], words[4], words[5])
        if caption in _CAPTION_SET:
            return caption
    raise ValueError(
        f"the embedded world cannot read the caption {text!r}; it must be {grammar!r} with "
        f"{'/'.join(PALETTE)}, {'/'.join(SHAPES)}, {'/'.join(DIRECTIONS)}, {'/'.join(SPEEDS)}"
    )


_CAPTION_SET = frozenset(CAPTIONS)


def split_captions(held_out: int = 24, seed: int = 0) -> tuple[tuple[Caption, ...], tuple[Caption, ...]]:
    """(captions for RL, captions never used in RL), a fixed shuffle of all 144."""
    if not 0 < held_out < len(CAPTIONS):
        raise ValueError(f"held_out_count={held_out} must lie in 1 … {len(CAPTIONS) - 1}")
    order = torch.randperm(len(CAPTIONS), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(CAPTIONS[i] for i in order[held_out:]), tuple(CAPTIONS[i] for i in order[:held_out])


def colour_table() -> Tensor:
    """[6, 3] colours in [0, 1], in the order of PALETTE."""
    return torch.tensor(list(PALETTE.values()))


def wrap(offset: Tensor) -> Tensor:
    """Signed distance on the torus, in [−SIZE/2, SIZE/2)."""
    return (offset + SIZE / 2) % SIZE - SIZE / 2


def coverage(centre: Tensor) -> Tensor:
    """How much of each pixel each shape covers: centre [..., 2] (x, y) → [..., 3 shapes, SIZE, SIZE] in [0, 1].

    Anti-aliased by the signed distance to the outline; a pixel is its integer coordinate.
    """
    pixels = torch.arange(SIZE, dtype=centre.dtype)
    x = wrap(pixels - centre[..., 0:1])[..., None, :]  # [..., 1, SIZE]
    y = wrap(pixels - centre[..., 1:2])[..., :, None]
    x, y = torch.broadcast_tensors(x, y)
    circle = (x.square() + y.square()).sqrt() - RADIUS
    square = torch.maximum(x.abs(), y.abs()) - RADIUS * math.sqrt(math.pi) / 2
    inradius = RADIUS * math.sqrt(math.pi / (3 * math.sqrt(3)))  # of the equilateral triangle of area π r²
    slanted = math.sqrt(3) / 2 * x.abs() - 0.5 * y
    triangle = torch.maximum(slanted, y) - inradius
    return (0.5 - torch.stack([circle, square, triangle], dim=-3)).clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over the last two dimensions, wrapping around."""
    reach = math.ceil(2.5 * sigma)
    weights = torch.tensor([math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1)])
    weights = weights / weights.sum()
    for dim in (-1, -2):
        image = sum(
            w * image.roll(i, dims=dim) for w, i in zip(weights.tolist(), range(-reach, reach + 1), strict=True)
        )  # pyright: ignore
    return image


@dataclass(frozen=True)
class ClipFactors:
    """What varies between clips of one caption and is in no caption. Each is [N]."""

    exposure: Tensor  # brightness factor, 1 is correct
    blurred: Tensor  # bool
    pace: Tensor  # factor on the caption's speed, 1 is correct
    jitter: Tensor  # std of the per-frame position error in pixels

    @classmethod
    def clean(cls, n: int) -> "ClipFactors":
        """The clips that the reward's ceiling is measured on."""
        return cls(torch.ones(n), torch.zeros(n, dtype=torch.bool), torch.ones(n), torch.zeros(n))


def render_clips(
    captions: Sequence[Caption], frames: int, factors: ClipFactors, generator: torch.Generator, blur_sigma: float = 0.8
) -> Tensor:
    """Clips [N, 3, frames, SIZE, SIZE] in [−1, 1], from a random start position."""
    n = len(captions)
    colour = colour_table()[torch.tensor([list(PALETTE).index(c.colour) for c in captions])]
    shape = torch.tensor([SHAPES.index(c.shape) for c in captions])
    velocity = torch.tensor([c.velocity for c in captions]) * factors.pace[:, None]
    time = torch.arange(frames, dtype=torch.float32)
    start = torch.rand(n, 1, 2, generator=generator) * SIZE
    shake = torch.randn(n, frames, 2, generator=generator) * factors.jitter[:, None, None]
    centre = start + velocity[:, None] * time[None, :, None] + shake
    cover = coverage(centre)[torch.arange(n), :, shape]  # [N, frames, SIZE, SIZE]
    if factors.blurred.any():
        cover = torch.where(factors.blurred[:, None, None, None], blur(cover, blur_sigma), cover)
    pixel = BACKGROUND + cover[:, None] * (colour - BACKGROUND)[:, :, None, None, None]
    return 2 * factors.exposure[:, None, None, None, None] * pixel - 1


@dataclass(frozen=True)
class PreferenceWorld:
    """Training data with true words and unlabelled, persistent quality factors per clip.

    exposure_min: exposure ~ U(exposure_min, 1). blurred: share of blurred clips. pace: speed factor ~ U(*pace).
    jittered, jitter: share of shaky clips and their position error in pixels. held_out_count: how many captions are
    kept back, the same that `ShapesCaptions` holds out; none for pre-training.
    """

    exposure_min: float = 0.45
    blurred: float = 0.3
    pace: tuple[float, float] = (0.5, 1.5)
    jittered: float = 0.2
    jitter: float = 0.35
    held_out_count: int = 0

    def sample(self, n: int, frames: int, generator: torch.Generator) -> tuple[Tensor, list[Caption]]:
        """n clips of random captions: (latents [n, 3, frames, SIZE, SIZE] in [−1, 1], their captions)."""
        known = split_captions(self.held_out_count)[0] if self.held_out_count else CAPTIONS
        captions = [known[i] for i in torch.randint(len(known), (n,), generator=generator).tolist()]
        low, high = self.pace
        factors = ClipFactors(
            exposure=self.exposure_min + (1 - self.exposure_min) * torch.rand(n, generator=generator),
            blurred=torch.rand(n, generator=generator) < self.blurred,
            pace=low + (high - low) * torch.rand(n, generator=generator),
            jitter=self.jitter * (torch.rand(n, generator=generator) < self.jittered),
        )
        return render_clips(captions, frames, factors, generator), captions
