"""The causal transformer keeps the weights, names and bidirectional values of the stock diffusers model."""

from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backbones.wan.transformer import CausalWanTransformer3DModel, time_sinusoid
from tests.backbones.micro import LATENT, TEXT, fresh_network, micro_config, micro_network, noise
from tests.backbones.oracle import Frame, dense_forward


class WideSinusoid(nn.Module):
    """The time sinusoid in float64, which the stock model evaluates in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.tensor([10000.0 ** (-j / half) for j in range(half)], dtype=torch.float64)
        phase = timestep.double()[:, None] * frequencies
        return torch.cat([phase.cos(), phase.sin()], -1).float()


def stock_model(network: CausalWanTransformer3DModel, *, wide_time: bool = True) -> WanTransformer3DModel:
    """The stock model with the same weights."""
    model = WanTransformer3DModel(**micro_config(network.config["num_attention_heads"]))
    model.load_state_dict(network.state_dict(), strict=True)
    if wide_time:
        model.condition_embedder.add_module("timesteps_proj", WideSinusoid(network.config["freq_dim"]))
    return model


def inputs(batch: int, frames: int, seed: int, height: int = LATENT[1], width: int = LATENT[2]):
    x = noise(seed, batch, LATENT[0], frames, height, width)
    return x, noise(seed + 1, batch, *TEXT)


@torch.no_grad()
def stock_gap(network, stock, batch: int, frames: int, seed: int, size=LATENT[1:]) -> float:
    """Largest difference of the bidirectional outputs, one timestep per clip."""
    x, text = (t.float() for t in inputs(batch, frames, seed, *size))
    timestep = 1000 * torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    expected = stock(x, timestep, text, return_dict=False)[0]
    return float((network(x, timestep, text)[0] - expected).abs().max())


@settings(deadline=None, max_examples=15)
@given(st.sampled_from((1, 2)), st.integers(1, 2), st.integers(1, 4), st.integers(0, 99), st.sampled_from((4, 6)))
def test_without_a_plan_it_is_the_stock_model(heads: int, batch: int, frames: int, seed: int, width: int):
    network = micro_network(heads, torch.float32)
    assert stock_gap(network, stock_model(network), batch, frames, seed, (4, width)) < 1e-5


def test_the_stock_comparison_sees_one_changed_row_of_a_weight():
    network, changed = fresh_network(dtype=torch.float32), fresh_network(dtype=torch.float32)
    with torch.no_grad():
        changed.get_parameter("blocks.1.attn1.to_k.weight")[0] += 0.1
    assert stock_gap(network, stock_model(changed), 1, 2, 0) > 1e-4


def test_the_stock_float32_sinusoid_costs_more_than_rounding():
    network = micro_network(dtype=torch.float32)
    error = stock_gap(network, stock_model(network, wide_time=False), 2, 2, 5)
    assert 1e-6 < error < 1e-2


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(0, 99))
def test_a_timestep_per_frame_is_the_stock_timestep_per_token(frames: int, seed: int):
    network = micro_network(dtype=torch.float32)
    x, text = (t.float() for t in inputs(2, frames, seed))
    timestep = 1000 * torch.rand(2, frames, generator=torch.Generator().manual_seed(seed))
    tokens = timestep.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)
    with torch.no_grad():
        expected = stock_model(network)(x, tokens, text, return_dict=False)[0]
        found = network(x, timestep, text)[0]
        assert torch.allclose(found, expected, atol=1e-5, rtol=0)
        if frames > 1:
            assert not torch.allclose(network(x, timestep.flip(1), text)[0], expected, atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from((1, 2)), st.integers(1, 3), st.integers(0, 99))
def test_the_bidirectional_forward_is_the_dense_one_in_float64(heads: int, frames: int, seed: int):
    network = micro_network(heads)
    x, text = inputs(2, frames, seed)
    timestep = 1000 * torch.rand(2, frames, generator=torch.Generator().manual_seed(seed)).double()
    sequence = [Frame(f, 0, frames, False) for f in range(frames)]
    with torch.no_grad():
        expected = dense_forward(dict(network.named_parameters()), heads, x, timestep, text, sequence)
        assert float((network(x, timestep, text)[0] - expected).abs().max()) < 1e-10


def test_one_timestep_per_clip_is_that_timestep_on_every_frame():
    network = micro_network()
    x, text = inputs(2, 3, 0)
    timestep = torch.tensor([250.0, 937.5], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(network(x, timestep, text)[0], network(x, timestep[:, None].expand(2, 3), text)[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float16])
def test_integer_and_narrow_timesteps_are_refused(dtype: torch.dtype):
    x, text = inputs(1, 1, 0)
    with pytest.raises(ValueError, match="float32 or wider"):
        micro_network()(x, torch.tensor([937]).to(dtype), text)


def test_a_bf16_timestep_would_change_the_output():
    x, text = inputs(1, 1, 0)
    with torch.no_grad():
        right, rounded = (micro_network()(x, torch.tensor([t]).double(), text)[0] for t in (937.5, 936.0))
    assert float((right - rounded).abs().max()) > 1e-2


def test_prompts_that_do_not_divide_the_batch_are_refused():
    x, _ = inputs(3, 2, 0)
    with pytest.raises(ValueError, match=r"2 prompts .* divide the batch of 3"):
        micro_network()(x, torch.zeros(3), noise(1, 2, *TEXT))


def test_text_may_be_given_as_embeddings_or_as_their_keys_and_values():
    network = micro_network()
    x, text = inputs(2, 2, 0)
    with torch.no_grad():
        assert torch.equal(network(x, torch.ones(2), text)[0], network(x, torch.ones(2), network.text_kv(text))[0])


def test_padding_rows_of_the_text_are_attended_to():
    network = micro_network()
    x, text = inputs(1, 2, 0)
    padded = torch.cat([text, torch.zeros_like(text)], 1)
    with torch.no_grad():
        gap = network(x, torch.ones(1), padded)[0] - network(x, torch.ones(1), text)[0]
    assert float(gap.abs().max()) > 1e-3


def test_image_conditioning_and_temporal_patches_are_refused():
    with pytest.raises(ValueError, match="text-to-video"):
        CausalWanTransformer3DModel(**micro_config(), image_dim=8)
    with pytest.raises(ValueError, match="patch_size"):
        CausalWanTransformer3DModel(**micro_config(), patch_size=(2, 2, 2))


def test_a_saved_model_loads_as_itself(tmp_path: Path):
    network = micro_network(dtype=torch.float32)
    network.save_pretrained(tmp_path)
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config["num_layers"] == len(loaded.blocks) == 2
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


def test_bf16_weights_give_nearly_the_float32_output():
    network = fresh_network(dtype=torch.float32)
    x, text = (t.float() for t in inputs(1, 3, 0))
    with torch.no_grad():
        expected = network(x, torch.tensor([600.0]), text)[0]
        found = network.bfloat16()(x.bfloat16(), torch.tensor([600.0]), text.bfloat16())[0]
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).abs().mean() / expected.abs().mean()) < 0.02


def test_the_sinusoid_has_cosines_first_and_is_accurate_at_large_timesteps():
    found = time_sinusoid(torch.tensor([937.5]), 8)
    frequencies = torch.tensor([10000.0 ** (-j / 4) for j in range(4)], dtype=torch.float64)
    expected = torch.cat([(937.5 * frequencies).cos(), (937.5 * frequencies).sin()])
    assert torch.allclose(found[0], expected, atol=1e-12, rtol=0)
    assert not torch.allclose(found[0], expected.roll(4), atol=1e-3)
