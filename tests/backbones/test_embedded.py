"""The embedded generator reads captions word by word, and its packaged weights are one policy in rollout and update."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones.embedded import generator as embedded
from backbones.embedded.generator import ShapesGenerator, embedded_recipe, packaged_generator
from framework.data.shapes import CAPTIONS, SIZE, VOCABULARY
from framework.kernels import Consistency
from framework.records import Predictions
from framework.rollout import roll_out
from framework.selfchecks import replay_deviation
from tests.support import PROMPTS, group_plans, normal, tiny_generator

PACKAGED = Path(embedded.__file__).parent / embedded.PACKAGED


def test_a_caption_is_read_word_by_word_in_order():
    text = tiny_generator().encode_text([str(caption) for caption in CAPTIONS])
    assert text.shape == (144, 6, len(VOCABULARY)) and bool((text.sum(-1) == 1).all())
    for rows, caption in zip(text.argmax(-1).tolist(), CAPTIONS, strict=True):
        assert " ".join(VOCABULARY[i] for i in rows) == str(caption)


def test_text_follows_the_precision_of_the_weights():
    assert tiny_generator(torch.float64).encode_text(PROMPTS[:1]).dtype == torch.float64


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match=r"cannot read the caption 'a cat'"):
        tiny_generator().open(["a cat"])


def test_pixels_are_latents_frame_by_frame():
    latents = normal(0, 2, 3, 5, SIZE, SIZE)
    pixels = tiny_generator().decode(latents)
    assert pixels.shape == (2, 5, 3, SIZE, SIZE) and torch.equal(pixels[:, 4], latents[:, :, 4])


def test_the_packaged_weights_are_small_whole_and_of_the_shipped_size():
    assert PACKAGED.stat().st_size <= 4_000_000
    generator = packaged_generator()
    assert sum(p.numel() for p in generator.network.parameters()) == pytest.approx(0.9e6, rel=0.05)
    assert all(bool(p.isfinite().all()) for p in generator.network.parameters())
    assert generator.recipe == embedded_recipe() and generator.recipe.prediction == "x0"


def packed_against_streaming(generator: ShapesGenerator) -> float:
    """The packed update asks the packaged policy at what its streaming rollout saw, past where its window evicts."""
    tape = roll_out(generator, group_plans(PROMPTS[:2], 2, 2, 5), Consistency(), frozenset({Predictions}))
    return replay_deviation(generator, tape)


def test_packed_equals_streaming_for_the_packaged_weights():
    assert packed_against_streaming(packaged_generator()) < 1e-5


def test_the_packed_check_sees_another_window_in_the_update(monkeypatch: pytest.MonkeyPatch):
    generator = packaged_generator()
    replay = generator.replay

    def with_a_shorter_memory(probes):
        generator.policy = embedded.SinkWindow(sink=3, window=9, relative=True)
        return replay(probes)

    monkeypatch.setattr(generator, "replay", with_a_shorter_memory)
    assert packed_against_streaming(generator) > 1e-3


def test_a_checkpoint_that_is_none_or_foreign_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"checkpoint=.*nowhere.*is not a file"):
        packaged_generator(str(tmp_path / "nowhere"))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(PACKAGED.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged\.safetensors.*is not a whole safetensors file"):
        packaged_generator(str(damaged))
    tensors = load_file(PACKAGED)
    del tensors["proj_out.bias"]
    save_file(tensors, tmp_path / "partial.safetensors")
    with pytest.raises(ValueError, match=r"partial\.safetensors does not fit.*1 tensors missing \['proj_out\.bias'\]"):
        packaged_generator(str(tmp_path / "partial.safetensors"))
    save_file(tiny_generator().network.state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"tiny\.safetensors does not fit.*tensors missing"):
        packaged_generator(str(tmp_path / "tiny.safetensors"))
