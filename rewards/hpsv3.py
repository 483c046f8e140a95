"""HPSv3 (2508.03789): human preference for single frames and how sure of it a Qwen2-VL-7B is, given the prompt.

    frame → (μ, s), σ = exp(s)          clip = pooling of μ over the frames that are looked at

Unbounded, about 9 to 11 on generated video. A frame is 14 TFLOP, so a subset of the frames is usual, and then the mean
of the best 30 % is another estimator than over all frames: both choices are parameters. The mean of the best hides bad
frames. Known: likes saturated colour; under optimisation grid patterns grow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from framework.arguments import check_counts
from framework.interfaces import RewardModel
from framework.pooling import FramePooling, MeanFrames
from framework.types import Scores, VideoBatch
from rewards.conversation import Conversation
from rewards.frame_sampling import FrameSampling, StratifiedFrames
from rewards.preprocess import HPSV3_PIXELS, PixelBudget, normalise, patchify, resize_pillow
from rewards.prompts import HPSV3, read_template
from rewards.qwen2vl import PreferenceHead, Qwen2VLReward, RewardTokens, details_digest
from rewards.qwen2vl_loading import find_weights, load_reward
from rewards.qwen2vl_release import find_device, find_dtype, find_release, read_config, read_tokenizer, tokenizer_folder
from rewards.windows import score_windows, take_frames

TOKENS = RewardTokens(vision=151655, rewards=(151657,), pad=151643)
ROWS = 151658
"""Of the released checkpoint's embedding table, which ends with the reward token."""


@dataclass(frozen=True)
class HPSv3(RewardModel):
    """Preference for the frames of each window given its prompt.

    frames: which are looked at; siblings of a group are judged by the same. pooling: how their μ become one number.
    uncertainty: whether the mean σ of the frames is a second signal, name_uncertainty. batch_size: frames per forward.
    """

    model: Qwen2VLReward
    conversation: Conversation
    frames: FrameSampling = field(default_factory=StratifiedFrames)
    pooling: FramePooling = field(default_factory=MeanFrames)
    uncertainty: bool = False
    name: str = "HPSv3"
    batch_size: int = 8
    pixels: PixelBudget = HPSV3_PIXELS

    def __post_init__(self) -> None:
        check_counts("HPSv3.", batch_size=self.batch_size)
        if self.conversation.tokens != self.model.tokens:
            raise ValueError("HPSv3.model and its conversation must have the same tokens")

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_uncertainty") if self.uncertainty else (self.name,)

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        """Raises ValueError for a prompt with a special token."""
        return score_windows(videos, self.signals, self._score_spans)

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        shown = take_frames(self.frames, clips, prompts, fps)
        repeated = [prompt for prompt in prompts for _ in range(shown.shape[1])]
        scores = self.score_frames(shown.flatten(0, 1), repeated).unflatten(0, shown.shape[:2])  # [n, M, 2]
        scores = scores.where(torch.isfinite(scores), torch.nan)  # σ = exp(−∞) would be a zero, the best might hide −∞
        rate = fps * shown.shape[1] / clips.shape[1]
        pooled = self.pooling(scores[..., 0], rate)
        return torch.stack([pooled, scores[..., 1].exp().mean(1)][: len(self.signals)])

    @torch.no_grad()
    def score_frames(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """(μ, s) [n, 2] float32 on the CPU of frames uint8 [n, 3, H, W] of any size, with a prompt each.

        They must not be resized before: the rule is not idempotent.
        """
        size = self.pixels.size(*frames.shape[-2:])
        out = []
        for start in range(0, len(frames), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts = [patchify(normalise(image[None])) for image in resize_pillow(frames[part], size)]
            grid = parts[0][1]
            rows = self.conversation.rows(prompts[part], grid)
            out.append(self.model(rows, torch.cat([patches for patches, _ in parts]), [grid] * len(rows)).cpu())
        return torch.cat(out)

    def digest(self) -> str:
        """Another one wherever scores could be others."""
        return details_digest(self.details())

    def details(self) -> Mapping[str, str]:
        """What the scores depend on beside the video, to be recorded with them."""
        return {
            **self.model.details(),
            "reward": "HPSv3",
            "signals": repr(self.signals),
            **self.conversation.details(),
            "sampling": repr(self.frames),
            "pooling": repr(self.pooling),
            "pixels": repr(self.pixels),
        }


def released(
    checkpoint: str,
    template: str = "package:hpsv3",
    base: str = "Qwen/Qwen2-VL-7B-Instruct",
    frames: FrameSampling | None = None,
    pooling: FramePooling | None = None,
    uncertainty: bool = False,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attention: str = "sdpa",
    tokens: RewardTokens = TOKENS,
    rows: int = ROWS,
) -> HPSv3:
    """HPSv3 with released weights, e.g. MizzenAI/HPSv3.

    checkpoint: a file HPSv3.safetensors, its folder, or OWNER/NAME on the hub. template: see
    `rewards.prompts.read_template`. base: a folder or hub name with the base model's config.json and tokenizer. frames:
    8 stratified ones unless given. pooling: their mean unless given. rows: of the embedding table. Raises ValueError
    where anything is missing or differs.
    """
    text, place = read_template(HPSV3, template), find_device(device)
    weights = find_weights(find_release(checkpoint, ("*.safetensors", "*.index.json")))
    config = read_config(base, rows)
    tokenizer = read_tokenizer(tokenizer_folder(weights, base), HPSV3.rewards)
    conversation = Conversation(HPSV3, text, tokenizer, tokens)
    text_config: Any = config.text_config
    head = PreferenceHead(text_config.hidden_size)
    model = load_reward(weights, config, head, tokens, None, find_dtype(dtype), place, attention)
    return HPSv3(
        model, conversation, frames or StratifiedFrames(), pooling or MeanFrames(), uncertainty, "HPSv3", batch_size
    )
