"""Golden cases of other sizes and settings than the packaged ones, computed by the dense oracle of the backbone tests.

They test the runner: it must follow a case's hyper-parameters, not the packaged files.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from backbones.wan.checkpoints import diffusers_name
from backbones.wan.transformer import CausalWanTransformer3DModel
from tests.backbones.micro import noise, perturb
from tests.backbones.oracle import Frame, dense_forward, packed_frames
from tests.golden.case import Case

MODEL = {
    "dim": 36, "ffn_dim": 40, "num_heads": 3, "num_layers": 2, "text_dim": 8, "text_len": 6, "freq_dim": 12, "in_dim": 4
}  # fmt: skip
LATENT_HW = [4, 2]
Spans = Sequence[tuple[int, int]]


def original_weights() -> dict[str, Tensor]:
    """Random float32 weights under their original names."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        network = CausalWanTransformer3DModel(
            num_attention_heads=MODEL["num_heads"], attention_head_dim=MODEL["dim"] // MODEL["num_heads"],
            in_channels=MODEL["in_dim"], out_channels=MODEL["in_dim"], text_dim=MODEL["text_dim"],
            freq_dim=MODEL["freq_dim"], ffn_dim=MODEL["ffn_dim"], num_layers=MODEL["num_layers"],
        )  # fmt: skip
    perturb(network)
    state = network.state_dict()
    candidates = [
        f"{prefix}{name}"
        for prefix in ("", *(f"blocks.{i}." for i in range(MODEL["num_layers"])))
        for name in (
            "modulation", "head.modulation",
            *(
                f"{module}.{parameter}"
                for module in (
                    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
                    "time_projection.1", "head.head", "norm3", "ffn.0", "ffn.2",
                    *(f"{a}.{part}" for a in ("self_attn", "cross_attn") for part in ("q", "k", "v", "o")),
                    *(f"{a}.{part}" for a in ("self_attn", "cross_attn") for part in ("norm_q", "norm_k")),
                )
                for parameter in ("weight", "bias")
            ),
        )
    ]  # fmt: skip
    names = {diffusers_name(name): name for name in candidates if diffusers_name(name)}
    return {names[name]: tensor for name, tensor in state.items()}


class Oracle:
    """The dense forward of one network, prompt and policy, in float64."""

    def __init__(self, batch: int, spans: Spans, sink: int, window: int | None, relative: bool) -> None:
        self.weights = original_weights()
        self.wide = {str(diffusers_name(k)): v.double().requires_grad_() for k, v in self.weights.items()}
        self.batch, self.spans = batch, spans
        self.policy = (sink, window, relative)
        embeds = noise(3, batch, MODEL["text_len"], MODEL["text_dim"]).float()
        embeds[:, 4:] = 0
        self.embeds = embeds

    def draw(self, seed: int, *lead: int) -> Tensor:
        """A float32 latent [*lead, B, C, F, H, W]."""
        return noise(seed, *lead, self.batch, MODEL["in_dim"], self.spans[-1][1], *LATENT_HW).float()

    def packed(self, noisy: Tensor, clean: Tensor, timestep: Tensor, *, detach_clean: bool = False) -> Tensor:
        """Velocities of all noisy blocks behind their clean past; timestep [B, blocks]."""
        return self._forward(packed_frames(list(self.spans)), torch.cat([clean, noisy], 2), timestep, detach_clean)

    def block(
        self, index: int, x: Tensor, clean: list[Tensor], timestep: float, shown: frozenset[int] | None = None
    ) -> Tensor:
        """Velocity of one block behind the clean blocks so far, or those of their frames that are shown."""
        start, stop = self.spans[index]
        frames = [Frame(f, a, b, True) for a, b in self.spans[:index] for f in range(a, b)]
        frames += [Frame(f, start, stop, False) for f in range(start, stop)]
        times = torch.full((self.batch, len(self.spans)), timestep, dtype=torch.float64)
        return self._forward(frames, torch.cat([*clean, x], 2), times, False, shown)[:, :, -(stop - start) :]

    def _forward(
        self, frames: list[Frame], x: Tensor, timestep: Tensor, detach_clean: bool, shown: frozenset[int] | None = None
    ) -> Tensor:
        index = {start: i for i, (start, _) in enumerate(self.spans)}
        columns = [torch.zeros(self.batch).double() if f.clean else timestep[:, index[f.start]] for f in frames]
        out = dense_forward(
            self.wide, MODEL["num_heads"], x.double(), torch.stack(columns, 1), self.embeds.double(), frames,
            *self.policy, detach_clean, shown,
        )  # fmt: skip
        return out[:, :, sum(f.clean for f in frames) :]

    def inputs(self) -> dict[str, Tensor]:
        return {"prompt_embeds": self.embeds, **{f"weights.{k}": v for k, v in self.weights.items()}}


def spans_of(lengths: Sequence[int]) -> Spans:
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return list(zip([0, *stops[:-1]], stops, strict=True))


@torch.no_grad()
def rollout_case(
    name: str, lengths: Sequence[int], steps: Sequence[int], shift: float, warp: bool, sink: int, window: int | None,
    relative: bool, batch: int = 2,
) -> tuple[Case, Oracle]:  # fmt: skip
    """A case of kind b1, b2 or b4: the loop of the few-step sampler, written out."""
    oracle = Oracle(batch, spans_of(lengths), sink, window, relative)
    start, renoise = oracle.draw(1), oracle.draw(2, len(steps) - 1)
    u = torch.tensor(steps) / 1000
    sigmas = shift * u / (1 + (shift - 1) * u) if warp else u
    times = (1000 * sigmas).double()
    clean: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {"velocity": [], "x0": [], "clean_velocity": []}
    for i, (first, stop) in enumerate(oracle.spans):
        x, velocities, predictions = start[:, :, first:stop].double(), [], []
        for k, sigma in enumerate(sigmas.double()):
            velocity = oracle.block(i, x, clean, float(times[k]))
            x0 = x - sigma * velocity
            velocities.append(velocity)
            predictions.append(x0)
            if k + 1 < len(steps):
                x = (1 - sigmas[k + 1].double()) * x0 + sigmas[k + 1].double() * renoise[k][:, :, first:stop]
        rows["velocity"].append(torch.stack(velocities))
        rows["x0"].append(torch.stack(predictions))
        rows["clean_velocity"].append(oracle.block(i, predictions[-1], clean, 0.0))
        clean.append(predictions[-1])
    probe_x, probe_history = oracle.draw(5), oracle.draw(6)
    probe_times = torch.linspace(950, 50, len(lengths)).double()
    tensors = {
        **oracle.inputs(),
        **{key: torch.cat(parts, -3).float() for key, parts in rows.items()},
        "latents": torch.cat(clean, 2).float(),
        "noise": start,
        "renoise": renoise,
        "sigmas": sigmas.double(),
        "timesteps": times,
        "probe_x": probe_x,
        "probe_history": probe_history,
        "probe_timesteps": probe_times,
        "probe_velocity": oracle.packed(probe_x, probe_history, probe_times.expand(batch, -1)).float(),
    }
    hparams = {
        "model": MODEL, "batch": batch, "latent_hw": LATENT_HW, "blocks": len(lengths), "frames_per_block": lengths[-1],
        "nominal_steps": list(steps), "timestep_shift": shift, "warp": warp,
    }  # fmt: skip
    if name == "b1":
        hparams |= {"context_noise": 0, "sink": sink, "window": window}
    else:
        hparams |= {"sink_frames": sink, "window_frames_including_current_block": window}
        hparams |= {"rope": "relative to the window"} if name == "b4" else {"probe_policies": [[sink, window]]}
        for unused in ("x0", "clean_velocity"):
            del tensors[unused]
        tensors[f"probe_velocity.sink{sink}_window{window}"] = tensors.pop("probe_velocity")
    return Case(f"{name}_synthetic", hparams, tensors), oracle


def packed_case(lengths: Sequence[int], timesteps: Sequence[int], policies: Sequence[tuple[int, int | None]]) -> Case:
    """A case of kind b5: several clips, a timestep each, (sink, window) in chunks with the current one excluded."""
    spans = spans_of(lengths)
    gradient_weights = ["blocks.1.self_attn.k.weight", "time_projection.1.bias", "patch_embedding.weight"]
    tensors: dict[str, Tensor] = {}
    for sink, window in policies:
        frames_sink = spans[sink - 1][1] if sink else 0
        frames_window = None if window is None else frames_sink + (window + 1) * lengths[-1]
        oracle = Oracle(len(timesteps), spans, frames_sink, frames_window, False)
        noisy, clean, cotangent = (oracle.draw(seed) for seed in (1, 2, 3))
        times = torch.tensor(timesteps).double()[:, None].expand(-1, len(lengths))
        tensors |= {**oracle.inputs(), "noisy": noisy, "clean": clean, "cotangent": cotangent}
        label = f"sink{sink}_window{'all' if window is None else window}"
        for prefix, detach_clean in (("grad", False), ("grad_detached_history", True)):
            velocity = oracle.packed(noisy, clean, times, detach_clean=detach_clean)
            tensors[f"velocity.{label}"] = velocity.detach().float()
            asked = [oracle.wide[str(diffusers_name(weight))] for weight in gradient_weights]
            found = torch.autograd.grad((cotangent.double() * velocity).sum(), asked)
            tensors |= {f"{prefix}.{label}.{w}": g.float() for w, g in zip(gradient_weights, found, strict=True)}
    tensors["timesteps"] = torch.tensor(timesteps)
    hparams = {
        "model": MODEL, "batch": len(timesteps), "latent_hw": LATENT_HW, "chunks": len(lengths),
        "frames_per_chunk": lengths[-1], "timesteps": list(timesteps), "gradient_weights": gradient_weights,
        "policies_sink_window_in_chunks": [list(policy) for policy in policies],
    }  # fmt: skip
    return Case("b5_synthetic", hparams, tensors)


@torch.no_grad()
def routed_case(
    frames_per_block: int, start: int, history: tuple[int, int | None], sink: int, recent: int,
    routes: Sequence[Sequence[int]], timestep: float,
) -> Case:  # fmt: skip
    """A case of kind b8 with one clip: the dense forward under a mask that lets the last block see its route."""
    first = start % frames_per_block or frames_per_block
    spans = spans_of([first] + [frames_per_block] * ((start - first) // frames_per_block + 1))
    oracle = Oracle(1, spans, history[0], history[1], False)
    x, clean = oracle.draw(1)[:, :, start:], oracle.draw(2)[:, :, :start]
    parts = [clean[:, :, a:b].double() for a, b in spans[:-1]]

    def behind(route: Sequence[int]) -> Tensor:
        shown = frozenset({*range(sink), *route, *range(start - recent, start)})
        return oracle.block(len(spans) - 1, x.double(), parts, timestep, shown)

    tensors = {
        **oracle.inputs(),
        "history": clean, "x": x, "timestep": torch.tensor([timestep], dtype=torch.float64),
        "routed_frames": torch.tensor([list(route) for route in routes]),
        "velocity_routed": torch.cat([behind(route) for route in routes]).float(),
        "velocity_default": oracle.block(len(spans) - 1, x.double(), parts, timestep).float(),
    }  # fmt: skip
    hparams = {
        "model": MODEL, "batch": 1, "latent_hw": LATENT_HW, "start_frame": start, "history_sink": history[0],
        "history_window": history[1], "sink": sink, "routed": len(routes[0]), "recent": recent,
    }  # fmt: skip
    return Case("b8_synthetic", hparams, tensors)


def plans_case(
    paper: dict, released: dict, examples: Mapping[str, Sequence[Sequence[int]]], seeds: Sequence[tuple[int, int]]
) -> Case:
    """A case of kind l7, by loops over frames that follow the words of the golden set."""
    sink, routed, recent, steps = (paper[name] for name in ("sink", "routed", "recent", "steps"))
    tensors: dict[str, Tensor] = {}
    for i, start in enumerate(paper["histories"]):
        allowed = [f for f in range(start) if f >= sink and f < start - recent]
        sets = {
            "history_frames": [start], "allowed": allowed, "sink": list(range(sink)),
            "recent": [f for f in range(start) if start - f <= recent], "current": [start, start + 1, start + 2],
            "routed_steps": [1 if 2 * k < steps else 0 for k in range(steps)],
            "inclusion_probability": [routed / len(allowed) for _ in allowed],
            **{f"example_{word}": plans for word, plans in examples.items()},
        }  # fmt: skip
        tensors |= {f"paper.case{i}.{name}": torch.tensor(values) for name, values in sets.items()}
        probability = f"paper.case{i}.inclusion_probability"
        tensors[probability] = torch.tensor(sets["inclusion_probability"], dtype=torch.float64)
    tensors |= {f"released.{name}": torch.tensor(values) for name, values in released_plans(released, seeds).items()}
    return Case("l7_synthetic", {"paper": paper, "released": released}, tensors)


def released_plans(s: Mapping[str, int], seeds: Sequence[tuple[int, int]]) -> dict[str, list]:
    """The released planner, written out a second time."""
    routed = s["W"] - s["sink"] - s["m"]
    pools, chunk, edge = {}, 0, s["first"]
    for f in range(0, s["total"], 3):
        if f == edge:
            chunk, edge = chunk + 1, edge + s["new"]
        low = max(s["sink"], f + 3 * (s["P"] - 1) - s["cap"] + s["sink"])
        pool = list(range(low, f - s["m"]))
        if chunk < s["X"] and f >= s["W"] and f + 3 * s["P"] <= min(edge, s["total"]) and len(pool) >= routed:
            pools[f] = pool
    out: dict[str, list] = {"eligible_pivots": list(pools), "sample_idx": [], "seed_context": [], "pivot": []}
    out |= {"pool": [], "planned": [], "fetched": [], "fetch_shift": []}
    for sample, context in seeds:
        seed = s["seed"] + 97 * sample + context
        pivot = list(pools)[int(torch.randint(len(pools), (1,), generator=torch.Generator().manual_seed(seed)))]
        pool = pools[pivot]
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + 1)).tolist()
        step = max(1, len(pool) // s["K"])
        ring = order * (2 + s["K"])
        plans = [sorted(pool[i] for i in ring[k * step : k * step + routed]) for k in range(s["K"])]
        shift = 3 if pivot + 3 > s["cap"] else 0
        fetched = [
            [
                [*range(s["sink"]), *(x + shift for x in plan), *range(end - s["m"], end)]
                for end in range(pivot + 3, pivot + 3 * s["P"] + 1, 3)
            ]
            for plan in plans
        ]
        row = (sample, context, pivot, [pool[0], pool[-1] + 1], plans, fetched, shift)
        names = ("sample_idx", "seed_context", "pivot", "pool", "planned", "fetched", "fetch_shift")
        for name, value in zip(names, row, strict=True):
            out[name].append(value)
    return out
