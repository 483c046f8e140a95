"""How much memory a training run needs, from shapes alone: known before the first step, and on any machine.

Peaks of live tensor bytes in float32, the frozen weights included. What is counted of the activations is what autograd
of torch 2.13 with PEFT 0.21 keeps of a Wan block; L layers, W width, D feed-forward width, T tokens, r LoRA rank:

    per layer   (14 W + 2 D + 8 r) T   with adapters on every linear layer, (21 W + 2 D) T where the block itself trains
                W (keys + values)      gathered per block of the window, each as far as it sees
                8 W per frame          modulation

The peak stands at the end of the forward pass of the last layer, whose adapters hold 2 D T more. `benchmarks.p6`
compares with measured bytes. Not counted: a video decoder, reward models, the allocator's own fragmentation.
"""

from dataclasses import dataclass

MIB = 2**20
FLOAT = 4
"""Bytes of a number; adapters, latents and optimiser states are float32."""


@dataclass(frozen=True)
class NetworkDimensions:
    """The sizes of a causal video transformer.

    tokens: of one latent frame. text_tokens: of a prompt. window: latent frames that a block sees at most, itself
    included; None for all earlier ones. checkpointing: activations inside a layer are computed again, not kept.
    number_bytes: of an activation, as its weights have them; a LoRA on narrow weights computes in float32 all the same.
    """

    layers: int
    width: int
    ffn_width: int
    tokens: int
    text_tokens: int
    window: int | None
    checkpointing: bool = False
    number_bytes: int = FLOAT

    def seen(self, start: int, block: int) -> int:
        """Frames of the past that the block at ``start`` sees."""
        return start if self.window is None else min(start, self.window - block)


@dataclass(frozen=True)
class RolloutShape:
    """What is generated in a step.

    groups, branches: P prompts and clips of each, anchors included. start, frames: latent frames before the window and
    in it. block: frames denoised together. latent: numbers of a latent frame. draws: noise tensors of a block. steps:
    of the sampler. path: whether the visited states are recorded. routed: whether some steps see another history.
    resident: frames that routes keep beyond what the policy shows. at_once, branches_at_once: groups, and branches of
    each, that are rolled out together, None for all; what they leave behind stays.
    """

    groups: int
    branches: int
    start: int
    frames: int
    block: int
    latent: int
    draws: int
    steps: int
    path: bool
    routed: bool = False
    resident: int = 0
    at_once: int | None = None
    branches_at_once: int | None = None

    @property
    def clips(self) -> int:
        """N."""
        return self.groups * self.branches


@dataclass(frozen=True)
class UpdateShape:
    """What is asked in an update.

    clips: of one backward pass. total: of the step. frames: of the window that are probed. streams: noisy versions S.
    views: policies that are asked. history_grad: whether the clean past carries a graph. kept: whether the frozen
    policies' velocities of all clips are held at once.
    """

    clips: int
    total: int
    frames: int
    streams: int
    views: int
    history_grad: bool
    kept: bool

    def arithmetic(self) -> str:
        """How often which part of a rank's clips is pulled back: ``2 backward passes × 24 clips``."""
        passes, rest = divmod(self.total, self.clips)
        whole = f"{passes} backward pass{'es' if passes != 1 else ''} × {self.clips} clips"
        return f"{whole} and one of {rest}" if rest else whole


@dataclass(frozen=True)
class TrainedSize:
    """What the weights are. frozen_bytes: of those that do not train. trained: how many numbers do, in float32.
    rank: of LoRA, None where the network itself trains."""

    frozen_bytes: int
    trained: int
    rank: int | None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for. held: throughout the run. phases: on top of it, one after the other."""

    held: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """The largest phase on top of what is held."""
        return sum(self.held.values()) + max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase that decides."""
        return max(self.phases, key=self.phases.__getitem__)

    def summary(self) -> str:
        """The peak and what it is made of, on one line."""
        parts = ", ".join(f"{name} {size(count)}" for name, count in {**self.held, **self.phases}.items())
        return f"about {size(self.peak)} at the peak, in the {self.worst} ({parts})"


def size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / MIB:.1f} MiB" if count < 1024 * MIB else f"{count / MIB / 1024:.2f} GiB"


def layer_bytes(network: NetworkDimensions, rank: int | None, tokens: int, frames: int) -> int:
    """What one layer keeps for its backward pass beside gathered keys and values."""
    width = (14 if rank is not None else 21) * network.width + 2 * network.ffn_width
    wide = 8 * network.width * frames  # modulation
    if rank is not None:
        wide += 8 * rank * tokens
        if network.number_bytes < FLOAT:  # float32 adapters make a wide copy of the input of every linear layer
            wide += (7 * network.width + network.ffn_width) * tokens
    return network.number_bytes * width * tokens + FLOAT * wide


def gathered_frames(network: NetworkDimensions, start: int, frames: int, block: int, streams: int) -> tuple[int, int]:
    """(keys, values) in frames that the packed blocks of a window hold for their backward pass, per clip."""
    starts = range(start, start + frames, block)
    keys = streams * sum(network.seen(f, block) + min(block, start + frames - f) for f in starts)
    if streams > 1 or len(starts) == 1 or start:
        return keys, keys
    return keys, keys + 2 * (frames - block)  # the first block's values are a slice of all of them, which then stay


def update_bytes(network: NetworkDimensions, rollout: RolloutShape, update: UpdateShape, weights: TrainedSize) -> int:
    """Peak of one backward pass, gradients of earlier ones included."""
    width, layers, per_clip = network.width, network.layers, update.streams * update.frames
    frames = update.clips * per_clip
    keys, values = gathered_frames(network, rollout.start, update.frames, rollout.block, update.streams)
    number = network.number_bytes
    noisy = layer_bytes(network, weights.rank, frames * network.tokens, frames)
    noisy += number * update.clips * (keys + values) * network.tokens * width
    clean_frames = update.clips * max(0, update.frames - rollout.block)
    history = 2 * layers * width * network.tokens * clean_frames
    prompts = -(-update.clips // rollout.branches)
    text = 3 * layers * width * network.text_tokens * prompts  # keys before and after their norm, values
    clean = 0
    if update.history_grad and clean_frames:
        keys, values = gathered_frames(network, rollout.start, update.frames - rollout.block, rollout.block, 1)
        clean = layer_bytes(network, weights.rank, clean_frames * network.tokens, clean_frames)
        clean += number * update.clips * (keys + values) * network.tokens * width
    prefix = 2 * layers * width * network.tokens * prefix_frames(network, rollout) * prompts
    if network.checkpointing:
        inputs = frames + (clean_frames if update.history_grad else 0)
        kept = number * layers * width * network.tokens * inputs + noisy + clean
    else:
        kept = layers * (noisy + clean)
    transient = 2 * network.ffn_width * frames * network.tokens
    latents = rollout.latent * frames * (3 + update.views)
    gradients = weights.trained if update.clips < update.total else 0
    views = rollout.latent * update.total * per_clip * (update.views - 1) if update.kept else 0
    probes = 3 * rollout.latent * update.total * per_clip
    floats = latents + gradients + views + probes + record_floats(rollout)
    return kept + number * (history + prefix + text + transient) + FLOAT * floats


def prefix_frames(network: NetworkDimensions, rollout: RolloutShape) -> int:
    """Frames of the shared prefix whose K/V are still there when the window starts."""
    window = rollout.start if network.window is None else min(rollout.start, network.window)
    return min(rollout.start, max(window, rollout.resident))


def record_floats(rollout: RolloutShape) -> int:
    """What a rollout leaves behind: latents, the prefix, and the visited path where somebody asked for it."""
    window = rollout.clips * rollout.frames * rollout.latent
    path = (2 * rollout.steps if rollout.path else 0) * window
    return window + path + rollout.groups * rollout.start * rollout.latent


def rollout_bytes(network: NetworkDimensions, rollout: RolloutShape, weights: TrainedSize) -> int:
    """Peak of generating the clips of a step, so many groups and branches at once."""
    groups = rollout.groups if rollout.at_once is None else min(rollout.at_once, rollout.groups)
    together = min(rollout.branches_at_once or rollout.branches, rollout.branches)
    clips, block = groups * together, rollout.block
    kv_frame = 2 * network.layers * network.width * network.tokens
    peak = 0
    for first in range(rollout.start, rollout.start + rollout.frames, block):
        seen, made = network.seen(first, block), first - rollout.start
        own = made if network.window is None else min(made, network.window)
        stored = kv_frame * (clips * own + groups * prefix_frames(network, rollout))
        rotated = kv_frame * clips * seen * (2 if rollout.routed else 1)
        peak = max(peak, stored + rotated)
    tokens = clips * block * network.tokens
    adapters = 4 if weights.rank is not None else 2
    transient = (adapters * network.ffn_width + 7 * network.width) * tokens
    noise = rollout.draws * clips * rollout.frames * rollout.latent
    trace = (2 * rollout.steps + 1) * clips * (rollout.frames if rollout.path else block) * rollout.latent
    if together < rollout.branches:  # what earlier parts left is kept until all are joined
        kept = 2 * rollout.steps + 1 if rollout.path else 1
        trace += kept * groups * rollout.branches * rollout.frames * rollout.latent
    text = 2 * network.layers * network.width * network.text_tokens * groups
    return network.number_bytes * (peak + text + transient) + FLOAT * (noise + trace + record_floats(rollout))


def estimate_memory(
    network: NetworkDimensions, rollout: RolloutShape, update: UpdateShape, weights: TrainedSize
) -> MemoryEstimate:
    """What a training run holds and what its phases add to it."""
    trained = FLOAT * weights.trained
    held = {
        "frozen weights": weights.frozen_bytes,
        "trained weights": trained,
        "AdamW": 2 * trained,
        "policies": 4 * trained,  # behaviour, reference, average, and the current one while another is in use
    }
    phases = {
        "rollout": rollout_bytes(network, rollout, weights),
        "update": update_bytes(network, rollout, update, weights),
        "optimiser step": 2 * trained + FLOAT * record_floats(rollout),  # gradients, and one temporary copy
    }
    return MemoryEstimate(held, phases)
