"""Encoders give unit vectors that depend on the frame or text alone, and loaders leave no tensor to chance."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessorPil, CLIPModel

from rewards.encoders import (
    CLIP_MEAN,
    CLIP_STD,
    ClipEncoder,
    DinoEncoder,
    fit_square,
    load_clip,
    load_dino,
    normalise_channels,
)
from tests.rewards.tiny_encoders import (
    SIZE,
    noise_clips,
    save_clip,
    tiny_clip,
    tiny_clip_encoder,
    tiny_dino_encoder,
    tiny_tokenizer,
    tiny_vit,
)
from tests.support import close, holds, refuted

SIDES = st.integers(5, 40)
SEEDS = st.integers(0, 2**20)


def smooth_frames(seed: int, height: int, width: int) -> Tensor:
    """A gradient with some waves: what a camera sees is smooth, and noise would only test rounding."""
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    slopes = torch.rand(3, 2, generator=random)
    planes = [127 + 60 * torch.sin(4 * (a * x + b * y)) + 60 * (a - b) * (x - y) for a, b in slopes]
    return torch.stack(planes).clamp(0, 255).to(torch.uint8)[None]


# pixels


def check_size(fit: Callable[[Tensor, int, str], Tensor], seed: int, height: int, width: int) -> None:
    """A square of the wanted size; a frame of one colour keeps it; what lies far outside the middle does not matter."""
    frames = noise_clips(2, 3, height, width, seed=seed)
    assert fit(frames, 12, "plain").shape == (2, 3, 12, 12)
    flat = torch.full((1, 3, height, width), seed % 256, dtype=torch.uint8)
    for resize in ("plain", "antialias"):
        assert bool((fit(flat, 12, resize) == seed % 256).all())
    if width >= 3 * height:
        edited = frames.clone()
        edited[..., : width // 8] = 255 - edited[..., : width // 8]
        assert torch.equal(fit(edited, 12, "plain"), fit(frames, 12, "plain"))


def squeezed(frames: Tensor, size: int, resize: str) -> Tensor:
    """A planted error: the whole frame is squeezed into the square."""
    new = torch.nn.functional.interpolate(frames.float(), (size, size), mode="bicubic", antialias=resize == "antialias")
    return new.clamp(0, 255).round().to(torch.uint8)


def test_frames_of_any_size_become_the_middle_square():
    holds(partial(check_size, fit_square), SEEDS, SIDES, st.integers(5, 120))
    refuted(partial(check_size, squeezed), SEEDS, SIDES, st.integers(5, 120))


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 37), (16, 16), (224, 398), (10, 14)])
def test_antialias_is_the_processors_resize_to_within_rounding(height: int, width: int):
    frames = smooth_frames(height, height, width)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=False
    )
    image = Image.fromarray(frames[0].permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    found = normalise_channels(fit_square(frames, 16, "antialias"), CLIP_MEAN, CLIP_STD)
    close(found, expected, atol=2.1 / 255 / min(CLIP_STD))


def test_plain_and_antialias_differ_where_a_frame_is_reduced():
    frames = noise_clips(1, 3, 64, 64)
    plain, smooth = (fit_square(frames, 16, resize).float() for resize in ("plain", "antialias"))
    assert float((plain - smooth).abs().mean()) > 9


# encoders


@pytest.mark.parametrize("encoder", [tiny_clip_encoder(batch_size=3), tiny_dino_encoder()], ids=["clip", "dino"])
def test_features_are_unit_vectors_and_the_same_in_any_batch(encoder: ClipEncoder | DinoEncoder):
    frames = noise_clips(7, 3, 20, 30)
    features = encoder.embed(frames)
    assert features.shape == (7, encoder.width) and features.dtype == torch.float32
    close(features.norm(dim=1), torch.ones(7), atol=1e-5)
    close(torch.cat([encoder.embed(frames[i : i + 1]) for i in range(7)]), features, atol=1e-5)
    assert float((features[0] - features[1]).abs().max()) > 1e-2


def test_clip_features_are_those_of_the_whole_model():
    """`CLIPModel.forward` projects and normalises on its own way; its logits are the cosines times a scale."""
    encoder, frames = tiny_clip_encoder(), noise_clips(3, 3, SIZE, SIZE)
    texts = ["a cat", "two dogs run"]
    tokens = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    pixels = normalise_channels(frames, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        whole = encoder.model(pixel_values=pixels, **tokens)
    cosines = whole.logits_per_image / encoder.model.logit_scale.exp()
    close(encoder.embed(frames) @ encoder.embed_texts(texts).T, cosines.detach(), atol=1e-5)


def test_nothing_of_an_encoder_trains():
    encoder = tiny_clip_encoder()
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    assert not encoder.embed(noise_clips(1, 3, 8, 8)).requires_grad


def test_a_prompt_longer_than_clip_reads_is_refused_or_cut_as_told():
    long = "a dog that runs and runs and runs"
    with pytest.raises(ValueError, match=r"CLIP reads 24 tokens and the prompt 'a dog that runs.* has \d+; shorten it"):
        tiny_clip_encoder().embed_texts([long])
    cut = tiny_clip_encoder(long_prompts="truncate")
    letters = long.replace(" ", "")[:22]
    assert torch.equal(cut.embed_texts([long]), cut.embed_texts([long + " forever"]))
    assert len(letters) == 22 and not torch.equal(cut.embed_texts([long]), cut.embed_texts(["a cat that runs and ru"]))


@pytest.mark.parametrize("token", ["<|startoftext|>", "<|endoftext|>"])
def test_a_prompt_that_ends_itself_early_is_refused(token: str):
    """The text is read off at the first end token, so that the rest of such a prompt would be judged by nobody."""
    with pytest.raises(ValueError, match=r"contains the special token <\|(start|end)oftext\|>,"):
        tiny_clip_encoder().embed_texts([f"a cat{token} that dances"])
    with pytest.raises(ValueError, match="special token"):  # CLIP's tokenizer lowers the case before it looks
        tiny_clip_encoder().embed_texts([f"a cat{token.upper()}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "bicubic"}, r"ClipEncoder.resize must be 'antialias' or 'plain', got 'bicubic'"),
        ({"batch_size": 0}, r"ClipEncoder.batch_size must be at least 1"),
        ({"long_prompts": "cut"}, r"ClipEncoder.long_prompts must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        tiny_clip_encoder(**options)


# loading


def test_a_saved_clip_is_loaded_whole(tmp_path: Path):
    model, frames = save_clip(tmp_path), noise_clips(2, 3, 30, 20)
    loaded = load_clip(str(tmp_path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.model.state_dict().items())
    close(loaded.embed(frames), tiny_clip_encoder().embed(frames), atol=1e-6)
    close(loaded.embed_texts(["a cat"]), tiny_clip_encoder().embed_texts(["a cat"]), atol=1e-6)
    assert load_clip(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_clip_with_a_tensor_missing_is_refused_not_filled_in(tmp_path: Path):
    """transformers only logs that it made up what was missing."""
    model = tiny_clip()
    tensors = {name: value for name, value in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=tensors)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"leaves 1 tensors of CLIPModel without weights, \['visual_projection"):
        load_clip(str(tmp_path))
    filled, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)  # the planted error: no check
    assert info["missing_keys"] and filled is not None


def test_what_cannot_be_loaded_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"load_clip.model=.*hf download") as caught:
        load_clip(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your connection.")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"couldn't connect to .*hf download openai/clip-vit-large-patch14 --local"):
        load_clip()
    monkeypatch.setattr(AutoModel, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"load_dino.model='facebook/dino-vitb16' is no folder"):
        load_dino()


def test_a_clip_without_its_tokenizer_and_one_of_other_sizes_are_refused(tmp_path: Path):
    tiny_clip().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a tokenizer of 2 tokens and a network of 54; the folder needs"):
        load_clip(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 8', '"projection_dim": 12'))
    with pytest.raises(ValueError, match=r"does not fit its own config.json|without weights") as caught:
        load_clip(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_dino_may_lack_the_pooler_that_nobody_reads(tmp_path: Path, pooler: bool):
    tiny_vit(pooler=pooler).save_pretrained(tmp_path)
    frames = noise_clips(2, 3, 24, 20)
    found = load_dino(str(tmp_path), size=SIZE).embed(frames)
    if not pooler:
        close(found, tiny_dino_encoder().embed(frames), atol=1e-6)
    assert found.shape == (2, 16)


def test_a_text_model_is_no_dino(tmp_path: Path):
    model = tiny_vit()
    tensors = {k: v for k, v in model.state_dict().items() if "layernorm.weight" not in k or "layer." in k}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(ValueError, match="without weights"):
        load_dino(str(tmp_path))
