"""Tiny Qwen2-VL scorers, built once, a tokenizer of bytes and stand-in templates; where the real ones may be."""

import functools
import hashlib
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from framework.types import VideoBatch, Window
from rewards.conversation import Conversation
from rewards.hpsv3 import HPSv3
from rewards.preprocess import PixelBudget
from rewards.prompts import HPSV3, VIDEOALIGN, Template, read_template
from rewards.qwen2vl import Qwen2VLReward, RewardTokens
from rewards.videoalign import VideoAlign
from tests.golden.tiny_qwen import MODELS, ROWS, Setup

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
           "<|endoftext|>")  # fmt: skip
FIRST = 256 + len(SPECIAL)
"""Where the reward tokens begin: behind the bytes and Qwen's special tokens."""
IDS = {"image": 260, "video": 261, "vision_start": 258, "vision_end": 259, "pad": 262, "VQ": FIRST, "MQ": FIRST + 1,
       "TA": FIRST + 2, "reward": FIRST}  # fmt: skip
SMALL = PixelBudget(4 * 28 * 28, 6 * 28 * 28)
PROMPTS = ("a red circle moves left", "rain, then snow, over a harbour", "a fox {in braces} looks up")

STAND_IN = {
    "videoalign": "\nHow good?  \nVQ: <|VQ_reward|>\nMQ: <|MQ_reward|>\nAsked: {text_prompt}\nTA: <|TA_reward|>\n",
    "hpsv3": "\nHow good is it? \nAsked: {text_prompt}\n\nAll: <|Reward|>\n",
}
"""Texts of the templates' form, for what does not depend on their words."""


def pinned(real: Template, text: str) -> Template:
    """A template of another text."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Template(real.name, real.vision, real.rewards, digest, len(text), "stripped", "a test")


def byte_tokenizer(rewards: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a merge: a token per byte, Qwen's special tokens, the reward tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_tokens([*SPECIAL, *rewards], special_tokens=True)
    return tokenizer


@functools.cache
def setup() -> Setup:
    """The golden sizes with the ids of `byte_tokenizer`."""
    rows = {model: {"rows": [row | {"text_bound": 250} for row in ROWS[model]]} for model in MODELS}
    return Setup.of({"config": {"tokens": IDS, **rows}})


@functools.cache
def reward(model: str, dtype: torch.dtype = torch.float32, golden: bool = False) -> Qwen2VLReward:
    """A tiny scorer, shared: nobody may change it. golden: with the golden token ids."""
    return (Setup.of({}) if golden else setup()).build(model, dtype, "sdpa")


def conversation(model: str, text: str | None = None, tokens: RewardTokens | None = None) -> Conversation:
    """A stand-in template, or the real one's text."""
    real = {"videoalign": VIDEOALIGN, "hpsv3": HPSV3}[model]
    template = real if text is not None else pinned(real, STAND_IN[model])
    ids = tokens or setup().reward_tokens(model)
    return Conversation(template, text or STAND_IN[model], byte_tokenizer(real.rewards), ids)


def video_align(**changed) -> VideoAlign:
    """The tiny VideoAlign."""
    parts = {"model": reward("videoalign"), "conversation": conversation("videoalign"), "pixels": SMALL}
    return VideoAlign(**parts | changed)


def hps(**changed) -> HPSv3:
    """The tiny HPSv3."""
    return HPSv3(reward("hpsv3"), conversation("hpsv3"), **{"pixels": SMALL, **changed})


def clips(
    count: int = 3, frames: int = 17, size: tuple[int, int] = (48, 64), seed: int = 0, fps: float = 8.0
) -> VideoBatch:
    """Noise with a prompt each."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, frames, 3, *size), generator=random, dtype=torch.uint8)
    windows = tuple((Window(0, frames, PROMPTS[i % len(PROMPTS)]),) for i in range(count))
    return VideoBatch(pixels, fps, windows)


def real_templates() -> Path:
    """The folder with videoalign_prompt.txt and hpsv3_prompt.txt; skips the test where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "golden" / "rewards"
    folder = Path(os.environ.get("ARMILLARY_PROMPTS", beside))
    if not (folder / "videoalign_prompt.txt").is_file():
        pytest.skip("the prompt templates are other projects' texts: name a folder with them in ARMILLARY_PROMPTS")
    return folder


def real_text(template: Template) -> str:
    """A real template's text."""
    return read_template(template, str(real_templates()))
