"""A thin causal subclass of diffusers' Wan transformer: per-frame timesteps, explicit positions, K/V in and out.

State-dict names are those of diffusers, so checkpoints, PEFT and quantisers keep working. The transformer keeps no
cache: it takes immutable past K/V and returns the new ones; only its caller commits.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backbones.plans import AttentionPlan, bidirectional_plan
from backbones.rope import rope_table, rotate
from backbones.visible import LayerKV, Positions, VisibleKV, spread

THETA = 10000.0
"""Base of the rotary embedding."""


@dataclass(frozen=True)
class TextKV:
    """Cross-attention keys and values per layer, each [P, L, heads, head_dim], under the policy that made them.

    The text of one prompt serves all its branches: P divides the batch, row p belongs to N / P consecutive samples.
    """

    layers: tuple[LayerKV, ...]

    @property
    def prompts(self) -> int:
        """P."""
        return self.layers[0][0].shape[0]


@dataclass(frozen=True)
class Context:
    """What every block of one forward call shares: the plan, the rope geometry and the past."""

    plan: AttentionPlan
    height: int
    width: int
    theta: float
    past: VisibleKV | None
    attention: str = "auto"
    memo: dict[tuple, Tensor] = field(default_factory=dict)
    """Rotary tables and index tensors, made by the first layer and gone with the call."""

    def rotate(self, x: Tensor, positions: Positions) -> Tensor:
        """Rotate x [N, frames, S, heads, head_dim] to the temporal positions of its frames."""
        key = ("table", positions)
        if key not in self.memo:
            self.memo[key] = rope_table(
                positions, self.height, self.width, x.shape[-1], self.theta, wide_dtype(x), x.device
            )
        return rotate(x, self.memo[key])

    def take(self, x: Tensor, frames: tuple[int, ...]) -> Tensor:
        """Frames of x along dimension 1; a contiguous run is a slice, not a copy."""
        if frames == tuple(range(frames[0], frames[0] + len(frames))):
            return x[:, frames[0] : frames[0] + len(frames)]
        key = ("frames", frames)
        if key not in self.memo:  # one transfer to the device for all layers
            self.memo[key] = torch.tensor(frames).to(x.device, non_blocking=True)
        return x.index_select(1, self.memo[key])

    def offsets(self, keys: tuple[int, ...], k: Tensor) -> Tensor | None:
        """What is added to the logits of the frames ``keys`` of [past | sequence], per token [frames · S]."""
        past = None if self.past is None else self.past.offsets
        if past is None:
            return None
        key = ("offsets", keys)
        if key not in self.memo:
            each = torch.tensor([past[i] if i < self.plan.past else 0.0 for i in keys], dtype=k.dtype)
            self.memo[key] = each.repeat_interleave(k.shape[2]).to(k.device, non_blocking=True)
        return self.memo[key]


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where x is: what norms, modulation, rotary tables and timesteps are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


ATTENTION: dict[str, list[SDPBackend] | None] = {
    "auto": None,  # torch chooses
    "math": [SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
}
"""Kernels of the attention by name; they differ by roundings. Chosen per call, not for the process: a checkpointed
block computes again, outside of any context that was around the forward pass, and must take the same one."""


def attend(q: Tensor, k: Tensor, v: Tensor, attention: str = "auto", offsets: Tensor | None = None) -> Tensor:
    """Full attention of q [N, Lq, heads, d] over k, v [N, Lk, heads, d] → [N, Lq, heads, d].

    offsets: added to the logits of the keys [Lk]. Raises ValueError where the named kernel cannot do it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if offsets is None else offsets.to(q.dtype).expand(q.shape[2], -1)
    kernels = ATTENTION[attention]
    if kernels is None:
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    try:
        with sdpa_kernel(kernels):
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        masked = "" if mask is None else " behind a mask (RecomputedWindow.bias)"
        raise ValueError(
            f"attention={attention!r} has no kernel for {q.dtype} with {q.shape[-1]} numbers per head on {q.device}"
            f"{masked}; set attention='auto' or another of {', '.join(ATTENTION)}"
        ) from error


def planned_attention(q: Tensor, k: Tensor, v: Tensor, layer: int, context: Context) -> Tensor:
    """Self-attention by plan: q, k, v [N, F, S, heads, d], un-rotated → [N, F, S, heads, d]."""
    plan, past = context.plan, context.past
    if plan.whole:  # streaming and bidirectional: no gathering, and the rotated past is kept for the block's steps
        (only,) = plan.segments
        q = context.rotate(q, only.query_positions)
        k = context.rotate(k, only.key_positions[plan.past :])
        if past is not None and (plan.past or past.memory):
            positions = past.positions or only.key_positions[: plan.past]
            past_k, past_v = past.rotated(layer, positions, lambda x: context.rotate(x, positions))
            k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        offsets = context.offsets(only.keys, k)
        out = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), context.attention, offsets)
        return out.unflatten(1, q.shape[1:3])

    memory = None if past is None else past.remembered(layer)
    if past is not None and plan.past:
        past_k, past_v = past.read(layer)
        k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
    outputs: list[Tensor] = []
    for batch in plan.batches:
        q_b = context.rotate(context.take(q, batch.queries), batch.query_positions)
        k_b = context.rotate(context.take(k, batch.keys), batch.key_positions)
        v_b = context.take(v, batch.keys)
        rows = (batch.count, -1)
        q_b, k_b, v_b = (x.unflatten(1, rows).flatten(0, 1) for x in (q_b, k_b, v_b))
        if memory is not None:  # every segment sees all of it
            more_k, more_v = (spread(x, len(k_b)) for x in memory)
            k_b, v_b = torch.cat([k_b, more_k], dim=1), torch.cat([v_b, more_v], dim=1)
        # segments of a batch see equally many past frames where a policy has offsets, and those first
        offsets = context.offsets(batch.keys[: len(batch.keys) // batch.count], k_b)
        q_b, k_b, v_b = (x.flatten(1, 2) for x in (q_b, k_b, v_b))
        out = attend(q_b, k_b, v_b, context.attention, offsets)  # [N · segments, queries · S, heads, d]
        outputs.append(out.reshape(q.shape[0], len(batch.queries), *q.shape[2:]))
    return context.take(torch.cat(outputs, dim=1), plan.places)


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm in float32 or wider (diffusers' narrows float64 to float32, which hides errors below 1e-6)."""

    def forward(self, input: Tensor) -> Tensor:
        wide = wide_dtype(input)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(input.to(wide), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class CausalWanBlock(WanTransformerBlock):
    """One transformer block over frames: hidden states [N, F, S, dim], modulation per frame [N, F, 6, dim]."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, qk_norm: str, cross_attn_norm: bool, eps: float) -> None:
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        self.norm1 = WideLayerNorm(dim, eps, elementwise_affine=False)
        self.norm2 = WideLayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.norm3 = WideLayerNorm(dim, eps, elementwise_affine=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, text: LayerKV, temb: Tensor, layer: int, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        table = self.scale_shift_table.to(wide_dtype(temb))
        modulation = (table + temb).unsqueeze(3)  # [N, F, 6, 1, dim]: broadcast over the S tokens of a frame
        shift, scale, gate, c_shift, c_scale, c_gate = modulation.unbind(2)
        dtype, wide = hidden_states.dtype, modulation.dtype

        # 1. Self-attention by plan
        x = (self.norm1(hidden_states.to(wide)) * (1 + scale) + shift).to(dtype)
        heads = (self.attn1.heads, -1)
        q = self.attn1.norm_q(self.attn1.to_q(x)).unflatten(-1, heads)
        k = self.attn1.norm_k(self.attn1.to_k(x)).unflatten(-1, heads)
        v = self.attn1.to_v(x).unflatten(-1, heads)
        x = planned_attention(q, k, v, layer, context).flatten(-2).to(dtype)
        x = self.attn1.to_out[1](self.attn1.to_out[0](x))
        hidden_states = (hidden_states.to(wide) + x * gate).to(dtype)

        # 2. Cross-attention: the branches of a prompt are more queries of the same keys, so text K/V are never copied
        x = self.norm2(hidden_states.to(wide)).to(dtype)
        q = self.attn2.norm_q(self.attn2.to_q(x)).unflatten(-1, heads)
        prompts = text[0].shape[0]
        x = attend(q.reshape(prompts, -1, *q.shape[-2:]), *text, context.attention).reshape(*x.shape)
        hidden_states = hidden_states + self.attn2.to_out[1](self.attn2.to_out[0](x))

        # 3. Feed-forward
        x = (self.norm3(hidden_states.to(wide)) * (1 + c_scale) + c_shift).to(dtype)
        hidden_states = (hidden_states.to(wide) + self.ffn(x).to(wide) * c_gate).to(dtype)
        return hidden_states, k, v

    def text_kv(self, text: Tensor) -> LayerKV:
        """Keys and values of the projected text [P, L, dim]."""
        heads = (self.attn2.heads, -1)
        k = self.attn2.norm_k(self.attn2.to_k(text)).unflatten(-1, heads)
        return k, self.attn2.to_v(text).unflatten(-1, heads)


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """The Wan transformer, block-causal over frames. Text-to-video configurations only (no image conditioning).

    Called with a plan and past K/V it evaluates a block of a stream or a packed sequence; called without them it is the
    bidirectional stock model.
    """

    _no_split_modules = ["CausalWanBlock"]  # noqa: RUF012 (names and types are those of diffusers)
    _repeated_blocks = ["CausalWanBlock"]  # noqa: RUF012
    _cp_plan = None

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError("the causal Wan transformer is text-to-video: image_dim, added_kv_proj_dim must be None")
        if patch_size[0] != 1:
            raise ValueError(f"patch_size must keep frames apart (first entry 1), got {tuple(patch_size)}")
        # the parent builds everything but the blocks, which are ours; the config must still say how many there are
        super().__init__(
            patch_size, num_attention_heads, attention_head_dim, in_channels, out_channels, text_dim, freq_dim, ffn_dim,
            0, cross_attn_norm, qk_norm, eps, None, None, rope_max_seq_len, pos_embed_seq_len,
        )  # fmt: skip
        self.register_to_config(num_layers=num_layers)
        dim = num_attention_heads * attention_head_dim
        self.norm_out = WideLayerNorm(dim, eps, elementwise_affine=False)
        self.blocks = nn.ModuleList(
            CausalWanBlock(dim, ffn_dim, num_attention_heads, qk_norm or "", cross_attn_norm, eps)
            for _ in range(num_layers)
        )

    def text_kv(self, encoder_hidden_states: Tensor) -> TextKV:
        """Cross-attention K/V of padded text embeddings [P, L, text_dim]; padding rows are attended to, as trained."""
        text = self.condition_embedder.text_embedder(encoder_hidden_states)
        return TextKV(tuple(block.text_kv(text) for block in self.blocks))  # pyright: ignore[reportCallIssue]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | TextKV,
        *,
        plan: AttentionPlan | None = None,
        past: VisibleKV | None = None,
        return_kv: bool = False,
        attention: str = "auto",
    ) -> tuple[Tensor, tuple[LayerKV, ...]]:
        """One pass over a sequence of frames.

        hidden_states: [N, C, F, H, W]. timestep: 1000 σ as float32 or wider, [N] or one per frame [N, F].
        encoder_hidden_states: padded text [P, L, text_dim] or its K/V, P dividing N. plan, past: who sees what; without
        them, bidirectional. attention: which kernel, see `ATTENTION`.
        Returns (output [N, C, F, H, W], new K/V per layer, empty unless return_kv).
        Raises ValueError for integer or 16-bit timesteps (bf16 maps 937.5 to 936) and where P does not divide N.
        """
        if not timestep.is_floating_point() or timestep.dtype.itemsize < 4:
            raise ValueError(f"timesteps must be float32 or wider, got {timestep.dtype}: 937.5 would become 936 or 937")
        batch, _, frames, height, width = hidden_states.shape
        _, p_h, p_w = self.config["patch_size"]
        grid = (height // p_h, width // p_w)
        context = Context(plan or bidirectional_plan(frames), *grid, THETA, past, attention)
        text = (
            encoder_hidden_states if isinstance(encoder_hidden_states, TextKV) else self.text_kv(encoder_hidden_states)
        )
        if batch % text.prompts:
            raise ValueError(f"{text.prompts} prompts in encoder_hidden_states must divide the batch of {batch} clips")

        # frames are folded into the batch: with a patch that keeps frames apart, the 3-D convolution is a 2-D one
        x = self._embed_patches(hidden_states)
        temb, modulation = self._embed_time(timestep, batch, frames)

        new_kv: list[LayerKV] = []
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        checkpoint = self._gradient_checkpointing_func if checkpointing else None
        for layer, block in enumerate(self.blocks):
            arguments = (x, text.layers[layer], modulation, layer, context)
            x, k, v = block(*arguments) if checkpoint is None else checkpoint(block, *arguments)
            if return_kv:
                new_kv.append((k, v))

        table = self.scale_shift_table.to(temb.dtype)
        shift, scale = (table + temb.unsqueeze(2)).unsqueeze(3).unbind(2)  # [N, F, 1, dim]
        x = (self.norm_out(x.to(temb.dtype)) * (1 + scale) + shift).to(x.dtype)
        x = self.proj_out(x).reshape(batch, frames, *grid, p_h, p_w, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width), tuple(new_kv)

    def _embed_patches(self, hidden_states: Tensor) -> Tensor:
        """[N, C, F, H, W] → [N, F, S, dim] by a linear layer: the convolution's stride is its kernel."""
        weight = self.patch_embedding.weight  # [dim, C, 1, p_h, p_w]
        _, p_h, p_w = self.config["patch_size"]
        x = hidden_states.to(weight.dtype).unflatten(4, (-1, p_w)).unflatten(3, (-1, p_h))  # N C F h p w q
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)
        return F.linear(x, weight.flatten(1), self.patch_embedding.bias)

    def _embed_time(self, timestep: Tensor, batch: int, frames: int) -> tuple[Tensor, Tensor]:
        """Per-frame time embedding [N, F, dim] and modulation [N, F, 6, dim], both float32 or wider.

        Outside of any autocast: it costs nothing, and a bf16 modulation scales every token of a frame alike wrongly.
        """
        per_frame = timestep[:, None].expand(batch, frames) if timestep.ndim == 1 else timestep
        embedder = self.condition_embedder
        sinusoid = time_sinusoid(per_frame, self.config["freq_dim"])
        weight_dtype = embedder.time_embedder.linear_1.weight.dtype
        device = timestep.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # shapes have no autocast
            temb = embedder.time_embedder(sinusoid.to(weight_dtype))
            modulation = embedder.time_proj(embedder.act_fn(temb).to(embedder.time_proj.weight.dtype))
        return temb.to(wide_dtype(temb)), modulation.unflatten(-1, (6, -1)).to(wide_dtype(temb))


def time_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """cos(t ω_j), sin(t ω_j), ω_j = 10000^(−j / (dim/2)), evaluated in float64: [..., dim].

    diffusers evaluates it in float32, which costs 1e-4 at t = 1000; the released trainers use float64.
    """
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    phase = timestep.double().unsqueeze(-1) * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)
