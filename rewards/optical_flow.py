"""Where pixels go from one frame to another: the estimator that motion rewards are built on, and RAFT as one of them.

RAFT (2003.12039) is torchvision's, the extra ``flow``; its weights C_T_V1 are the original's, ported. Tests and other
estimators give a `FlowEstimator` of their own.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from framework.arguments import check_counts
from rewards.encoders import brief, check_choice
from rewards.optional import import_extra
from rewards.weight_files import read_weights

MULTIPLE, SMALLEST = 8, 128
"""RAFT's sides are multiples of 8; its coarsest correlations need 128 pixels."""


class FlowEstimator(ABC):
    """Optical flow between frames, the same in any batch."""

    @abstractmethod
    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """float32 [n, 2, H, W] on the CPU: how far (x, y) in pixels each pixel of ``first`` has moved in ``second``.

        first, second: uint8 [n, 3, H, W].
        """


class RaftFlow(FlowEstimator):
    """torchvision's RAFT. iterations: of its update, 20 as VBench has it. batch_pairs: pairs per forward."""

    def __init__(self, network: nn.Module, iterations: int = 20, batch_pairs: int = 4) -> None:
        check_counts("RaftFlow.", iterations=iterations, batch_pairs=batch_pairs)
        self.network = network.eval().requires_grad_(False)
        self.iterations, self.batch_pairs = iterations, batch_pairs

    @torch.no_grad()
    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        height, width = first.shape[-2:]
        parts = []
        for left, right in zip(first.split(self.batch_pairs), second.split(self.batch_pairs), strict=True):
            pair = [pad_frames(frames.to(device).float() / 127.5 - 1) for frames in (left, right)]
            found = self.network(*pair, num_flow_updates=self.iterations)[-1]
            parts.append(crop(found, height, width).float().cpu())
        return torch.cat(parts)


def _margins(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that bring both sides to a multiple of 8 of at least 128, spread over both ends."""
    extra = [max(SMALLEST, -(-side // MULTIPLE) * MULTIPLE) - side for side in (width, height)]
    return extra[0] // 2, extra[0] - extra[0] // 2, extra[1] // 2, extra[1] - extra[1] // 2


def pad_frames(frames: Tensor) -> Tensor:
    """Repeat the border pixels of frames [n, 3, H, W] until RAFT takes them."""
    return pad(frames, _margins(*frames.shape[-2:]), mode="replicate")


def crop(flow: Tensor, height: int, width: int) -> Tensor:
    """What belongs to the frame before `pad_frames`."""
    left, _, top, _ = _margins(height, width)
    return flow[..., top : top + height, left : left + width]


def load_raft(
    size: Literal["large", "small"] = "large",
    weights: str = "C_T_V1",
    iterations: int = 20,
    batch_pairs: int = 4,
    device: str = "cpu",
) -> RaftFlow:
    """RAFT with torchvision's weights of that name, which are downloaded once, or with those of a file.

    weights: a name such as "C_T_V1" or "C_T_V2" (large), or a .pth or .safetensors file. Raises ValueError without
    torchvision, for a torchvision that does not import, and where the weights cannot be had.
    """
    check_choice("load_raft.size", size, ("large", "small"))
    models = import_extra("torchvision.models.optical_flow", "flow", "RAFT")
    network = {"large": models.raft_large, "small": models.raft_small}[size]()
    named = {"large": models.Raft_Large_Weights, "small": models.Raft_Small_Weights}[size].__members__
    if weights in named:
        try:
            tensors = named[weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"RAFT's weights {weights} could not be downloaded ({brief(error)}); download {named[weights].url} "
                f"where there is a network and give load_raft.weights that file"
            ) from error
    elif Path(weights).suffix:
        tensors = read_weights(weights)
    else:
        raise ValueError(f"load_raft.weights must be a file or one of {', '.join(named)}, got {weights!r}")
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ValueError(f"load_raft.weights={weights!r} are no weights of raft_{size}: {brief(error)}") from error
    return RaftFlow(network.to(device), iterations, batch_pairs)
