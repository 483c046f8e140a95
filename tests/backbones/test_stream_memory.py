"""What a stream costs in bytes, and that neither a budget nor a kernel changes what it computes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from backbones.history import FullHistory, HistoryPolicy, SinkWindow, kv_frame_bytes
from backbones.memory_bank import MemoryBank
from backbones.visible import VisibleKV
from backbones.wan import transformer
from backbones.wan.transformer import ATTENTION, CausalWanTransformer3DModel
from tests.backbones.micro import (
    EVICTING,
    LATENT,
    PROMPTS,
    MicroGenerator,
    fresh_network,
    micro_config,
    micro_generator,
    noise,
)
from tests.backbones.test_gradients import gradients, relative_gap
from tests.backbones.ways import SEEN, gap, streamed
from tests.support import holds, refuted

# Keys and values of a frame


def theory(generator: MicroGenerator, dtype: torch.dtype) -> int:
    config, (_, height, width) = generator.network.config, generator.recipe.latent
    tokens = height * width // 4
    wide = config["num_attention_heads"] * config["attention_head_dim"]
    return kv_frame_bytes(config["num_layers"], tokens, wide, dtype.itemsize)


def stored(generator: MicroGenerator, frames: int, clips: int, dtype: torch.dtype) -> float:
    """Measured bytes of a frame of a clip."""
    x = noise(1, clips, LATENT[0], frames, *LATENT[1:]).to(dtype)
    with torch.no_grad():
        stream = generator.open(PROMPTS[:clips])
        for block in x.split(generator.recipe.block_frames, dim=2):
            stream = generator.commit(block, stream)
    return stream.history.nbytes / len(stream.history.frame_ids) / clips


@pytest.mark.parametrize("policy", [FullHistory(), SinkWindow(2, 8), MemoryBank(2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stored_frame_takes_two_vectors_per_token_and_layer(policy: HistoryPolicy, dtype: torch.dtype):
    generator = micro_generator(policy, 2, fresh_network(dtype=dtype))
    for clips in (1, 2):
        assert stored(generator, 12, clips, dtype) == theory(generator, dtype)


def test_the_size_is_that_of_the_released_networks():
    assert kv_frame_bytes(30, 1560, 1536, 2) == 287_539_200  # 1.3B
    assert kv_frame_bytes(40, 1560, 5120, 2) == 1_277_952_000  # 14B


def test_the_measure_sees_a_frame_that_keeps_a_larger_storage_alive():
    generator = micro_generator(FullHistory(), 1)
    original = MicroGenerator.commit

    class Views(MicroGenerator):
        def commit(self, x0, stream, visible=None):
            after = original(self, torch.cat([x0, x0], 2), stream, visible)
            last = after.history.chunks[-1]
            cut = replace(last, kv=tuple((k[:, :1], v[:, :1]) for k, v in last.kv))
            history = replace(after.history, chunks=(*after.history.chunks[:-1], cut))
            return replace(after, history=history)

    views = Views(generator.network, generator.recipe, generator.policy)
    assert stored(views, 4, 1, torch.float64) == 2 * theory(generator, torch.float64)


# The budget of rotated keys


def asked(policy: HistoryPolicy, budget: int | None) -> tuple[Tensor, int]:
    """Velocities at three levels behind a branched stream, and the bytes of rotated keys and values that were kept."""
    generator = micro_generator(policy, 1)
    generator.memo_bytes = budget
    x = noise(1, 2, LATENT[0], 6, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in x[:1, :, :4].split(1, dim=2):
            stream = generator.commit(block, stream)
        stream = generator.commit(x[:, :, 4:5], generator.fork(stream, 2))
        out = [generator.predict(x[:, :, 5:], sigma, stream) for sigma in (1.0, 0.8, 0.5)]
    kept = 0
    for visits in stream.memo.values():
        for visit in visits if isinstance(visits, tuple) else ():
            pairs = [pair for pair in visit.past.memo.values() if isinstance(pair, tuple)]
            kept += sum(t.nbytes for pair in pairs for t in pair)
    return torch.stack(out), kept


POLICIES = st.sampled_from([FullHistory(), SinkWindow(1, 4), SinkWindow(1, 4, relative=True), MemoryBank(1, 4, 2, 1)])


def check_budget(policy: HistoryPolicy, share: float) -> None:
    free, all_bytes = asked(policy, None)
    bound = int(share * all_bytes)
    found, kept = asked(policy, bound)
    assert torch.equal(found, free) and kept <= bound
    assert kept > 0 or share < 0.5  # a layer of two fits


def test_a_budget_bounds_what_is_kept_and_changes_no_value():
    holds(check_budget, POLICIES, st.floats(0, 1), examples=25)
    assert asked(FullHistory(), 0)[1] == 0 < asked(FullHistory(), None)[1]


@pytest.mark.parametrize("fault", ["keeps everything", "keeps the first layer for all"])
def test_the_budget_check_sees(monkeypatch: pytest.MonkeyPatch, fault: str):
    def rotated(self, layer, positions, rotate):
        key = (layer if fault == "keeps everything" else 0, positions)
        if key not in self.memo:
            self.memo[key] = self._rotated(layer, rotate)
        return self.memo[key]

    original = asked(FullHistory(), None)[0]
    monkeypatch.setattr(VisibleKV, "rotated", rotated)
    if fault == "keeps everything":
        refuted(check_budget, POLICIES, st.floats(0, 1))
    else:
        assert gap(asked(FullHistory(), None)[0], original) > SEEN


def test_a_routed_batch_shares_one_budget():
    generator = micro_generator(FullHistory(), 1)
    x = noise(1, 1, LATENT[0], 5, *LATENT[1:])
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        for block in x[:, :, :4].split(1, dim=2):
            stream = generator.commit(block, stream)
        stream, block = generator.fork(stream, 2), x[:, :, 4:].expand(2, -1, -1, -1, -1)
        free = generator.predict(block, 0.5, stream, [(0, 3), None])
        generator.memo_bytes = 3000
        again = replace(stream, memo={})
        assert torch.equal(generator.predict(block, 0.5, again, [(0, 3), None]), free)
        assert [visit.past.budget for visits in again.memo.values() for visit in visits] == [1500, 1500]


# The kernel of the attention


def probing(attention: str) -> Tensor:
    plain = EVICTING.generator(torch.float32)
    generator = MicroGenerator(plain.network, plain.recipe, plain.policy, attention=attention)
    probes = EVICTING.probes(dtype=torch.float32)
    with torch.no_grad():
        packed = generator.replay(probes)
        assert gap(packed, streamed(EVICTING, generator, probes)) < 1e-5
    return packed


def test_every_kernel_of_this_machine_computes_the_same_attention():
    assert gap(probing("math"), probing("auto")) < 1e-5
    assert gap(probing("flash"), probing("auto")) < 1e-5


def kernels_asked(monkeypatch: pytest.MonkeyPatch, attention: str, checkpointing: bool) -> list[SDPBackend]:
    """Which kernels are named in a forward and a backward pass."""
    named: list[SDPBackend] = []
    original = transformer.sdpa_kernel
    monkeypatch.setattr(transformer, "sdpa_kernel", lambda kernels: named.extend(kernels) or original(kernels))
    network = fresh_network()
    if checkpointing:
        network.enable_gradient_checkpointing()
    plain = micro_generator(EVICTING.policy, EVICTING.block, network)
    generator = MicroGenerator(network, plain.recipe, plain.policy, attention=attention)
    gradients(EVICTING, network, generator.replay(EVICTING.probes(history_grad=True)))
    monkeypatch.setattr(transformer, "sdpa_kernel", original)
    return named


def test_a_checkpointed_block_computes_again_with_the_kernel_it_was_given(monkeypatch: pytest.MonkeyPatch):
    assert kernels_asked(monkeypatch, "auto", True) == []
    once, twice = (kernels_asked(monkeypatch, "math", checkpointing) for checkpointing in (False, True))
    assert set(once) == set(twice) == {SDPBackend.MATH} and len(twice) > len(once) > 0


def test_the_kernel_changes_no_gradient():
    network = fresh_network()
    plain = micro_generator(EVICTING.policy, EVICTING.block, network)
    found = []
    for attention in ("auto", "math"):
        generator = MicroGenerator(network, plain.recipe, plain.policy, attention=attention)
        found.append(gradients(EVICTING, network, generator.replay(EVICTING.probes(history_grad=True))))
    assert relative_gap(*found) < 1e-9


def test_an_unknown_kernel_and_one_that_is_not_there_are_refused_in_one_line():
    plain = EVICTING.generator()
    with pytest.raises(ValueError, match=r"attention must be one of auto, math, .*, got 'fast'"):
        MicroGenerator(plain.network, plain.recipe, plain.policy, attention="fast")
    with pytest.raises(ValueError, match=r"memo_bytes must be at least 0, .* got -1"):
        MicroGenerator(plain.network, plain.recipe, plain.policy, memo_bytes=-1)
    with pytest.raises(ValueError, match=r"attention='cudnn' has no kernel for torch.float32 .* set attention='auto'"):
        probing("cudnn")


def test_the_default_kernel_is_the_one_that_torch_chooses():
    assert ATTENTION["auto"] is None
    network = CausalWanTransformer3DModel(**micro_config())
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 16)
    with torch.no_grad():
        assert torch.equal(
            network(x, torch.tensor([500.0]), text)[0], network(x, torch.tensor([500.0]), text, attention="auto")[0]
        )
