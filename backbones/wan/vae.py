"""Wan's causal video autoencoder as a stream: latents in, pixels out, with the past held by whoever decodes.

The stock `decode` always starts a video: its first latent becomes one frame, every later one four, and its feature
cache is gone with the call. A window from the middle of a video needs that cache, and a group of branches needs it
several times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanDecoder3d
from safetensors import SafetensorError
from torch import Tensor, nn

VAE = "vae"
"""Its subfolder in a folder of diffusers' layout."""


@dataclass(frozen=True)
class DecodedPast:
    """What the decoder keeps of the videos so far: per temporal convolution the last two frames of its input.

    features: each [N, C, 2, h, w] or as the decoder marks it before it is filled; () before the first latent. Nothing
    in it is ever written to, so that any number of videos can go on from it.
    """

    features: tuple[Tensor | str | None, ...] = ()

    def fork(self, branches: int) -> "DecodedPast":
        """The past of one video as that of ``branches`` videos, shared and not copied."""
        shared = (f.expand(branches, *f.shape[1:]) if isinstance(f, Tensor) else f for f in self.features)
        return DecodedPast(tuple(shared))


def decoder_reach(decoder: WanDecoder3d) -> int:
    """How many latents before a latent its pixels depend on: the sum of what each temporal convolution looks back.

    A convolution behind t doublings of time sees 2 of its own frames, 2 / 2^t latents. 38 for the Wan2.1 autoencoder.
    """

    def frames(*modules: nn.Module) -> int:
        convolutions = [m for module in modules for m in module.modules() if isinstance(m, WanCausalConv3d)]
        return sum(convolution.kernel_size[0] - 1 for convolution in convolutions)

    rate, reach = 1, Fraction(frames(decoder.conv_in, decoder.mid_block))
    for block in decoder.up_blocks:
        upsamplers = list(block.upsamplers or ())  # pyright: ignore[reportArgumentType]
        reach += Fraction(frames(block.resnets, *upsamplers), rate)  # pyright: ignore[reportArgumentType]
        rate *= 2 ** sum(upsampler.mode == "upsample3d" for upsampler in upsamplers)
    return math.ceil(reach + Fraction(frames(decoder.conv_out), rate))


class StreamingVAE:
    """An `AutoencoderKLWan` that continues videos. Latents here are normalised: mean 0, deviation 1 per channel.

    Pixels follow the weights' precision, and rewards follow pixels: a bfloat16 autoencoder is another one than a
    float32 one. videos_at_once: decoded together; each costs its activations. pixels_on: the device that pixels are
    returned on, None for that of the latents. The autoencoder itself goes where its first latents are.
    Decoding keeps nothing here, so threads may decode at the same time. Raises ValueError for an autoencoder of another
    family (Wan2.2's has residual shortcuts and patches).
    """

    def __init__(self, vae: AutoencoderKLWan, videos_at_once: int = 1, pixels_on: str | None = None) -> None:
        if videos_at_once < 1:
            raise ValueError(f"videos_at_once must be at least 1, got {videos_at_once}")
        config = vae.config
        if config["is_residual"] or config["patch_size"] is not None:
            raise ValueError(
                f"the autoencoder has is_residual={config['is_residual']} and patch_size={config['patch_size']}; "
                "only that of Wan2.1 can be streamed"
            )
        self.vae = vae.requires_grad_(False).eval()
        self.videos_at_once = videos_at_once
        self.pixels_on = pixels_on
        self.reach = decoder_reach(vae.decoder)
        self.stride = int(config["scale_factor_temporal"])
        self.scale = int(config["scale_factor_spatial"])
        self._mean, self._std = (
            torch.tensor(config[name], dtype=torch.float64).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self._mean.shape[1]

    @torch.no_grad()
    def advance(self, latents: Tensor, past: DecodedPast) -> tuple[Tensor, DecodedPast]:
        """(pixels [N, T, 3, H, W] in [−1, 1] of latents [N, C, F, h, w] behind the past of N videos, the past then).

        T is 4 F, and 3 less where the latents start the videos.
        """
        vae = self._at(latents.device)
        features: list[Tensor | str | None] = list(past.features) or [None] * vae._cached_conv_counts["decoder"]
        pixels = []
        for i, latent in enumerate(latents.split(1, dim=2)):
            z = latent * self._std.to(latent) + self._mean.to(latent)
            frames = vae.decoder(
                vae.post_quant_conv(z.to(vae.dtype)),
                feat_cache=features,
                feat_idx=[0],
                first_chunk=not past.features and i == 0,
            )
            pixels.append(frames.clamp(-1, 1).to(latents.dtype).to(self.pixels_on or latents.device))
        return torch.cat(pixels, dim=2).transpose(1, 2), DecodedPast(tuple(features))

    def past_of(self, prefix: Tensor) -> DecodedPast:
        """The past behind latents [N, C, F, h, w] that start videos.

        Only the last `reach` of them are decoded: what lies before reaches neither a pixel nor, within its own reach,
        a feature that a later pixel depends on.
        """
        past = DecodedPast()
        for latent in prefix[:, :, max(0, prefix.shape[2] - self.reach) :].split(1, dim=2):
            past = self.advance(latent, past)[1]
        return past

    def decode(self, latents: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Pixels [N, T, 3, H, W] in [−1, 1] of latents [N, C, F, h, w]: the slice of the whole video's that they make.

        prefix: latents [P, C, start, h, w] before them, each for N / P consecutive videos, decoded once.
        """
        self._check(latents, prefix)
        if prefix is None or not prefix.shape[2]:
            pasts, groups = iter([DecodedPast()]), [latents]
        else:
            pasts, groups = map(self.past_of, prefix.split(1)), latents.chunk(len(prefix))
        return torch.cat(
            [
                self.advance(part, past.fork(len(part)))[0]
                for past, group in zip(pasts, groups, strict=False)
                for part in group.split(self.videos_at_once)
            ]
        )

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """A decoder that remembers N videos: latents [N, C, f, h, w] of each next block → their pixels."""
        pasts: list[DecodedPast] = []

        def decode_next(latents: Tensor) -> Tensor:
            parts = latents.split(self.videos_at_once)
            if pasts and len(parts) != len(pasts):
                raise ValueError(f"this decoder holds {len(pasts)} parts of a batch and was given {len(parts)}")
            behind = pasts or [DecodedPast()] * len(parts)
            decoded = [self.advance(part, past) for part, past in zip(parts, behind, strict=True)]
            pasts[:] = [past for _, past in decoded]
            return torch.cat([pixels for pixels, _ in decoded])

        return decode_next

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [N, C, F, h, w] of videos [N, T, 3, H, W] in [−1, 1] from their first frame: T = 1 + 4 (F − 1).

        The mode of the posterior, video by video. Raises ValueError for another number of frames or an odd size.
        """
        frames, height, width = pixels.shape[1], *pixels.shape[-2:]
        if (frames - 1) % self.stride or not frames or height % self.scale or width % self.scale:
            raise ValueError(
                f"the autoencoder takes 1 + {self.stride} k frames of sides that {self.scale} divides, got {frames} "
                f"frames of {height} × {width}; cut or resize the given frames"
            )
        vae = self._at(pixels.device)
        modes = [
            vae.encode(video.transpose(1, 2).to(vae.dtype)).latent_dist.mode().to(pixels.dtype)  # pyright: ignore
            for video in pixels.split(1)
        ]
        z = torch.cat(modes)
        return (z - self._mean.to(z)) / self._std.to(z)

    def _at(self, device: torch.device) -> AutoencoderKLWan:
        if self.vae.device != device:
            nn.Module.to(self.vae, device)
        return self.vae

    def _check(self, latents: Tensor, prefix: Tensor | None) -> None:
        if latents.shape[1] != self.channels:
            raise ValueError(f"the autoencoder has {self.channels} latent channels, got latents {tuple(latents.shape)}")
        if prefix is not None and (len(latents) % len(prefix) or prefix.shape[1] != self.channels):
            raise ValueError(f"a prefix of {tuple(prefix.shape)} fits no latents of {tuple(latents.shape)}")


def load_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """The autoencoder below a folder, every weight from there. Raises ValueError, one line, where that cannot be."""
    try:
        loaded: Any = AutoencoderKLWan.from_pretrained(
            folder, subfolder=VAE, torch_dtype=dtype, local_files_only=True, use_safetensors=True,
            low_cpu_mem_usage=True, output_loading_info=True,
        )  # fmt: skip
        vae, said = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / VAE} holds no autoencoder: {' '.join(str(error).split())[:200]}") from error
    wrong = sorted(map(str, [*said["missing_keys"], *said["mismatched_keys"], *said["unexpected_keys"]]))
    if wrong:
        raise ValueError(f"{folder / VAE} does not fit AutoencoderKLWan: {len(wrong)} tensors, {', '.join(wrong[:3])}")
    return vae
