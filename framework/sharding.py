"""A network that is spread over the ranks (FSDP2): a frozen base with whole adapters, or all of one that is trained.

Apart from `framework.distributed` because importing FSDP costs a second and most runs do not shard.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from framework.distributed import World
from framework.interfaces import StreamingGenerator
from framework.types import Scene


def shard_base(
    generator: StreamingGenerator, world: World, trained: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Keep 1 / size of the weights on each rank (FSDP2), gathered block by block when a block runs.

    Adapters stay whole, in float32, and are reduced like those of unsharded ranks. Where everything is trained there is
    no base apart: every weight is sharded, and with it its gradient, its optimiser state and all policies. Returns what
    is trained from now on. Raises ValueError for a single rank.
    """
    network = generator.network
    if world.size == 1:
        raise ValueError(
            "Distribution.shard_base=True needs several ranks; start them with torchrun, or leave it False"
        )
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    everything = all(parameter.requires_grad for parameter in network.parameters())
    whole = set() if everything else set(trained.values())
    blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
    for module in (*blocks, network):
        # the root, too, lets go of what it gathered: a policy is put in force by writing to each rank's own part
        fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # sums, not means: each rank has divided by the counts of the whole step
        module.set_force_sum_reduction_for_comms(True)
        for method in generator.forward_methods:
            if callable(getattr(module, method, None)):
                register_fsdp_forward_method(module, method)
    return dict(network.named_parameters()) if everything else dict(trained)


def check_symmetric(scenes: Iterable[Scene], block_frames: int) -> None:
    """Raises ValueError for scenes that switch prompts at different frames: the ranks of a sharded base would make
    different calls, and wait for each other forever."""
    starts = {tuple(segment.start for segment in scene.on_blocks(block_frames).segments) for scene in scenes}
    if len(starts) > 1:
        raise ValueError(
            f"Distribution.shard_base=True needs scenes that switch prompts at the same frames, got switches at "
            f"{sorted(starts)[:3]}; give all scenes one pattern, or leave shard_base False"
        )
