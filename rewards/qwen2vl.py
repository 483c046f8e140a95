"""The network behind both scorers: Qwen2-VL by composition, with a head of its own at the reward tokens.

    patches → vision tower ─┐
    tokens  → embeddings  ──┴→ text model at positions 0 … L−1 → final norm → head (fp32) at each reward token

Both released scorers embed the vision tokens themselves and so run on plain 1-D positions; a present-day call computes
3-D ones and gives other scores without an error. The class is composed and never subclassed: `from_pretrained` of a
subclass leaves the language model random on several releases of transformers.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewards.optional import refuse_broken_torchvision
from rewards.preprocess import token_count

if TYPE_CHECKING:
    from transformers import Qwen2VLConfig, Qwen2VLModel

ATTENTION = ("sdpa", "eager", "flash_attention_2")
"""Implementations of attention; they differ visibly in bf16, so a score is recorded with its own."""


def one_line(error: Exception) -> str:
    """The first line of what an error says, else its name."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@dataclass(frozen=True)
class RewardTokens:
    """The ids that a scorer's rows are made of.

    vision: what stands for patches, image or video. rewards: in their order in a row, each exactly once. pad: what
    fills rows on the right.
    """

    vision: int
    rewards: tuple[int, ...]
    pad: int

    def __post_init__(self) -> None:
        if not self.rewards or len({self.vision, self.pad, *self.rewards}) != len(self.rewards) + 2:
            raise ValueError(f"the vision, reward and pad tokens must differ, got {self}")

    def check_rows(self, rows: Sequence[Sequence[int]], grids: Sequence[tuple[int, int, int]]) -> None:
        """Raises ValueError unless each row has its reward tokens once and in order, and as many vision tokens as its
        grid has merged patches: some releases of transformers drop surplus features silently."""
        if not rows or len(rows) != len(grids):
            raise ValueError(f"there must be as many rows of tokens as grids of patches, got {len(rows)}, {len(grids)}")
        for i, (row, grid) in enumerate(zip(rows, grids, strict=True)):
            there = [token for token in row if token in self.rewards]
            if there != list(self.rewards):
                raise ValueError(
                    f"row {i} must have the reward tokens {list(self.rewards)} once each and in this order, not {there}"
                )
            count = sum(token == self.vision for token in row)
            if count != token_count(grid):
                raise ValueError(
                    f"row {i} has {count} vision tokens {self.vision}, but its grid {grid} gives {token_count(grid)}"
                )


class LinearHead(nn.Module):
    """VideoAlign's head: linear and bias-free, one output for all reward tokens, or for each token its own."""

    def __init__(self, width: int, outputs: int, tokens: int) -> None:
        """outputs: 1, or as many as reward ``tokens``: then the diagonal is taken. Raises ValueError for others."""
        super().__init__()
        if outputs not in (1, tokens):
            raise ValueError(f"output_dim must be 1 or the number of reward tokens, {tokens}; got {outputs}")
        self.rm_head = nn.Linear(width, outputs, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, tokens, width] → [B, tokens]."""
        scores = self.rm_head(hidden)
        return scores.squeeze(-1) if scores.shape[-1] == 1 else scores.diagonal(dim1=-2, dim2=-1)


class PreferenceHead(nn.Module):
    """HPSv3's head: three linear layers from one reward token to (μ, s), σ = exp(s)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, 1, width] → [B, 2]."""
        return self.rm_head(hidden.squeeze(1))


class Qwen2VLReward(nn.Module):
    """A frozen scorer. Its body computes in the dtype of its weights, its head in float32."""

    def __init__(
        self, backbone: "Qwen2VLModel", head: nn.Module, tokens: RewardTokens, digest: str | None = None
    ) -> None:
        """tokens.vision must be the config's image or video token; that says which of the two paths is taken.

        digest: of the checkpoint that the weights came from; left out, it is taken of the weights themselves.
        """
        super().__init__()
        known = {backbone.config.image_token_id: "image", backbone.config.video_token_id: "video"}
        if tokens.vision not in known:
            raise ValueError(f"the vision token {tokens.vision} is neither of the config's {known}")
        self.backbone, self.head, self.tokens = backbone, head, tokens
        self.modality = known[tokens.vision]
        self._digest = digest
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the body."""
        return self.backbone.dtype

    def forward(
        self,
        rows: Sequence[Sequence[int]],
        patches: Tensor,
        grids: Sequence[tuple[int, int, int]],
        positions: Tensor | None = None,
    ) -> Tensor:
        """Head outputs float32 of B rows of token ids and their patches, concatenated in row order.

        Rows of any lengths are padded on the right. positions [3, B, L]: for tests; left out, they are 0 … L−1 on all
        three axes. Raises ValueError for rows that `RewardTokens.check_rows` refuses.
        """
        self.tokens.check_rows(rows, grids)
        if len(patches) != sum(math.prod(grid) for grid in grids):
            raise ValueError(f"{len(patches)} patches were given for the grids {list(grids)}")
        ids, mask = self.pad(rows)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape)
        shown = patches.to(self.device, self.dtype)
        sizes = torch.tensor([list(grid) for grid in grids], device=self.device)
        if self.modality == "image":
            vision = {"pixel_values": shown, "image_grid_thw": sizes}
        else:
            vision = {"pixel_values_videos": shown, "video_grid_thw": sizes}
        seen = self.backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **vision)
        hidden: Tensor = seen.last_hidden_state
        # rows have their reward tokens in one order, so the places of the batch are [B, tokens] in row order
        at = torch.isin(ids, torch.tensor(self.tokens.rewards, device=self.device))
        with torch.autocast(self.device.type, enabled=False):
            return self.head(hidden[at].view(len(rows), len(self.tokens.rewards), -1).float())

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask [B, L] of rows padded on the right."""
        length = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[self.tokens.pad] * (length - len(row))] for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = (torch.arange(length, device=self.device) < lengths[:, None]).long()
        return ids, mask

    def details(self) -> Mapping[str, str]:
        """What a score depends on beside the video, to be recorded with it: network, attention, dtypes, releases."""
        import transformers

        return {
            "weights_sha256": self.digest(),
            "config_sha256": config_digest(self.backbone.config),
            "attention": str(self.backbone.config._attn_implementation),
            "body_dtype": str(self.dtype).removeprefix("torch."),
            "head_dtype": "float32",
            "device": self.device.type,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        }

    def digest(self) -> str:
        """`tensors_digest` of the checkpoint, before anything was merged or cast."""
        if self._digest is None:
            self._digest = tensors_digest(self.state_dict())
        return self._digest


def config_digest(config: "Qwen2VLConfig") -> str:
    """sha256 over what a config says of the networks: numbers of heads, epsilons and so on; no weight shows them."""
    about = ("_", "transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path")
    parts: tuple[Any, ...] = (config.text_config, config.vision_config)
    said = [{k: v for k, v in part.to_dict().items() if not k.startswith(about)} for part in parts]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def details_digest(details: Mapping[str, str]) -> str:
    """sha256 over what scores depend on; where they are computed is not what is computed."""
    return hashlib.sha256(repr(sorted((k, v) for k, v in details.items() if k != "device")).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def empty_backbone(config: "Qwen2VLConfig", attention: str = "sdpa") -> "Qwen2VLModel":
    """A Qwen2-VL body without weights: parameters on the meta device, position tables real.

    Raises ValueError for an unknown attention implementation and one that is not installed.
    """
    refuse_broken_torchvision("a Qwen2-VL reward")
    from transformers import Qwen2VLModel

    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {list(ATTENTION)}, got {attention!r}")
    with torch.device("meta"):
        backbone = Qwen2VLModel(config)
    # position tables are in no checkpoint: they are taken from a network of the same widths and one layer
    small = copy.deepcopy(config)
    text: Any = small.text_config
    vision: Any = small.vision_config
    text.num_hidden_layers, text.layer_types = 1, text.layer_types[:1]
    text.vocab_size, text.pad_token_id, text.intermediate_size = 1, None, 1
    vision.depth, vision.mlp_ratio = 1, 1
    tables = dict(Qwen2VLModel(small).named_buffers())
    for name, table in tables.items():
        owner, _, leaf = name.rpartition(".")
        setattr(backbone.get_submodule(owner), leaf, table)
    left = [name for name, buffer in backbone.named_buffers() if buffer.is_meta]
    assert not left, f"this release of transformers has tables that no one-layer network has: {left}"
    try:
        backbone.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise ValueError(f"attention={attention!r} cannot be used here: {one_line(error)}") from error
    return backbone
