"""The first frames of a video that somebody else made: a picture or a clip, read for a generator to go on from."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from framework.interfaces import GeneratorRecipe, StreamingGenerator
from framework.reporting.read_videos import read_clip

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_frames(path: str | Path) -> tuple[Tensor, float | None]:
    """(uint8 [T, 3, H, W], frames per second or None) of a picture, which is one frame, or of a video.

    A picture is turned as its camera says; a video that armillary enlarged has its own pixels again. Raises ValueError
    in one line for what is missing or cannot be decoded.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--image {str(path)!r} is not a file; give a picture (PNG, JPG) or a video (mp4)")
    if file.suffix.lower() not in PICTURES:
        clip = read_clip(file)
        return clip.frames, clip.fps
    try:
        with Image.open(file) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--image {str(path)!r} cannot be read as a picture: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), None


@torch.no_grad()
def given_latents(generator: StreamingGenerator, frames: Tensor, name: str, device: str) -> Tensor:
    """Clean latents [1, C, F, H, W] of uint8 frames [T, 3, H, W], of whole blocks.

    Raises ValueError for frames of another size than the generator's, which are never resized here, for a number of
    frames that is not that of whole blocks, and for a generator without an encoder.
    """
    recipe = generator.recipe
    height, width = frame_size(generator, device)
    if tuple(frames.shape[-2:]) != (height, width):
        raise ValueError(
            f"--image {name!r} has {frames.shape[-1]}x{frames.shape[-2]} pixels (width x height), {recipe.name} makes "
            f"{width}x{height}; crop or scale it to {width}x{height} first"
        )
    counts = whole_blocks(recipe, len(frames))
    if len(frames) not in counts:
        nearest = " or ".join(map(str, counts))
        raise ValueError(
            f"--image {name!r} has {len(frames)} frames, which are not whole blocks of {recipe.block_frames} latent "
            f"frames; {recipe.name} continues {nearest} frames"
            + ("; a single picture needs a frame-wise recipe" if len(frames) == 1 else "")
        )
    latents = generator.encode((frames.to(device).float() / 127.5 - 1)[None])
    if latents.shape[2] % recipe.block_frames or tuple(latents.shape[-2:]) != recipe.latent[1:]:
        raise ValueError(
            f"the encoder of {recipe.name} made latents {list(latents.shape)} of {len(frames)} frames, which are not "
            f"blocks of {recipe.block_frames} frames of {recipe.latent}"
        )
    return latents.float()


def whole_blocks(recipe: GeneratorRecipe, frames: int) -> tuple[int, ...]:
    """The numbers of pixel frames of whole blocks nearest to ``frames`` from below and above; one where it fits."""
    blocks = 1
    while recipe.pixels_before((blocks + 1) * recipe.block_frames) <= frames:
        blocks += 1
    low, high = (recipe.pixels_before(n * recipe.block_frames) for n in (blocks, blocks + 1))
    return (low,) if frames <= low else (low, high)


def frame_size(generator: StreamingGenerator, device: str) -> tuple[int, int]:
    """(H, W) of decoded frames in pixels, asked of the decoder."""
    channels, height, width = generator.recipe.latent
    decoded = generator.decoder()(torch.zeros(1, channels, 1, height, width, device=device))
    return int(decoded.shape[-2]), int(decoded.shape[-1])
