"""Kind b8: one noisy block behind routed histories, asked through the streaming interface, together and one by one."""

import torch
from torch import Tensor

from backbones.streaming import WanStream
from framework.schedules import FewStepSchedule
from framework.types import Route
from tests.golden.backbone import TOLERANCE, GoldenGenerator, build_generator, frame_policy, precision
from tests.golden.case import Case, Row, compare

INPUTS: tuple[str, ...] = ("weights.*", "prompt_embeds", "history", "x", "timestep", "routed_frames")
NOT_TAKEN_UP: tuple[str, ...] = ()


def check(case: Case) -> list[Row]:
    """Every routing and the un-routed block, in one batch of rows that see different frames, and each row alone."""
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        generator = generator_of(case, dtype)
        stream = committed(case, generator, dtype)
        for how, ask in (("one batch", together), ("one by one", one_by_one)):
            routed, default = ask(case, generator, stream, dtype)
            shape = case["velocity_routed"].shape
            rows += [
                compare(
                    case, "velocity_routed", as_expected(routed, len(shape)), tolerance, f"{precision(dtype)} {how}"
                ),
                compare(case, "velocity_default", default, tolerance, f"{precision(dtype)} {how}"),
            ]
    return rows


def generator_of(case: Case, dtype: torch.dtype) -> GoldenGenerator:
    """The case's network; its history is split into blocks as long as the noisy one, a shorter one first.

    Raises ValueError where the history does not end where the noisy block starts.
    """
    start, length = case.hparam("start_frame"), case["x"].shape[2]
    if case["history"].shape[2] != start:
        raise ValueError(f"{case.name}: start_frame is {start}, the history has {case['history'].shape[2]} frames")
    stops = range(start % length or length, start + 1, length)
    spans = [(max(0, stop - length), stop) for stop in stops]
    policy = frame_policy(case.hparam("history_sink"), case.hparam("history_window"))
    return build_generator(case, policy, [*spans, (start, start + length)], FewStepSchedule(), dtype)


@torch.no_grad()
def committed(case: Case, generator: GoldenGenerator, dtype: torch.dtype) -> WanStream:
    """The history, committed under its own policy, every frame kept."""
    history, start = case["history"].to(dtype), case.hparam("start_frame")
    stream = generator.fork(generator.open(generator.prompts, start), len(history) // len(generator.prompts))
    for first, stop in generator.spans[:-1]:
        stream = generator.commit(history[:, :, first:stop], stream)
    return stream


def visible_frames(case: Case) -> list[tuple[int, ...]]:
    """What each routing shows. Raises ValueError where a row has not the number of frames the case states."""
    sink, recent, count = (case.hparam(name) for name in ("sink", "recent", "routed"))
    found = []
    for frames in case["routed_frames"].tolist():
        if len(frames) != count:
            raise ValueError(f"{case.name}: routed is {count}, but routed_frames has rows of {len(frames)}")
        found.append(Route(tuple(frames), sink, recent, 1, (True,)).visible(case.hparam("start_frame")))
    return found


@torch.no_grad()
def together(case: Case, generator: GoldenGenerator, stream: WanStream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(routed [B, routings, C, F, H, W], default [B, C, F, H, W]) of one call on a forked stream."""
    x, shown = case["x"].to(dtype), [*visible_frames(case), None]
    rows = x.repeat_interleave(len(shown), 0)
    out = generator.predict(rows, sigma_of(case), generator.fork(stream, len(shown)), shown * len(x))
    velocities = out.unflatten(0, (len(x), -1))
    return velocities[:, :-1], velocities[:, -1]


@torch.no_grad()
def one_by_one(case: Case, generator: GoldenGenerator, stream: WanStream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, a call for every routing."""
    x, sigma = case["x"].to(dtype), sigma_of(case)
    routed = [generator.predict(x, sigma, stream, [frames] * len(x)) for frames in visible_frames(case)]
    return torch.stack(routed, 1), generator.predict(x, sigma, stream)


def sigma_of(case: Case) -> float:
    """The one level of the case. Raises ValueError where there are several."""
    levels = case["timestep"].double().unique()
    if len(levels) != 1:
        raise ValueError(f"{case.name}: timestep holds several levels, a b8 case has one")
    return float(levels) / 1000


def as_expected(routed: Tensor, dimensions: int) -> Tensor:
    """[B, routings, …] as a file has it: one clip after another, routings outermost or alone."""
    return routed.transpose(0, 1) if dimensions == routed.ndim else routed.transpose(0, 1).flatten(0, 1)
