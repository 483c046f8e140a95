"""VideoAlign (2501.13918): visual quality VQ, motion quality MQ and text alignment TA of clips, rated by a Qwen2-VL-2B.

    signal = (raw − mean)/std        VQ and TA of the frames, MQ of a gray copy: two forwards of one network

The tokens of VQ and MQ stand before the prompt: they cannot depend on it, only TA can. Frames are sampled by true time,
so that a wrong fps moves every score without an error. MQ on a gray copy is what the papers that train with it do; it
keeps colour out of it. Known: raw scores are often negative; VQ and MQ are easily hacked, VQ towards an animation look.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from framework.arguments import check_counts
from framework.interfaces import RewardModel
from framework.types import Scores, VideoBatch
from rewards.conversation import Conversation
from rewards.frame_sampling import FrameSampling, SpanTooShort, UniformFrames
from rewards.preprocess import VIDEOALIGN_PIXELS, PixelBudget, gray, gray_truncated, normalise, patchify, resize
from rewards.prompts import VIDEOALIGN, read_template
from rewards.qwen2vl import LinearHead, Qwen2VLReward, RewardTokens, details_digest
from rewards.qwen2vl_loading import UnmergedLoRA, find_weights, load_reward
from rewards.qwen2vl_release import (
    all_settings,
    find_device,
    find_dtype,
    find_release,
    read_config,
    read_settings,
    read_tokenizer,
    setting,
    tokenizer_folder,
)
from rewards.windows import score_windows, take_frames

SIGNALS = ("VQ", "MQ", "TA")
NORMALISATION: Mapping[str, tuple[float, float]] = {
    "VQ": (3.6757, 2.2476),
    "MQ": (1.1646, 1.3811),
    "TA": (2.8105, 2.5121),
}
"""(mean, std) of the released checkpoint's raw scores, by public copies of its settings."""
TOKENS = RewardTokens(vision=151656, rewards=(151657, 151658, 151659), pad=151643)
ROWS = 151660
"""Of the released checkpoint's embedding table, which ends with the reward tokens."""


@dataclass(frozen=True)
class VideoAlign(RewardModel):
    """One network for all three scores, window by window, each with its own prompt.

    given: of VQ, MQ and TA, the signals that it gives; MQ's forward runs only where it is one. gray_motion: whether MQ
    is judged on a gray copy. sampling: which frames are looked at; the released rule is 2 a second. normalisation:
    (mean, std) per signal, None for raw scores. batch_size: clips per forward.
    """

    model: Qwen2VLReward
    conversation: Conversation
    given: tuple[str, ...] = SIGNALS
    gray_motion: bool = True
    sampling: FrameSampling = field(default_factory=UniformFrames)
    normalisation: Mapping[str, tuple[float, float]] | None = field(default_factory=lambda: NORMALISATION)
    batch_size: int = 4
    pixels: PixelBudget = VIDEOALIGN_PIXELS

    def __post_init__(self) -> None:
        if not self.given or len(set(self.given)) != len(self.given) or set(self.given) - set(SIGNALS):
            raise ValueError(f"VideoAlign's signals must be some of {SIGNALS}, each once, got {self.given}")
        check_counts("VideoAlign.", batch_size=self.batch_size)
        if self.conversation.tokens != self.model.tokens:
            raise ValueError("VideoAlign.model and its conversation must have the same tokens")

    @property
    def signals(self) -> tuple[str, ...]:
        return self.given

    @torch.no_grad()
    def score(self, videos: VideoBatch) -> Scores:
        """A window with too few frames to sample is invalid. Raises ValueError for a prompt with a special token."""
        return score_windows(videos, self.signals, self._score_spans)

    def score_differentiable(self, pixels: Tensor, fps: float, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Signals [N] of clips [N, T, 3, H, W] in [−1, 1], with their graph: no rounding and no truncation, so the
        values differ from `score`'s by what those do. Raises ValueError for values outside."""
        if not bool((pixels.detach().abs() <= 1).all()):
            raise ValueError("VideoAlign.score_differentiable needs pixels in [−1, 1], got values outside or NaN")
        shown = (take_frames(self.sampling, pixels, prompts, fps) + 1) * 127.5
        table = self._signals(shown, prompts, gray, lambda frames: frames)
        return dict(zip(self.signals, table, strict=True))

    def _score_spans(self, clips: Tensor, prompts: Sequence[str], fps: float) -> Tensor:
        try:
            shown = take_frames(self.sampling, clips, prompts, fps)
        except SpanTooShort:
            return torch.full((len(self.given), len(prompts)), torch.nan)
        parts = [slice(start, start + self.batch_size) for start in range(0, len(prompts), self.batch_size)]
        return torch.cat([self._signals(shown[part], prompts[part], gray_truncated, torch.round) for part in parts], 1)

    def _signals(
        self,
        frames: Tensor,
        prompts: Sequence[str],
        decolour: Callable[[Tensor], Tensor],
        quantise: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """[signals, n] of sampled frames [n, M, 3, H, W] in 0 … 255."""
        on_gray = {"MQ"} if self.gray_motion else set()
        columns: dict[str, Tensor] = {}
        for names, change in ((set(SIGNALS) - on_gray, None), (on_gray, decolour)):
            wanted = [name for name in self.signals if name in names]
            if wanted:
                raw = self.raw_scores(frames if change is None else change(frames), prompts, quantise)
                columns |= {name: raw[:, SIGNALS.index(name)] for name in wanted}
        if self.normalisation is not None:
            for name in columns:
                mean, std = self.normalisation[name]
                columns[name] = (columns[name] - mean) / std
        return torch.stack([columns[name] for name in self.signals])

    def raw_scores(
        self, frames: Tensor, prompts: Sequence[str], quantise: Callable[[Tensor], Tensor] = torch.round
    ) -> Tensor:
        """The head's outputs [n, 3] for the frames [n, M, 3, H, W] as they are, resized to the budget of pixels."""
        size = self.pixels.size(*frames.shape[-2:])
        parts = [patchify(normalise(quantise(resize(clip.to(self.model.device).float(), size)))) for clip in frames]
        grid = parts[0][1]
        rows = self.conversation.rows(prompts, grid)
        return self.model(rows, torch.cat([patches for patches, _ in parts]), [grid] * len(rows))

    def digest(self) -> str:
        """Another one wherever scores could be others."""
        return details_digest(self.details())

    def details(self) -> Mapping[str, str]:
        """What the scores depend on beside the video, to be recorded with them."""
        return {
            **self.model.details(),
            "reward": "VideoAlign",
            "signals": repr(self.given),
            **self.conversation.details(),
            "sampling": repr(self.sampling),
            "pixels": repr(self.pixels),
            "motion": "gray" if self.gray_motion else "colour",
            "normalisation": repr(None if self.normalisation is None else dict(self.normalisation)),
        }


def released(
    checkpoint: str,
    template: str,
    base: str = "Qwen/Qwen2-VL-2B-Instruct",
    signals: tuple[str, ...] = SIGNALS,
    gray_motion: bool = True,
    sampling: FrameSampling | None = None,
    batch_size: int = 4,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attention: str = "sdpa",
    tokens: RewardTokens = TOKENS,
    rows: int = ROWS,
    lora: UnmergedLoRA | None = UnmergedLoRA(rank=64, alpha=128),  # noqa: B008 (frozen)
    normalisation: Mapping[str, tuple[float, float]] = NORMALISATION,
) -> VideoAlign:
    """VideoAlign with released weights, e.g. KlingTeam/VideoReward; its settings are compared with what is known.

    checkpoint: a folder as it is on the hub (model_config.json, checkpoint-N/model.pth), a file of it, or OWNER/NAME.
    template: see `rewards.prompts.read_template`. base: a folder or hub name with the base model's config.json, and its
    tokenizer where the checkpoint has none. rows: of the embedding table. lora: of unmerged adapters, None for merged
    weights. Raises ValueError where anything is missing or differs.
    """
    text, place = read_template(VIDEOALIGN, template), find_device(device)
    path = find_release(checkpoint, ("model_config.json", "checkpoint-*/*"))
    settings = read_settings(path if path.is_dir() else path.parent, "model_config.json")
    check_settings(settings, normalisation, lora, str(path))
    config = read_config(base, rows)
    weights = find_weights(path)
    tokenizer = read_tokenizer(tokenizer_folder(weights, base), VIDEOALIGN.rewards)
    conversation = Conversation(VIDEOALIGN, text, tokenizer, tokens)
    text_config: Any = config.text_config
    head = LinearHead(text_config.hidden_size, int(setting(settings, "output_dim")), len(SIGNALS))
    model = load_reward(weights, config, head, tokens, lora, find_dtype(dtype), place, attention)
    return VideoAlign(
        model, conversation, signals, gray_motion, sampling or UniformFrames(), dict(normalisation), batch_size
    )


def check_settings(
    settings: Mapping[str, object],
    normalisation: Mapping[str, tuple[float, float]],
    lora: UnmergedLoRA | None,
    source: str,
) -> None:
    """Raises ValueError for settings with other constants than expected: then the file is of another release."""
    expected = {
        f"{name}_{part}": pair[i] for name, pair in normalisation.items() for i, part in enumerate(("mean", "std"))
    }
    found = {name: setting(settings, name) for name in expected}
    if lora is not None:
        known = {"lora_r": lora.rank, "lora_alpha": lora.alpha}
        there = {name: value for name in known for value in all_settings(settings, name)}
        expected, found = expected | {name: known[name] for name in there}, found | there
    differing = {name: value for name, value in found.items() if value != expected[name]}
    if differing:
        name = next(iter(differing))
        raise ValueError(
            f"the settings of {source} have {name} {differing[name]!r}, expected {expected[name]!r}; if it is meant, "
            "give normalisation and lora the file's values"
        )
