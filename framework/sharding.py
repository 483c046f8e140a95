"""A frozen base that is spread over the ranks (FSDP2), with adapters that are not.

Apart from `framework.distributed` because importing FSDP costs a second and most runs do not shard.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from framework.distributed import World
from framework.interfaces import StreamingGenerator
from framework.types import Scene


def shard_base(generator: StreamingGenerator, trained: Mapping[str, nn.Parameter], world: World) -> None:
    """Keep 1 / size of the frozen weights on each rank (FSDP2), gathered block by block when a block runs.

    What is trained stays whole, in float32, and is reduced like that of unsharded ranks. Raises ValueError for a single
    rank, and where frozen weights are few because everything is trained.
    """
    network = generator.network
    if world.size == 1:
        raise ValueError(
            "Distribution.shard_base=True needs several ranks; start them with torchrun, or leave it False"
        )
    if not any(not p.requires_grad for p in network.parameters()):
        raise ValueError(
            "Distribution.shard_base=True shards frozen weights, and this run trains all of them; use LoRA"
        )
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    whole = set(trained.values())
    blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, ignored_params=whole)
        for method in generator.forward_methods:
            if callable(getattr(module, method, None)):
                register_fsdp_forward_method(module, method)


def check_symmetric(scenes: Iterable[Scene], block_frames: int) -> None:
    """Raises ValueError for scenes that switch prompts at different frames: the ranks of a sharded base would make
    different calls, and wait for each other forever."""
    starts = {tuple(segment.start for segment in scene.on_blocks(block_frames).segments) for scene in scenes}
    if len(starts) > 1:
        raise ValueError(
            f"Distribution.shard_base=True needs scenes that switch prompts at the same frames, got switches at "
            f"{sorted(starts)[:3]}; give all scenes one pattern, or leave shard_base False"
        )
