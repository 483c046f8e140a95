"""A memory estimate follows the shapes: it agrees with what was counted, and grows with what grows."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st

from backbones.embedded.generator import CONFIG
from backbones.history import FullHistory, SinkWindow
from benchmarks import p6
from benchmarks.scenarios import random_generator
from framework.adapters import LoRA
from framework.interfaces import StreamingGenerator
from framework.memory_estimate import (
    FLOAT,
    NetworkDimensions,
    RolloutShape,
    TrainedSize,
    UpdateShape,
    estimate_memory,
    gathered_frames,
    size,
)
from framework.run_shape import StepParts, estimate_step, rollout_shape, trained_size, update_shape
from tests.support import holds, refuted, tiny_generator

NETWORK = NetworkDimensions(layers=30, width=1536, ffn_width=8960, tokens=1560, text_tokens=512, window=12)
ROLLOUT = RolloutShape(2, 4, 0, 9, 3, 16 * 60 * 104, 4, 4, path=False)
UPDATE = UpdateShape(clips=4, total=8, frames=9, streams=1, views=3, history_grad=False, kept=False)
WEIGHTS = TrainedSize(2_800_000_000, 350_000_000, 256)


def seen_by_policy(policy: SinkWindow | FullHistory, start: int, block: int) -> int:
    return len(policy.visible(start, block))


@pytest.mark.parametrize("policy", [SinkWindow(3, 12), SinkWindow(0, 6), FullHistory()], ids=str)
def test_the_sizes_of_a_generator_are_those_of_its_network_and_its_history(policy: SinkWindow | FullHistory) -> None:
    generator = tiny_generator(policy=policy)
    found = generator.dimensions("a red circle moves left slowly")
    assert (found.layers, found.width, found.ffn_width, found.tokens) == (2, 24, 32, 4)
    assert found.text_tokens == 6 and not found.checkpointing
    for start in (0, 3, 9, 12, 30, 300):
        assert found.seen(start, 3) == seen_by_policy(policy, start, 3)


def check_gathered(start: int, blocks: int, window: int, streams: int, slack: int) -> None:
    """Keys are those of every block as far as it sees, once per noisy version."""
    network = replace(NETWORK, window=window)
    keys, values = gathered_frames(network, start, 3 * blocks, 3, streams)
    visible = SinkWindow(0, window).visible
    assert keys == streams * sum(len(visible(start + 3 * b, 3)) + 3 for b in range(blocks)) + slack
    assert values >= keys


GATHERED = (st.integers(0, 5).map(lambda b: 3 * b), st.integers(1, 5), st.sampled_from([6, 9, 12]), st.integers(1, 3))


def test_gathered_keys_are_counted_block_by_block() -> None:
    holds(check_gathered, *GATHERED, st.just(0))
    refuted(check_gathered, *GATHERED, st.just(1))


@pytest.mark.parametrize("case", p6.cases()[:1] + p6.cases()[4:5], ids=lambda case: case.name)
def test_the_estimate_is_within_a_tenth_of_what_was_counted(case: p6.Case) -> None:
    tiny = {**CONFIG, "num_layers": 2}
    small = replace(case, config=tiny)
    guess, estimate = p6.estimated(small)
    found = p6.measured(small)
    assert p6.off(guess, found) <= 0.10, f"{guess} estimated, {found} counted"
    blind = guess - estimate.phases["update"]
    assert p6.off(blind, found) > 0.10, "without the activations the same check fails"


def test_what_a_run_holds_is_counted_to_the_byte() -> None:
    generator = random_generator()
    own = sum(p.nbytes for p in generator.network.parameters())
    lora = LoRA(8)
    trained = lora.attach(generator.network, 0)
    weights = trained_size(generator.network, lora)
    count = sum(p.numel() for p in trained.values())
    assert weights == TrainedSize(own, count, 8)
    held = estimate_memory(NETWORK, ROLLOUT, UPDATE, weights).held
    assert sum(held.values()) == own + FLOAT * 7 * count


@pytest.mark.parametrize(
    "larger",
    [
        {"clips": 8}, {"frames": 12}, {"streams": 2}, {"history_grad": True}, {"kept": True}, {"views": 4},
    ],
    ids=str,
)  # fmt: skip
def test_more_work_in_an_update_takes_more_memory(larger: dict) -> None:
    rollout = replace(ROLLOUT, frames=larger.get("frames", 9))
    more = estimate_memory(NETWORK, rollout, replace(UPDATE, **larger), WEIGHTS)
    assert more.phases["update"] > estimate_memory(NETWORK, ROLLOUT, UPDATE, WEIGHTS).phases["update"]


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all() -> None:
    plain = estimate_memory(NETWORK, ROLLOUT, UPDATE, WEIGHTS).phases["update"]
    assert estimate_memory(replace(NETWORK, checkpointing=True), ROLLOUT, UPDATE, WEIGHTS).phases["update"] < plain / 5


def test_a_longer_stream_takes_no_more_behind_a_window_and_more_behind_everything() -> None:
    near, far = (replace(ROLLOUT, start=start) for start in (30, 300))
    for window, grows in ((12, False), (None, True)):
        network = replace(NETWORK, window=window)
        one, two = (estimate_memory(network, rollout, UPDATE, WEIGHTS).phases["update"] for rollout in (near, far))
        latents = FLOAT * (300 - 30) * ROLLOUT.groups * ROLLOUT.latent
        assert (two - one > latents) is grows and two - one >= latents


def step_parts(generator: StreamingGenerator, micro: int) -> StepParts:
    case = p6.cases()[0]
    return replace(p6.parts_of(case, random_generator()), generator=generator, micro_batch_size=micro)


def test_the_shapes_are_those_that_a_step_has() -> None:
    parts = step_parts(random_generator(), micro=5)
    assert rollout_shape(parts) == RolloutShape(2, 4, 0, 9, 3, 768, 4, 4, path=False)
    update = update_shape(parts)
    assert (update.clips, update.total, update.frames, update.streams, update.views) == (4, 8, 9, 1, 3)
    assert update.arithmetic() == "2 backward passes × 4 clips"
    assert replace(update, clips=3).arithmetic() == "2 backward passes × 3 clips and one of 2"


def test_a_generator_that_tells_no_sizes_gets_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random_generator()
    monkeypatch.setattr(type(generator), "dimensions", StreamingGenerator.dimensions)
    assert estimate_step(step_parts(generator, 8), LoRA(4)) is None


def test_bytes_are_written_as_a_person_reads_them() -> None:
    assert size(3.5 * 2**20) == "3.5 MiB" and size(3 * 2**30) == "3.00 GiB"
    line = estimate_memory(NETWORK, ROLLOUT, UPDATE, WEIGHTS).summary()
    assert "\n" not in line and "peak, in the update (" in line
