"""An independent, slow Wan transformer: one forward over [clean | noisy] with a dense mask, written from the weights.

It shares no code with the backbones: patches by a convolution, attention by explicit softmax, rotation by complex
numbers, one query frame at a time, visibility by the rule of the papers. Everything runs in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Frame:
    """A frame of the sequence: its id in the stream, the first and past-the-last id of its block, clean or noisy."""

    id: int
    start: int
    stop: int
    clean: bool


def lowest_recent(stop: int, sink: int, window: int) -> int:
    """lo = max(sink, stop − (window − sink)): the first frame that is still in the window of a block ending at stop."""
    return max(sink, stop - (window - sink))


def sees(query: Frame, key: Frame, sink: int, window: int | None) -> bool:
    """Whether a query frame attends to a key frame: its own block, and the clean frames of earlier blocks in view."""
    if (query.start, query.clean) == (key.start, key.clean):
        return True
    if not key.clean or key.id >= query.start:
        return False
    return window is None or key.id < sink or key.id >= lowest_recent(query.stop, sink, window)


def position(query: Frame, key: Frame, visible: list[Frame], relative: bool) -> int:
    """Temporal position of a key for a query: its id, or its rank among the visible frames."""
    return sorted(frame.id for frame in visible).index(key.id) if relative else key.id


def turn(x: Tensor, time: int, grid: tuple[int, int]) -> Tensor:
    """Rotate the tokens [N, S, heads, d] of a frame at temporal position ``time``; S runs over rows, then columns."""
    d = x.shape[-1]
    part = 2 * (d // 6)
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = []
            for at, dim in ((time, d - 2 * part), (row, part), (column, part)):
                token += [at / 10000 ** (2 * j / dim) for j in range(dim // 2)]
            angles.append(token)
    phase = torch.polar(torch.ones(1, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * phase[None, :, None]).reshape(x.shape)


def norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the full width."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, Lq, heads, d] over [N, Lk, heads, d]."""
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense_forward(
    weights: Weights,
    heads: int,
    x: Tensor,
    timestep: Tensor,
    text: Tensor,
    frames: list[Frame],
    sink: int = 0,
    window: int | None = None,
    relative: bool = False,
    detach_clean: bool = False,
    shown: frozenset[int] | None = None,
    sight: Sequence[Sequence[int]] | Callable[[int], Sequence[Sequence[int]]] | None = None,
    keys: list[Tensor] | None = None,
) -> Tensor:
    """Output [N, C, L, H, W] of one forward over L frames x [N, C, L, H, W] with timesteps [N, L] and text [N, T, D].

    detach_clean: keys and values of clean frames are constants for the noisy ones. shown: the ids of the clean frames
    that noisy ones see, in place of the sink and the window. sight: per frame, the places in the sequence that it sees,
    in place of every rule; a function where layers differ. keys: takes the un-rotated keys of each layer [N, L, S,
    heads, d]. The text may also be one per frame, [N, L, T, D].
    """

    def visible(query: Frame, key: Frame) -> bool:
        if shown is None or query.clean or not key.clean:
            return sees(query, key, sink, window)
        return key.id in shown

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    batch, _, length, height, width = x.shape
    grid = (height // 2, width // 2)
    patches = F.conv3d(x, weights["patch_embedding.weight"], weights["patch_embedding.bias"], stride=(1, 2, 2))
    h = patches.flatten(3).permute(0, 2, 3, 1)  # [N, L, S, dim]

    embed = "condition_embedder"
    half = weights[f"{embed}.time_embedder.linear_1.weight"].shape[1] // 2
    phase = timestep[..., None] * torch.tensor([10000.0 ** (-j / half) for j in range(half)], dtype=torch.float64)
    sinusoid = torch.cat([phase.cos(), phase.sin()], -1)
    temb = linear(F.silu(linear(sinusoid, f"{embed}.time_embedder.linear_1")), f"{embed}.time_embedder.linear_2")
    modulation = linear(F.silu(temb), f"{embed}.time_proj").unflatten(-1, (6, -1))  # [N, L, 6, dim]
    text = linear(gelu(linear(text, f"{embed}.text_embedder.linear_1")), f"{embed}.text_embedder.linear_2")

    layer = 0
    while f"blocks.{layer}.scale_shift_table" in weights:
        name = f"blocks.{layer}"
        shift, scale, gate, f_shift, f_scale, f_gate = (
            (weights[f"{name}.scale_shift_table"][:, None] + modulation).unsqueeze(3).unbind(2)
        )
        y = norm(h) * (1 + scale) + shift
        q, k, v = (linear(y, f"{name}.attn1.to_{letter}") for letter in "qkv")
        q, k = rms(q, weights[f"{name}.attn1.norm_q.weight"]), rms(k, weights[f"{name}.attn1.norm_k.weight"])
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        if keys is not None:
            keys.append(k)
        here = sight(layer) if callable(sight) else sight
        rows = []
        for i, query in enumerate(frames):
            places = [j for j, key in enumerate(frames) if visible(query, key)] if here is None else list(here[i])
            seen = [frames[j] for j in places]
            k_i, v_i = [], []
            for j in places:
                cut = detach_clean and frames[j].clean and not query.clean
                k_j, v_j = (k[:, j].detach(), v[:, j].detach()) if cut else (k[:, j], v[:, j])
                k_i.append(turn(k_j, position(query, frames[j], seen, relative), grid))
                v_i.append(v_j)
            q_i = turn(q[:, i], position(query, query, seen, relative), grid)
            rows.append(softmax_attention(q_i, torch.cat(k_i, 1), torch.cat(v_i, 1)))
        h = h + linear(torch.stack(rows, 1).flatten(-2), f"{name}.attn1.to_out.0") * gate

        y = norm(h) * weights[f"{name}.norm2.weight"] + weights[f"{name}.norm2.bias"]
        q = rms(linear(y, f"{name}.attn2.to_q"), weights[f"{name}.attn2.norm_q.weight"])
        k = rms(linear(text, f"{name}.attn2.to_k"), weights[f"{name}.attn2.norm_k.weight"])
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, linear(text, f"{name}.attn2.to_v")))
        if text.ndim == 4:
            each = [softmax_attention(q[:, i], k[:, i], v[:, i]) for i in range(length)]
            crossed = torch.stack(each, 1).flatten(-2)
        else:
            crossed = softmax_attention(q.flatten(1, 2), k, v).flatten(-2).reshape(h.shape)
        h = h + linear(crossed, f"{name}.attn2.to_out.0")

        y = norm(h) * (1 + f_scale) + f_shift
        h = h + linear(gelu(linear(y, f"{name}.ffn.net.0.proj")), f"{name}.ffn.net.2") * f_gate
        layer += 1

    shift, scale = (weights["scale_shift_table"][:, None] + temb.unsqueeze(2)).unsqueeze(3).unbind(2)
    out = linear(norm(h) * (1 + scale) + shift, "proj_out")
    out = out.reshape(batch, length, *grid, 2, 2, -1)  # frame, row, column, row in patch, column in patch, channel
    return torch.einsum("nlhwpqc->nclhpwq", out).reshape(batch, -1, length, height, width)


def packed_frames(spans: list[tuple[int, int]]) -> list[Frame]:
    """The frames of [clean | noisy] for a clip of these blocks."""
    return [Frame(f, a, b, clean) for clean in (True, False) for a, b in spans for f in range(a, b)]
