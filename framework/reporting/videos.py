"""Video files that show exactly the frames they were given: mp4 for people, GIF for pages and TensorBoard.

Small frames are enlarged by a whole number with nearest neighbours, so pixel art stays pixel art. Writers work on a
``.partial`` file that takes its final name when complete; they never replace a file unless ``overwrite=True``.
"""

import io
import itertools
import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from torch import Tensor

PALETTE_SAMPLES = 1 << 18
"""Pixels of a clip that its GIF palette is chosen from."""
MARK = "armillary: {height}x{width} pixels, enlarged {scale} times"
"""What an mp4 says of itself, so that whoever reads it can undo the enlargement (`framework.reporting.read_videos`)."""
BT709 = 1
"""The standard's number for itself, for primaries and transfer (ITU-T H.273)."""


def check_frames(frames: Tensor, shape: Literal["[T, 3, H, W]", "[N, T, 3, H, W]"]) -> None:
    """Raises ValueError unless ``frames`` is uint8 of the given shape with no empty dimension."""
    dims = shape.count(",") + 1
    if frames.dtype != torch.uint8 or frames.ndim != dims or frames.shape[-3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must be non-empty uint8 {shape}, got {frames.dtype} {list(frames.shape)}; "
            "VideoBatch.from_signed converts floats"
        )


def check_new(path: Path, overwrite: bool) -> None:
    """Raises FileExistsError that names the path when a file is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists and is not overwritten; choose another path or pass overwrite=True")


def write_whole(path: Path, write: Callable[[Path], object], overwrite: bool = False) -> None:
    """Let ``write`` fill a ``.partial`` neighbour of ``path``, then give it its name; a failure leaves nothing behind.

    Folders are created. Raises FileExistsError when ``path`` exists and ``overwrite`` is False.
    """
    check_new(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def enlarge(frames: Tensor, scale: int) -> Tensor:
    """[..., H, W] → [..., H·scale, W·scale] by nearest neighbours. Raises ValueError unless scale is a positive int."""
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale!r}")
    return frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def visible_scale(height: int, wanted: int = 64) -> int:
    """The whole factor that brings a frame of ``height`` pixels nearest to ``wanted`` from below, at least 1."""
    return max(1, wanted // height)


def tile(clips: Tensor, columns: int | None = None, gap: int = 2, colour: int = 255) -> Tensor:
    """Clips [N, T, 3, H, W] side by side as one clip [T, 3, H', W'], row by row, ``gap`` pixels of grey between.

    columns: ⌈√N⌉ where None, which is as square as the clips are.
    """
    check_frames(clips, "[N, T, 3, H, W]")
    n, time, channels, height, width = clips.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    size = rows * (height + gap) - gap, columns * (width + gap) - gap
    page = clips.new_full((time, channels, *size), colour)
    for i, clip in enumerate(clips):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        page[:, :, y : y + height, x : x + width] = clip
    return page


class Mp4Writer:
    """Writes an H.264 mp4 block by block; memory does not grow with the length of the video.

    path: where the finished file appears when the writer closes; nothing appears when the block raises.
    fps: frames per second, true to the nearest 1/1000. scale: whole factor of enlargement.
    crf: x264's quality, 0 (lossless) to 51. An odd height or width gets its last row or column twice, because 4:2:0
    video has even sizes. Colours are BT.709 in TV range and say so, so that every player shows the same.

    Raises FileExistsError that names the path; ValueError for frames of another form or size than the first block's.
    """

    def __init__(self, path: Path | str, fps: float, scale: int = 1, *, crf: int = 16, overwrite: bool = False) -> None:
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, got {fps!r}")
        enlarge(torch.empty(1, 1), scale)  # refuse a bad scale before there is a file
        self.path = Path(path)
        self.frames = 0
        self._closed = False
        self._scale, self._overwrite = scale, overwrite
        self._size: tuple[int, int] | None = None
        check_new(self.path, overwrite)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self._stream.pix_fmt = "yuv420p"
        # with its macroblock tree x264 writes equal small frames into unequal files, about one time in ten
        self._stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
        context = self._stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = BT709, BT709

    def write(self, frames: Tensor) -> None:
        """Append uint8 [T, 3, H, W] from any device."""
        check_frames(frames, "[T, 3, H, W]")
        height, width = int(frames.shape[-2]), int(frames.shape[-1])
        if self._size is None:
            self._size = height, width
            even = tuple(side * self._scale + side * self._scale % 2 for side in self._size)
            self._stream.height, self._stream.width = even
            self._container.metadata["comment"] = MARK.format(height=height, width=width, scale=self._scale)
        if self._size != (height, width):
            raise ValueError(f"{self.path} holds frames of {self._size} pixels (H, W), got {(height, width)}")
        for frame in frames.cpu():  # enlarged one at a time: a block of a long stream need not fit twice
            pixels = enlarge(frame, self._scale).permute(1, 2, 0).numpy()
            pixels = np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")
            self._encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"))
            self.frames += 1

    def _encode(self, frame: av.VideoFrame) -> None:
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, interpolation="AREA"
        )
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and give it its name; does nothing twice. Raises ValueError when no frame was written."""
        if self._closed:
            return
        try:
            if not self.frames:
                raise ValueError(f"no frame was written to {self.path}; a video needs at least one")
            self._container.mux(self._stream.encode(None))
            self._container.close()
            check_new(self.path, self._overwrite)
            os.replace(self._partial, self.path)
        finally:
            self._discard()

    def _discard(self) -> None:
        self._closed = True
        try:
            self._container.close()
        finally:  # closing writes, so a full disk fails here once more
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()


def write_mp4(
    path: Path | str, frames: Tensor, fps: float, scale: int = 1, *, crf: int = 16, overwrite: bool = False
) -> None:
    """Write uint8 frames [T, 3, H, W] as an H.264 mp4; see `Mp4Writer`."""
    check_frames(frames, "[T, 3, H, W]")
    with Mp4Writer(path, fps, scale, crf=crf, overwrite=overwrite) as writer:
        writer.write(frames)


def choose_palette(frames: Tensor) -> Tensor:
    """At most 256 colours uint8 [P, 3] for all frames [T, 3, H, W]: one palette for the whole clip does not flicker.

    Exact where the clip has no more colours than that. Else its 32 most frequent colours stay exact (paper, flat
    areas), and the others are spread to cover the remaining pixels.
    """
    pixels = frames.permute(0, 2, 3, 1).reshape(-1, 3)
    pixels = pixels[:: math.ceil(len(pixels) / PALETTE_SAMPLES)]
    codes, index, counts = torch.unique(_pack(pixels), return_inverse=True, return_counts=True)
    colours = _unpack(codes)
    if len(colours) <= 256:
        return colours
    kept = counts.argsort(descending=True, stable=True)[:32]
    others = pixels[~torch.isin(index, kept)]
    cut = Image.fromarray(others[None].numpy()).quantize(224, method=Image.Quantize.MAXCOVERAGE)
    return torch.cat([colours[kept], torch.tensor(cut.getpalette("RGB"), dtype=torch.uint8).view(-1, 3)[:224]])


def nearest_colours(frame: Tensor, palette: Tensor) -> Tensor:
    """Index uint8 [H, W] of each pixel's nearest palette entry; Pillow's own search merges colours up to 4 apart."""
    codes, index = torch.unique(_pack(frame.permute(1, 2, 0)), return_inverse=True)
    entries = palette.float()
    # |c − p|² without the term that all entries share; whole numbers below 2²⁴ are exact in float32
    score = [2 * part.float() @ entries.T - entries.square().sum(1) for part in _unpack(codes).split(1 << 16)]
    return torch.cat([part.argmax(1) for part in score])[index].to(torch.uint8)


def _pack(pixels: Tensor) -> Tensor:
    """uint8 [..., 3] → one integer per colour [...]."""
    return (pixels.int() * torch.tensor([1 << 16, 1 << 8, 1], dtype=torch.int32)).sum(-1)


def _unpack(codes: Tensor) -> Tensor:
    return torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=-1).to(torch.uint8)


def encode_gif(frames: Tensor, fps: float, scale: int = 1) -> bytes:
    """An endless animated GIF of uint8 frames [T, 3, H, W].

    GIF counts time in 1/100 s: single frames are rounded so that the whole keeps its length. Equal neighbours become
    one frame that lasts as long. Raises ValueError for fps outside (0, 50], which browsers would slow down.
    """
    check_frames(frames, "[T, 3, H, W]")
    if not 0 < fps <= 50:
        raise ValueError(f"a GIF plays 0 to 50 frames per second, got fps={fps!r}; write an mp4 instead")
    frames = frames.cpu()
    palette = choose_palette(frames)
    pages: list[Image.Image] = []
    for frame in frames:
        page = Image.fromarray(enlarge(nearest_colours(frame, palette), scale).numpy())
        page.putpalette(palette.flatten().tolist())  # grey levels become indices
        pages.append(page)
    marks = [round(100 * i / fps) for i in range(len(pages) + 1)]
    durations = [10 * (b - a) for a, b in itertools.pairwise(marks)]
    buffer = io.BytesIO()
    pages[0].save(
        buffer, format="GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0, optimize=False
    )
    return buffer.getvalue()


def write_gif(path: Path | str, frames: Tensor, fps: float, scale: int = 1, *, overwrite: bool = False) -> None:
    """Write `encode_gif` to a file. Raises FileExistsError that names the path."""
    check_new(Path(path), overwrite)
    data = encode_gif(frames, fps, scale)
    write_whole(Path(path), lambda partial: partial.write_bytes(data), overwrite)
