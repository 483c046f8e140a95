"""Files and pictures show exactly the frames they were given."""

import io
import itertools
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from framework.data.shapes import CAPTIONS, SIZE, ClipFactors, render_clips
from framework.reporting.sheets import before_after_animation, before_after_sheet, contact_sheet, font, wrap_text
from framework.reporting.videos import (
    Mp4Writer,
    choose_palette,
    encode_gif,
    enlarge,
    nearest_colours,
    tile,
    write_gif,
    write_mp4,
)
from framework.types import VideoBatch

FPS, FRAMES = 8.0, 21


def shape_clips(n: int = 2) -> tuple[Tensor, list[str]]:
    captions = list(CAPTIONS[:: len(CAPTIONS) // n][:n])
    latents = render_clips(captions, FRAMES, ClipFactors.clean(n), torch.Generator().manual_seed(0))
    texts = [str(caption) for caption in captions]
    return VideoBatch.from_signed(latents.transpose(1, 2), FPS, texts).frames, texts


def noise_clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def read_mp4(path: Path) -> tuple[Tensor, float]:
    """(frames uint8 [T, 3, H, W], frames per second), decoded by FFmpeg."""
    with av.open(str(path)) as container:
        frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        rate = container.streams.video[0].average_rate
    assert rate is not None
    return torch.stack(frames).permute(0, 3, 1, 2), float(rate)


def read_gif(data: bytes) -> tuple[Tensor, list[int]]:
    """(frames uint8 [T, 3, H, W], milliseconds of each), decoded by Pillow."""
    frames, durations = [], []
    with Image.open(io.BytesIO(data)) as image:
        for t in range(getattr(image, "n_frames", 1)):
            image.seek(t)
            frames.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
            durations.append(image.info.get("duration", 0))
    return torch.stack(frames), durations


def find(page: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """(y, x) of the one place where ``part`` [h, w, 3] stands in ``page`` [H, W, 3], pixel for pixel."""
    height, width = part.shape[:2]
    corners = np.argwhere((page == part[0, 0]).all(-1))
    places = [(int(y), int(x)) for y, x in corners if np.array_equal(page[y : y + height, x : x + width], part)]
    assert len(places) == 1, f"found {len(places)} times"
    return places[0]


def pixels(frame: Tensor, scale: int) -> np.ndarray:
    return enlarge(frame, scale).permute(1, 2, 0).numpy()


# mp4


def check_mp4_shows(path: Path, frames: Tensor, scale: int) -> None:
    shown, fps = read_mp4(path)
    wanted = enlarge(frames, scale)
    assert shown.shape == wanted.shape and fps == FPS
    error = (shown.int() - wanted.int()).abs().float()
    assert error.mean() < 3 and error.max() < 32  # lossy, with BT.709 labelled as what it is


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_frames_make_equal_files(seed: int, tmp_path: Path):
    """Written side by side, frame by frame; with x264's macroblock tree one small file in ten came out otherwise."""
    clips, kept = noise_clips(3, 12, 3, 16, 16, seed=seed), []
    for run in range(16):
        kept.append(torch.empty(1000 * run + 17))  # other places in memory
        writers = [Mp4Writer(tmp_path / f"{run}-{i}.mp4", FPS, 4) for i in range(3)]
        for frames in clips.split(1, dim=1):
            for writer, clip in zip(writers, frames, strict=True):
                writer.write(clip)
        for writer in writers:
            writer.close()
    for i in range(3):
        assert len({(tmp_path / f"{run}-{i}.mp4").read_bytes() for run in range(16)}) == 1


def test_an_mp4_has_the_frames_the_size_the_rate_and_the_colours_it_was_given(tmp_path: Path) -> None:
    clip = shape_clips()[0][1]
    write_mp4(tmp_path / "clip.mp4", clip, FPS, scale=8)
    check_mp4_shows(tmp_path / "clip.mp4", clip, scale=8)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("error", ["channels", "time", "place"])
def test_the_mp4_check_notices_swapped_channels_time_and_place(tmp_path: Path, error: str) -> None:
    clip = shape_clips()[0][1]
    write_mp4(tmp_path / "clip.mp4", clip.flip({"channels": 1, "time": 0, "place": 3}[error]), FPS, scale=8)
    with pytest.raises(AssertionError):
        check_mp4_shows(tmp_path / "clip.mp4", clip, scale=8)


def test_writing_block_by_block_makes_the_same_video(tmp_path: Path) -> None:
    clip = shape_clips()[0][0]
    with Mp4Writer(tmp_path / "blocks.mp4", FPS, scale=4) as writer:
        for block in clip.split(4):
            writer.write(block)
        writer.close()  # closing early is not an error
    assert writer.frames == FRAMES
    check_mp4_shows(tmp_path / "blocks.mp4", clip, scale=4)


def test_a_writer_keeps_no_block(tmp_path: Path) -> None:
    blocks: list[weakref.ref[Tensor]] = []
    with Mp4Writer(tmp_path / "stream.mp4", FPS) as writer:
        for i in range(4):
            block = noise_clips(3, 3, SIZE, SIZE, seed=i)
            blocks.append(weakref.ref(block))
            writer.write(block)
            del block
            assert all(ref() is None for ref in blocks)


def test_odd_sizes_get_their_last_row_and_column_twice(tmp_path: Path) -> None:
    write_mp4(tmp_path / "odd.mp4", shape_clips()[0][0, :, :, :15, :13], FPS)
    assert read_mp4(tmp_path / "odd.mp4")[0].shape == (FRAMES, 3, 16, 14)


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_no_video_file_is_overwritten_unasked(tmp_path: Path, write) -> None:
    clip, path = shape_clips()[0][0], tmp_path / "folder" / "clip"
    write(path, clip, FPS)
    first = path.read_bytes()
    with pytest.raises(FileExistsError, match=str(path)):
        write(path, clip.flip(0), FPS)
    assert path.read_bytes() == first
    write(path, clip.flip(0), FPS, overwrite=True)
    assert path.read_bytes() != first


def test_a_video_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with pytest.raises(ValueError, match="16, 16"), Mp4Writer(path, FPS) as writer:
        writer.write(noise_clips(2, 3, 16, 16))
        writer.write(noise_clips(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no frame"), Mp4Writer(path, FPS):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames", [torch.zeros(2, 3, 8, 8), noise_clips(2, 1, 8, 8), noise_clips(3, 8, 8), noise_clips(0, 3, 8, 8)]
)
def test_what_is_not_a_clip_of_bytes_is_refused_with_its_shape(tmp_path: Path, frames: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[T, 3, H, W\], got"):
        write_mp4(tmp_path / "x.mp4", frames, FPS)
    with pytest.raises(ValueError, match=r"uint8 \[T, 3, H, W\], got"):
        encode_gif(frames, FPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fps", "scale"), [(0, 1), (float("nan"), 1), (8, 0), (8, 1.5)])
def test_impossible_rates_and_scales_are_refused_before_there_is_a_file(tmp_path: Path, fps, scale) -> None:
    with pytest.raises(ValueError, match=r"fps|scale"):
        Mp4Writer(tmp_path / "x.mp4", fps, scale)
    assert list(tmp_path.iterdir()) == []


# GIF


def check_gif_is_exact(data: bytes, frames: Tensor, scale: int, fps: float) -> None:
    shown, durations = read_gif(data)
    assert torch.equal(shown, enlarge(frames, scale))
    assert abs(sum(durations) - 1000 * len(frames) / fps) <= 5
    assert all(abs(d - 1000 / fps) <= 10 for d in durations)


@given(st.integers(1, 256), st.integers(1, 5), st.sampled_from([1.0, 7.0, 8.0, 23.976, 50.0]), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_a_gif_of_few_colours_is_exact_and_as_long_as_the_clip(colours: int, scale: int, fps: float, seed: int) -> None:
    palette = noise_clips(colours, 3, seed=seed)
    index = torch.randint(colours, (6, 9, 7), generator=torch.Generator().manual_seed(seed))
    index[:, 0, 0] = torch.arange(6) % colours
    frames = palette[index].permute(0, 3, 1, 2)
    if all(not torch.equal(a, b) for a, b in itertools.pairwise(frames)):  # equal neighbours are merged
        check_gif_is_exact(encode_gif(frames, fps, scale), frames, scale, fps)


def test_the_gif_check_notices_a_wrong_rate_and_a_colour_off_by_two() -> None:
    frames = noise_clips(5, 3, 4, 4)
    check_gif_is_exact(encode_gif(frames, 8), frames, 1, 8)
    with pytest.raises(AssertionError):
        check_gif_is_exact(encode_gif(frames, 10), frames, 1, 8)
    with pytest.raises(AssertionError):
        check_gif_is_exact(encode_gif(frames ^ 2, 8), frames, 1, 8)


def test_a_still_clip_becomes_one_frame_that_lasts_as_long() -> None:
    shown, _ = read_gif(encode_gif(noise_clips(1, 3, 8, 8).expand(6, 3, 8, 8), FPS))
    assert len(shown) == 1


def test_a_palette_keeps_flat_areas_exact_and_the_rest_close() -> None:
    clips, _ = shape_clips(8)
    factors = torch.linspace(0.4, 1, 8).view(-1, 1, 1, 1, 1)
    page = tile((clips * factors).to(torch.uint8))
    palette = choose_palette(page)
    assert len(page.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0)) > 256 >= len(palette)
    for frame in page[::5]:
        shown = palette[nearest_colours(frame, palette).long()].permute(2, 0, 1)
        assert (shown.int() - frame.int()).abs().max() <= 24
        assert torch.equal(shown[:, (frame == 255).all(0)], frame[:, (frame == 255).all(0)])


def test_nearest_colours_agree_with_a_search_over_all_pairs() -> None:
    frame, palette = noise_clips(3, 6, 5), noise_clips(40, 3, seed=1)
    distance = (frame.permute(1, 2, 0)[:, :, None].double() - palette.double()).square().sum(-1)
    chosen = distance.gather(-1, nearest_colours(frame, palette)[..., None].long())[..., 0]
    assert torch.equal(chosen, distance.amin(-1))


@pytest.mark.parametrize("fps", [0, -1, 51, float("nan")])
def test_rates_that_no_gif_can_play_are_refused(fps: float) -> None:
    with pytest.raises(ValueError, match="50"):
        encode_gif(noise_clips(2, 3, 4, 4), fps)


@given(st.integers(1, 7), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_tiles_stand_row_by_row_with_the_gap_between(n: int, time: int, columns: int | None, gap: int) -> None:
    clips = noise_clips(n, time, 3, 4, 5)
    page = tile(clips, columns, gap)
    across = (page.shape[-1] + gap) // (5 + gap)
    assert across == min(n, columns or across)
    covered = torch.zeros(page.shape[-2:], dtype=torch.bool)
    for i, clip in enumerate(clips):
        y, x = divmod(i, across)
        y, x = y * (4 + gap), x * (5 + gap)
        assert torch.equal(page[..., y : y + 4, x : x + 5], clip)
        covered[y : y + 4, x : x + 5] = True
    assert (page[..., ~covered] == 255).all()


# pictures


def test_a_contact_sheet_shows_every_third_frame_of_every_clip_in_order_unobscured() -> None:
    clips = noise_clips(3, 7, 3, 8, 8)
    sheet = np.array(contact_sheet(clips, ["one", "two " * 40, ""], every=3, title="Clips"))
    places = np.array([[find(sheet, pixels(clip[t], 8)) for t in (0, 3, 6)] for clip in clips])  # [N, shown, (y, x)]
    assert (np.diff(places[:, :, 1], axis=1) > 64).all() and (np.diff(places[:, :, 0], axis=0) > 64).all()
    assert (np.diff(places[:, :, 0], axis=1) == 0).all()
    with pytest.raises(AssertionError, match="0 times"):
        find(sheet, pixels(clips[0, 1], 8))


def test_the_place_check_notices_ink_on_a_frame() -> None:
    clips = noise_clips(1, 1, 3, 8, 8)
    sheet = np.array(contact_sheet(clips, ["one"]))
    y, x = find(sheet, pixels(clips[0, 0], 8))
    sheet[y + 30, x + 30] ^= 1
    with pytest.raises(AssertionError, match="0 times"):
        find(sheet, pixels(clips[0, 0], 8))


def test_before_stands_above_after_in_the_same_columns() -> None:
    before, after = noise_clips(2, 6, 3, 8, 8), noise_clips(2, 6, 3, 8, 8, seed=1)
    sheet = np.array(before_after_sheet(before, after, ["one", "two"], [0.1, 0.2], torch.tensor([0.3, 0.1]), every=5))
    for i in range(2):
        for t in (0, 5):
            (y, x), (below, same) = find(sheet, pixels(before[i, t], 8)), find(sheet, pixels(after[i, t], 8))
            assert y + 64 < below and x == same


def test_the_animation_plays_each_pair_side_by_side_and_goes_into_an_mp4(tmp_path: Path) -> None:
    before, after = noise_clips(3, 4, 3, 8, 5), noise_clips(3, 4, 3, 8, 5, seed=1)
    movie = before_after_animation(before, after, ["one", "two", "a caption " * 30], [0.1] * 3, [0.2] * 3, columns=2)
    assert movie.dtype == torch.uint8 and movie.shape[-1] % 2 == movie.shape[-2] % 2 == 0
    for t, page in enumerate(movie.permute(0, 2, 3, 1).numpy()):
        for i in range(3):
            (y, x), (same, right) = find(page, pixels(before[i, t], 16)), find(page, pixels(after[i, t], 16))
            assert y == same and x + 5 * 16 < right
    write_mp4(tmp_path / "pairs.mp4", movie, FPS)
    assert read_mp4(tmp_path / "pairs.mp4")[0].shape == movie.shape


@given(st.text("ab WM…", max_size=120), st.integers(40, 200), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_wrapped_text_fits_and_says_when_it_was_cut(text: str, width: int, lines: int) -> None:
    wrapped = wrap_text(text, width, lines)
    assert len(wrapped) <= lines and all(font(13).getlength(line) <= width for line in wrapped)
    if wrapped and not any(line.endswith("…") for line in wrapped):
        assert " ".join(wrapped) == " ".join(text.split())


def test_large_frames_are_reduced_and_small_ones_enlarged() -> None:
    small, texts = shape_clips()
    large = torch.nn.functional.interpolate(small.flatten(0, 1), size=(240, 416)).unflatten(0, small.shape[:2])
    sheets = [contact_sheet(clips, texts, height=64) for clips in (small, large)]
    assert sheets[0].height == sheets[1].height and sheets[1].width - sheets[0].width == 7 * (111 - 64)


def test_wrong_counts_are_refused_by_name() -> None:
    clips, texts = shape_clips()
    with pytest.raises(ValueError, match="2 clips need as many captions, got 1"):
        contact_sheet(clips, texts[:1])
    with pytest.raises(ValueError, match="scores_after, got 3"):
        before_after_sheet(clips, clips, texts, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="one shape"):
        before_after_animation(clips, clips[:, :4], texts, [1, 2], [1, 2])
    with pytest.raises(ValueError, match="every must be"):
        contact_sheet(clips, texts, every=0)
