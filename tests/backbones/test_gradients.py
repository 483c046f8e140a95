"""Replay differentiates exactly what it is asked to: through the clean history, or not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from backbones.history import SinkWindow
from backbones.streaming import WanStream
from backbones.visible import VisibleKV
from tests.backbones.micro import (
    EVICTING,
    LATENT,
    PROMPTS,
    MicroGenerator,
    Setting,
    fresh_network,
    micro_generator,
    noise,
    settings_strategy,
)
from tests.backbones.ways import after_prefix, dense, with_shared_prefix


def gradients(setting: Setting, network, velocity: Tensor) -> dict[str, Tensor]:
    """Of Σ cotangent · velocity with respect to all weights."""
    cotangent = noise(setting.seed + 9, *velocity.shape).to(velocity)
    names, weights = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((cotangent * velocity).sum(), weights), strict=True))


def relative_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest ‖a − b‖ / ‖b‖ over the weights."""
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)) for name in b)


@settings(deadline=None, max_examples=12)
@given(settings_strategy(min_blocks=2))
def test_the_gradient_is_that_of_the_dense_forward_with_history_attached_or_detached(setting: Setting):
    generator = setting.generator()
    found = {}
    for attached in (True, False):
        probes = setting.probes(history_grad=attached)
        found[attached] = gradients(setting, generator.network, generator.replay(probes))
        expected = dense(setting, generator, probes, detach_clean=not attached)
        expected = gradients(setting, generator.network, expected)
        assert relative_gap(found[attached], expected) < 1e-9


def test_the_gradient_comparison_sees_the_other_kind_of_history():
    generator = EVICTING.generator()
    attached, detached = (
        gradients(EVICTING, generator.network, generator.replay(EVICTING.probes(history_grad=grad)))
        for grad in (True, False)
    )
    assert relative_gap(attached, detached) > 0.01


def test_the_values_do_not_depend_on_the_kind_of_history():
    generator = EVICTING.generator()
    attached, detached = (generator.replay(EVICTING.probes(history_grad=grad)) for grad in (True, False))
    assert torch.equal(attached, detached)


@pytest.mark.parametrize("attached", [True, False])
def test_gradient_reaches_the_clean_context_iff_the_history_is_attached(attached: bool):
    probes = EVICTING.probes(history_grad=attached)
    clean = probes.clean.requires_grad_()
    velocity = EVICTING.generator().replay(replace(probes, clean=clean))
    (gradient,) = torch.autograd.grad(velocity.square().sum(), clean, allow_unused=True)
    if not attached:
        assert gradient is None
        return
    seen = gradient.abs().amax(dim=(0, 1, 3, 4))
    assert bool((seen[: -EVICTING.block] > 1e-6).all())
    assert bool((seen[-EVICTING.block :] == 0).all())  # nobody sees the last clean block


def test_no_gradient_reaches_the_prefix():
    tail = after_prefix(EVICTING, with_shared_prefix(EVICTING, EVICTING.probes(history_grad=True), 2), 2)
    assert tail.prefix is not None
    prefix = tail.prefix.clone().requires_grad_()
    velocity = EVICTING.generator().replay(replace(tail, prefix=prefix))
    assert torch.autograd.grad(velocity.sum(), prefix, allow_unused=True) == (None,)


def test_gradients_of_noisy_blocks_without_a_past_do_not_depend_on_the_history():
    first = replace(EVICTING, frames=EVICTING.block)
    generator = first.generator()
    attached, detached = (
        gradients(first, generator.network, generator.replay(first.probes(history_grad=grad))) for grad in (True, False)
    )
    assert all(torch.equal(attached[name], detached[name]) for name in attached)


@pytest.mark.parametrize("attached", [True, False])
def test_gradient_checkpointing_changes_no_gradient(attached: bool):
    plain, checkpointed = fresh_network(), fresh_network()
    checkpointed.enable_gradient_checkpointing()
    probes = EVICTING.probes(history_grad=attached)
    expected, found = (
        gradients(EVICTING, network, micro_generator(EVICTING.policy, EVICTING.block, network).replay(probes))
        for network in (plain, checkpointed)
    )
    assert relative_gap(found, expected) < 1e-12


def attached_stream(generator: MicroGenerator) -> tuple[WanStream, Tensor]:
    """A stream whose history carries a graph, and a block to ask behind it."""
    x = noise(5, 1, LATENT[0], 4, *LATENT[1:])
    return generator.commit(x[:, :, :2], generator.open(PROMPTS[:1])), x[:, :, 2:]


def test_a_stream_with_an_attached_history_may_be_asked_and_differentiated_twice():
    network = fresh_network()
    generator = micro_generator(SinkWindow(2, 6), 2, network)
    stream, x = attached_stream(generator)
    with torch.no_grad():
        generator.predict(x, 0.5, stream)  # would leave a memo without a graph
    fresh, _ = attached_stream(generator)
    expected = gradients(EVICTING, network, generator.predict(x, 0.5, fresh))
    weights = list(network.parameters())
    cotangent = noise(EVICTING.seed + 9, *x.shape)
    for _ in range(2):
        loss = (cotangent * generator.predict(x, 0.5, stream)).sum()
        found = torch.autograd.grad(loss, weights, retain_graph=True)
        assert relative_gap(dict(zip(expected, found, strict=True)), expected) < 1e-12


def test_the_memo_test_sees_keys_that_are_always_memoised(monkeypatch: pytest.MonkeyPatch):
    def rotated(self, layer, positions, rotate):
        if (layer, positions) not in self.memo:
            k, v = self.read(layer)
            self.memo[layer, positions] = (rotate(k), v)
        return self.memo[layer, positions]

    monkeypatch.setattr(VisibleKV, "rotated", rotated)
    with pytest.raises(AssertionError):
        test_a_stream_with_an_attached_history_may_be_asked_and_differentiated_twice()


def test_checkpointing_survives_an_attached_history():
    network = fresh_network()
    generator = micro_generator(SinkWindow(2, 6), 2, network)
    stream, x = attached_stream(generator)
    expected = gradients(EVICTING, network, generator.predict(x, 0.5, stream))
    network.enable_gradient_checkpointing()
    stream, x = attached_stream(generator)
    found = gradients(EVICTING, network, generator.predict(x, 0.5, stream))
    assert relative_gap(found, expected) < 1e-12
