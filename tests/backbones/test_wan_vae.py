"""The streaming autoencoder gives the stock decoder's pixels, bit for bit, wherever a video is cut."""

from functools import lru_cache, partial

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import strategies as st
from torch import Tensor, nn

from backbones.wan.vae import DecodedPast, StreamingVAE, decoder_reach
from tests.backbones.tiny_stack import VAE, tiny_vae
from tests.support import close, holds, normal, refuted


@lru_cache
def shared() -> StreamingVAE:
    """A test that changes anything makes its own."""
    return StreamingVAE(tiny_vae())


def latents(seed: int, frames: int, clips: int = 1, side: int = 4) -> Tensor:
    return normal(seed, clips, 16, frames, side, side, dtype=torch.float32)


def stock(z: Tensor) -> Tensor:
    """What diffusers makes of whole videos, one at a time: [N, T, 3, H, W].

    It sends all latents through one 1×1×1 convolution at once; for sides below 4 the library takes another kernel then.
    """
    vae = shared().vae
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"], dtype=torch.float64).view(1, -1, 1, 1, 1).float()
        for name in ("mean", "std")
    )
    with torch.no_grad():
        return torch.cat([vae.decode(video * std + mean).sample for video in z.split(1)]).transpose(1, 2)


def bits(left: Tensor, right: Tensor) -> None:
    assert left.shape == right.shape and torch.equal(left, right), float((left - right).abs().max())


def check_whole(vae: StreamingVAE, seed: int, frames: int, clips: int) -> None:
    """A decode, and a decoder that is fed blocks of several lengths, give the stock video; 1 + 4 (F − 1) frames."""
    z = latents(seed, frames, clips)
    full = stock(z)
    bits(vae.decode(z), full)
    decode = vae.decoder()
    blocks = z.split(1 + seed % 3, dim=2)
    pixels = [decode(block) for block in blocks]
    assert [p.shape[1] for p in pixels] == [4 * b.shape[2] - 3 * (i == 0) for i, b in enumerate(blocks)]
    bits(torch.cat(pixels, 1), full)


def check_window(vae: StreamingVAE, seed: int, start: int, frames: int, prefixes: int, branches: int) -> None:
    """A window behind a shared prefix is the slice of each branch's whole video."""
    prefix, window = latents(seed, start, prefixes), latents(seed + 1, frames, prefixes * branches)
    full = stock(torch.cat([prefix.repeat_interleave(branches, 0), window], 2))
    bits(vae.decode(window, prefix), full[:, -4 * frames :])


SEEDS, FRAMES, FEW = st.integers(0, 99), st.integers(1, 6), st.integers(1, 2)


def test_a_stream_of_blocks_is_the_stock_video_bit_for_bit() -> None:
    holds(partial(check_whole, shared()), SEEDS, FRAMES, FEW, examples=12)


def test_a_window_is_the_slice_of_the_whole_video_bit_for_bit() -> None:
    holds(partial(check_window, shared()), SEEDS, FRAMES, FRAMES, FEW, FEW, examples=8)


class Forgets(StreamingVAE):
    """A planted error: the prefix is left out."""

    def past_of(self, prefix: Tensor) -> DecodedPast:
        return DecodedPast()


class StartsOver(StreamingVAE):
    """A planted error: what is decoded is not remembered."""

    def advance(self, latents: Tensor, past: DecodedPast) -> tuple[Tensor, DecodedPast]:
        return super().advance(latents, past)[0], past


class Raw(StreamingVAE):
    """A planted error: latents reach the decoder as they are normalised."""

    def advance(self, latents: Tensor, past: DecodedPast) -> tuple[Tensor, DecodedPast]:
        return super().advance((latents - self._mean.to(latents)) / self._std.to(latents), past)


class Mixes(StreamingVAE):
    """A planted error: each branch goes on from the end of the one before it."""

    def past_of(self, prefix: Tensor) -> DecodedPast:
        return Shared(super().past_of(prefix).features)


class Shared(DecodedPast):
    def fork(self, branches: int) -> DecodedPast:
        return Shared(tuple(f + 1 if isinstance(f, Tensor) else f for f in super().fork(branches).features))


def test_the_window_check_sees_a_lost_or_changed_past() -> None:
    for mutant in (Forgets, Mixes, Raw):
        refuted(partial(check_window, mutant(tiny_vae())), SEEDS, FRAMES, FRAMES, FEW, FEW)
    for mutant in (StartsOver, Raw):
        refuted(partial(check_whole, mutant(tiny_vae())), SEEDS, st.integers(2, 6), FEW)


def test_a_window_is_decoded_from_the_decoders_reach_alone() -> None:
    """36 latents before the window: 30 of them decide every bit, and fewer do not."""
    vae = StreamingVAE(tiny_vae())
    z = latents(5, 38)
    full = stock(z)[:, -8:]
    assert vae.reach == 30
    asked: list[int] = []

    class Counts(StreamingVAE):
        def advance(self, latents: Tensor, past: DecodedPast) -> tuple[Tensor, DecodedPast]:
            asked.append(latents.shape[2])
            return super().advance(latents, past)

    counting = Counts(tiny_vae())
    bits(counting.decode(z[:, :, 36:], z[:, :, :36]), full)
    assert sum(asked) == 30 + 2
    vae.reach = 20
    assert float((vae.decode(z[:, :, 36:], z[:, :, :36]) - full).abs().max()) > 1e-3


def test_the_real_autoencoder_looks_38_latents_back() -> None:
    with torch.device("meta"):
        assert decoder_reach(AutoencoderKLWan().decoder) == 38


def test_several_videos_at_once_are_the_same_videos() -> None:
    together, alone = StreamingVAE(tiny_vae(), videos_at_once=3), shared()
    z, prefix = latents(1, 3, 4), latents(2, 2, 2)
    close(together.decode(z), alone.decode(z), atol=1e-4)
    close(together.decode(z, prefix), alone.decode(z, prefix), atol=1e-4)
    decode = together.decoder()
    close(torch.cat([decode(block) for block in z.split(2, 2)], 1), alone.decode(z), atol=1e-4)
    with pytest.raises(ValueError, match="holds 2 parts of a batch and was given 1"):
        decode(z[:2])
    with pytest.raises(ValueError, match="videos_at_once must be at least 1"):
        StreamingVAE(tiny_vae(), videos_at_once=0)


def test_a_past_can_be_continued_any_number_of_times() -> None:
    """A snapshot at a fork: going on from it leaves it as it was."""
    vae, z = shared(), latents(3, 6, 2)
    past = vae.past_of(z[:1, :, :2])
    before = [f.clone() if isinstance(f, Tensor) else f for f in past.features]
    first = vae.advance(z[:1, :, 2:], past)[0]
    vae.advance(z[1:, :, 2:], past)
    bits(vae.advance(z[:1, :, 2:], past)[0], first)
    for a, b in zip(before, past.features, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    memory = [sum(f.numel() for f in vae.past_of(z[:1, :, :n]).features if isinstance(f, Tensor)) for n in (3, 4, 6)]
    assert len(set(memory)) == 1, "memory does not grow with the video"


def test_pixels_are_clamped_carry_no_graph_and_come_back_where_asked() -> None:
    vae = StreamingVAE(tiny_vae(), pixels_on="cpu")
    with torch.no_grad():
        vae.vae.decoder.conv_out.bias += 5
    pixels = vae.decode(latents(0, 2).requires_grad_())
    assert float(pixels.max()) == 1 and not pixels.requires_grad and pixels.device.type == "cpu"
    half = StreamingVAE(nn.Module.to(tiny_vae(), torch.bfloat16))  # diffusers' own warns about precision
    z = latents(4, 3)
    coarse = half.decode(z)
    assert coarse.dtype == torch.float32
    assert 1e-4 < float((coarse - stock(z)).abs().mean()) < 0.1, "another precision is another video"


def check_encode(vae: StreamingVAE, seed: int, frames: int, clips: int) -> None:
    """The stock encoder's mode, normalised as the stock decoder undoes it."""
    pixels = normal(seed, clips, 4 * frames - 3, 3, 16, 16, dtype=torch.float32).clamp(-1, 1)
    z = vae.encode(pixels)
    assert z.shape == (clips, 16, frames, 2, 2)
    with torch.no_grad():
        modes = torch.cat([shared().vae.encode(v.transpose(1, 2)).latent_dist.mode() for v in pixels.split(1)])
        through = torch.cat([shared().vae.decode(mode[None]).sample for mode in modes]).transpose(1, 2)
    close(stock(z), through, atol=1e-4)


def test_given_frames_become_the_latents_that_decode_like_them() -> None:
    holds(partial(check_encode, shared()), SEEDS, st.integers(1, 3), FEW, examples=8)


def test_the_encode_check_sees_latents_that_are_not_normalised() -> None:
    class Unnormalised(StreamingVAE):
        def encode(self, pixels: Tensor) -> Tensor:
            z = super().encode(pixels)
            return z * self._std.to(z) + self._mean.to(z)

    refuted(partial(check_encode, Unnormalised(tiny_vae())), SEEDS, st.integers(1, 2), FEW)


@pytest.mark.parametrize(("shape", "said"), [((1, 4, 3, 16, 16), "got 4 frames"), ((1, 1, 3, 16, 12), "16 × 12")])
def test_frames_that_the_encoder_would_drop_are_refused(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        shared().encode(torch.zeros(shape))


def test_latents_and_autoencoders_of_another_family_are_refused() -> None:
    with pytest.raises(ValueError, match="16 latent channels"):
        shared().decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(ValueError, match="fits no latents"):
        shared().decode(latents(0, 2, 3), latents(0, 2, 2))
    with pytest.raises(ValueError, match="only that of Wan2"):
        StreamingVAE(AutoencoderKLWan(**{**VAE, "in_channels": 12, "out_channels": 12, "patch_size": 2}))


def test_an_empty_past_is_that_of_a_video_that_starts() -> None:
    bits(shared().decode(latents(0, 2), latents(0, 0)), stock(latents(0, 2)))
