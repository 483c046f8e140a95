"""Our own parts keep what the interfaces promise, and every broken promise is seen and named in one line."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from framework.advantages import GroupCentred, GroupRelative, PerRewardCentred, PrimaryOnly, SumFirst
from framework.anchored_advantages import AnchorCentred, AnchorRelative, ReleasedAnchorRelative
from framework.conformance import (
    SCENES,
    Nonconforming,
    check_advantage,
    check_exploration,
    check_regularizer,
    check_reward,
    check_surrogate,
)
from framework.evaluation import decode_tape
from framework.kernels import Ode
from framework.raven_advantages import RavenAdvantage
from framework.records import Anchors, OnPolicyTransitions, Transitions
from framework.rng import Streams
from framework.rollout import roll_out
from framework.types import Advantage, Objective, Probes, Route, Scores, Tape, VideoBatch, Window
from rewards.random_control import RandomReward
from rewards.shapes import ShapesReward
from rewards.shapes_proxies import ShapesProxies, Smoothness
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import Last, NoiseEndpoint
from strategies.regularizers.anchor_velocity import AnchorVelocityKL
from strategies.regularizers.branch_kl import BranchKL
from strategies.regularizers.kernel_kl import KernelKL
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.selective_kl import SelectiveKL
from strategies.regularizers.several import Several
from strategies.regularizers.velocity_kl import VelocityKL
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianRegression, GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT, PerBranch
from strategies.surrogates.transitions import OneRandomStep, TrainedSteps
from tests.support import Brightness, tiny_generator

GENERATOR = tiny_generator(clip_blocks=2)
NOISE = NoiseEndpoint(4, stream_blocks=2)
WINDOW = NoiseEndpoint(4, stream_blocks=3, window_blocks=1, layout=Last())
ROUTING = CausalHistoryRouting(
    group_size=3, routed_frames=2, recent=1, sink=0, routed_blocks=1, tail_blocks=1, stream_blocks=4, steps=(True,) * 4
)
SELECTIVE = SelectiveKL("bright", ["dark"])
VIDEOS = decode_tape(
    GENERATOR, roll_out(GENERATOR, NOISE.plan(SCENES, [0, 1, 2], GENERATOR.recipe, Streams(0)), NOISE.kernel)
)
STILLS = VideoBatch(VIDEOS.frames[:2, :1], VIDEOS.fps, tuple((Window(0, 1, p),) for p in VIDEOS.prompts[:2]))
"""One frame says nothing about motion."""


# our own parts


@pytest.mark.parametrize("exploration", [NOISE, replace(NOISE, kernel=Ode()), WINDOW, ROUTING])
def test_an_exploration_of_ours_keeps_its_promises(exploration: Any):
    check_exploration(exploration, GENERATOR)


@pytest.mark.parametrize(
    ("surrogate", "exploration"),
    [
        (NFT(), NOISE), (NFT(noisy_streams=2, space="x0"), WINDOW), (NFT(branch_weights=PerBranch()), ROUTING),
        (GibbsTVE(), ROUTING), (GaussianReinforce(), NOISE), (GaussianRegression(), WINDOW), (GaussianRatio(), ROUTING),
        (GaussianRatio(trained=TrainedSteps(OneRandomStep())), NOISE),
    ],
)  # fmt: skip
def test_a_surrogate_of_ours_keeps_its_promises(surrogate: Any, exploration: Any):
    check_surrogate(surrogate, exploration, GENERATOR)


@pytest.mark.parametrize(
    ("regularizer", "surrogate", "exploration"),
    [
        (NoRegularizer(), NFT(), NOISE), (VelocityKL(), NFT(), NOISE), (SELECTIVE, NFT(), ROUTING),
        (Several((VelocityKL(), SELECTIVE)), GibbsTVE(), ROUTING), (KernelKL(), GaussianRatio(), NOISE),
        (BranchKL(), GibbsTVE(), ROUTING), (AnchorVelocityKL(), GibbsTVE(), ROUTING),
    ],
)  # fmt: skip
def test_a_regularizer_of_ours_keeps_its_promises(regularizer: Any, surrogate: Any, exploration: Any):
    check_regularizer(regularizer, surrogate, exploration, GENERATOR)


@pytest.mark.parametrize("reward", [ShapesProxies(), Smoothness(), RandomReward(), Brightness()])
def test_a_reward_of_ours_keeps_its_promises(reward: Any):
    check_reward(reward, VIDEOS)


def test_a_clip_that_the_ground_truth_cannot_score_is_invalid():
    check_reward(ShapesReward(), VIDEOS, unscorable=STILLS)


def test_windows_of_a_reward_are_checked_clip_by_clip():
    half = VIDEOS.frames.shape[1] // 2
    both = [(Window(0, half, w[0].prompt), replace(w[0], start=half)) for w in VIDEOS.windows[1:]]
    videos = replace(VIDEOS, windows=(VIDEOS.windows[0], *both))
    check_reward(ShapesReward(), videos)
    filled = bent(
        ShapesReward, score=lambda v, score: replace(s := score(), windows={"VQ": s.windows["VQ"].nan_to_num(0)})
    )
    seen(lambda: check_reward(filled, videos), "Bent: windows['VQ'] must be NaN where a clip has no such window")


@pytest.mark.parametrize(
    "rule", [GroupRelative(), GroupCentred(), PerRewardCentred(), PrimaryOnly("reward"), SumFirst(), RavenAdvantage()]
)
def test_an_advantage_rule_of_ours_keeps_its_promises(rule: Any):
    check_advantage(rule)
    check_advantage(rule, anchored=True)


@pytest.mark.parametrize("rule", [AnchorRelative(), AnchorCentred(), ReleasedAnchorRelative()])
def test_a_rule_with_anchors_keeps_its_promises(rule: Any):
    check_advantage(rule, anchored=True)


# what is seen


def bent(kind: type, *arguments: Any, **members: Any) -> Any:
    """A part of a kind with some members replaced; functions take the arguments of the original, and it as the last."""

    def method(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(kind, name)
        return lambda self, *given: change(*given, lambda: original(self, *given))

    def member(name: str, change: Any) -> Any:
        if isinstance(getattr(kind, name, None), property):
            return property(lambda self: change)
        return method(name, change) if callable(change) and not isinstance(change, type) else change

    changed = {name: member(name, change) for name, change in members.items()}
    return type("Bent", (kind,), {"__doc__": "Bent.", **changed})(*arguments)


def seen(check: Callable[[], None], message: str) -> None:
    """Assert that a check fails with a line that begins so."""
    with pytest.raises(Nonconforming) as caught:
        check()
    text = str(caught.value)
    assert text.startswith(message) and "\n" not in text, text


def edited(edit: Callable[..., Any], **members: Any) -> Any:
    """An exploration whose plans are edited."""
    return bent(NoiseEndpoint, 4, 2, plan=lambda s, g, recipe, streams, plan: edit(plan(), streams), **members)


def of_branches(edit: Callable[..., Any]) -> Any:
    return edited(lambda plans, _: tuple(replace(p, branches=edit(p.branches)) for p in plans))


class Bare(NoiseEndpoint):
    """A parameter that no configuration can check."""

    def __init__(self, branches=4):
        super().__init__(branches, 2)


COUNTER = itertools.count()
ROUTE = Route((0,), 0, 1, 1, (True,) * 4)


@pytest.mark.parametrize(
    ("exploration", "message"),
    [
        (bent(NoiseEndpoint, 4, 2, __doc__=""), "Bent needs a docstring"),
        (Bare(), "Bare: annotate the parameters ['branches']"),
        (edited(lambda plans, _: (torch.rand(1), plans)[1]), "Bent.plan draws from torch's global generator"),
        (
            edited(lambda plans, _: tuple(replace(p, prefix_seed=next(COUNTER)) for p in plans)),
            "Bent.plan gives two results for the same arguments",
        ),
        (edited(lambda plans, _: plans[:2]), "Bent.plan must give a tuple of one plan per scene"),
        (edited(lambda plans, _: list(plans)), "Bent.plan must give a tuple of one plan per scene"),
        (edited(lambda plans, _: plans[::-1]), "Bent.plan must keep scenes and group ids in their order"),
        (of_branches(lambda branches: branches[1:]), "Bent.group_size=4, and a plan has 3 branches"),
        (of_branches(lambda branches: branches[:1] * 4), "Bent.plan makes all branches of a group the same clip"),
        (
            of_branches(lambda branches: (*branches, replace(branches[0], anchor=True, route=ROUTE))),
            "Bent.plan gives an anchor a route",
        ),
        (
            edited(lambda plans, _: (*plans[:-1], replace(plans[-1], blocks=1))),
            "Bent.plan must give all groups of a step one window and one size, got (first_block, blocks, branches) "
            "[(0, 1, 4), (0, 2, 4)]",
        ),
        (
            edited(lambda plans, _: tuple(replace(p, blocks=0) for p in plans)),
            "Bent.plan has a window of 0 blocks from block 0",
        ),
        (
            edited(lambda plans, _: tuple(replace(p, branches=plans[0].branches) for p in plans)),
            "Bent.plan gives two groups the same noise",
        ),
        (
            edited(lambda plans, _: tuple(replace(p, prefix_seed=p.prefix_seed + len(plans)) for p in plans)),
            "Bent.plan of a group depends on the other groups",
        ),
        (
            bent(NoiseEndpoint, 4, 2, plan=lambda s, g, recipe, streams, plan: NOISE.plan(s, g, recipe, Streams(0))),
            "Bent.plan does not depend on the step",
        ),
        (
            bent(NoiseEndpoint, 4, 2, writes=lambda writes: writes() | {Anchors}),
            "Bent.writes names Anchors, but a rollout with Consistency leaves only Endpoints, OnPolicyTransitions",
        ),
        (
            bent(NoiseEndpoint, 4, 2, None, NOISE.layout, Ode(), writes=lambda writes: writes() | {Transitions}),
            "Bent.writes names Transitions, but a rollout with Ode leaves only Endpoints, Predictions",
        ),
        (
            bent(NoiseEndpoint, 4, 2, writes=lambda writes: frozenset({OnPolicyTransitions})),
            "Bent.writes must name Endpoints",
        ),
        (
            of_branches(lambda branches: (*branches, replace(branches[0], anchor=True))),
            "Bent.writes must name Anchors exactly if its plans have one",
        ),
    ],
)  # fmt: skip
def test_a_broken_promise_of_an_exploration_is_seen(exploration: Any, message: str):
    seen(lambda: check_exploration(exploration, GENERATOR), message)


def probing(edit: Callable[[Probes], Probes]) -> Any:
    """A surrogate whose probes are edited."""
    return bent(NFT, probes=lambda tape, recipe, streams, probes: map(edit, probes()))


def measuring(edit: Callable[..., dict[str, Tensor]]) -> Any:
    """A surrogate whose statistics are edited."""
    return bent(NFT, statistics=lambda views, probes, statistics: edit(views, dict(statistics())))


def judging(edit: Callable[..., Objective], **members: Any) -> Any:
    """A surrogate whose objective is edited."""
    return bent(NFT, objective=lambda statistics, a, objective: edit(objective(), statistics, a), **members)


def one_stream(tape: Tape, recipe: Any, streams: Streams, probes: Any) -> Any:
    """Noise of the whole batch from one stream."""
    for p in probes():
        yield replace(p, noisy=p.noisy + torch.randn(p.noisy.shape, generator=streams("all")))


def in_place(views: Any, probes: Probes, statistics: Any) -> Any:
    views["behaviour"].clamp_(-0.1, 0.1)
    return statistics()


def two_views(views: Any, probes: Probes, statistics: Any) -> Any:
    return NFT().statistics({name: views[name] for name in NFT.views}, probes)


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (bent(NFT, views=frozenset({"behaviour"})), "Bent.views must hold 'current'"),
        (bent(NFT, views=frozenset({"current", "teacher"})), "Bent.views must hold 'current'"),
        (bent(NFT, reads=frozenset({Anchors})), "Bent reads Anchors, which NoiseEndpoint does not write"),
        (bent(NFT, reads=frozenset({Transitions})), "Bent.probes: the rollout kept no Endpoints"),
        (bent(NFT, probes=lambda tape, recipe, streams, probes: iter(())), "Bent.probes gives nothing to ask"),
        (probing(lambda p: replace(p, noisy=torch.rand_like(p.noisy))), "Bent.probes draws from torch's global"),
        (probing(lambda p: replace(p, sigma=p.sigma[:, 0])), "Bent.probes must give noisy [N, S, C, F, H, W], sigma"),
        (probing(lambda p: replace(p, sigma=1000 * p.sigma)), "Bent.probes: sigma must lie in 0 … 1"),
        (probing(lambda p: replace(p, rows=p.rows + 1)), "Bent.probes: rows must say which of 12 clips"),
        (
            probing(lambda p: replace(p, scenes=(*p.scenes, *p.scenes[:2]))),
            "Bent.probes: 12 clips are not whole groups of 5 scenes",
        ),
        (
            probing(lambda p: replace(p, extra={**p.extra, "mean": torch.zeros(1)})),
            "Bent.probes: extra['mean'] must be [12, …]",
        ),
        (bent(NFT, probes=one_stream), "Bent.probes of a clip depend on the other clips of the step"),
        (bent(NFT, fixed_probes=True), "Bent.fixed_probes is True, but another update asks elsewhere"),
        (bent(NFT, views=frozenset({"current"})), "Bent.statistics reads the view 'behaviour'"),
        (bent(NFT, views=NFT.views | {"reference"}, statistics=two_views), "Bent.views declares ['reference'], which"),
        (bent(NFT, statistics=in_place), "Bent.statistics changes the views in place"),
        (measuring(lambda views, s: s | {"all": s["positive"].mean()}), "Bent.statistics['all'] must be [12, …]"),
        (measuring(lambda views, s: s | {"positive": s["positive"] * torch.inf}), "Bent.statistics['positive'] is not"),
        (
            measuring(lambda views, s: s | {"positive": s["positive"] - s["positive"].mean()}),
            "Bent.statistics of a clip depend on the other clips",
        ),
        (judging(lambda o, s, a: replace(o, per_clip=o.per_clip.mean())), "Bent.objective: per_clip must be [12]"),
        (
            judging(lambda o, s, a: replace(o, metrics={"mean": o.per_clip.mean()})),
            "Bent.objective: metrics['mean'] must be [12]",
        ),
        (
            judging(lambda o, s, a: replace(o, per_clip=o.per_clip - o.per_clip.mean())),
            "Bent.objective lets a clip's loss depend on other clips; set Bent.coupled = True",
        ),
        (
            judging(lambda o, s, a: replace(o, per_clip=o.per_clip - o.per_clip.mean()), coupled=True),
            "Bent.objective lets a clip's loss depend on clips of other groups",
        ),
        (judging(lambda o, s, a: replace(o, per_clip=o.per_clip.detach())), "Bent: the loss has no gradient"),
        (
            judging(lambda o, s, a: replace(o, per_clip=o.per_clip + (o.per_clip - o.per_clip.detach()).sqrt())),
            "Bent: the loss has a gradient that is not finite",
        ),
        (
            judging(lambda o, s, a: replace(o, per_clip=s["positive"])),
            "Bent: the gradient does not depend on the advantage",
        ),
        (judging(lambda o, s, a: replace(o, written={})), "Bent.writes names EndpointShift, but where the reference"),
        (judging(lambda o, s, a: o, has_ratio=True), "Bent.has_ratio=True, and its metrics are ['distance_to_old']"),
    ],
)  # fmt: skip
def test_a_broken_promise_of_a_surrogate_is_seen(surrogate: Any, message: str):
    seen(lambda: check_surrogate(surrogate, NOISE, GENERATOR), message)


def marking(edit: Callable[[Any], Any]) -> Any:
    """A regularizer whose marks are edited."""
    return bent(SelectiveKL, "bright", ["dark"], prepare=lambda scores, groups, anchors, prepare: edit(prepare()))


def paying(edit: Callable[[Tensor], Tensor], **members: Any) -> Any:
    """A regularizer whose penalty is edited."""
    return bent(VelocityKL, penalty=lambda objective, marks, penalty: edit(penalty()), **members)


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        (
            bent(VelocityKL, reads=frozenset({Anchors})),
            "Bent reads Anchors, which NFT does not write",
        ),
        (bent(VelocityKL, views=frozenset()), "Bent.penalty reads EndpointShift, which was not measured"),
        (bent(VelocityKL, reads=frozenset()), "Bent.penalty reads EndpointShift, which was not measured"),
        (paying(lambda p: p.mean()), "Bent.penalty must be [12]"),
        (paying(lambda p: p / 0), "Bent.penalty is not finite"),
        (paying(lambda p: p * torch.rand(1)), "Bent.penalty draws from torch's global generator"),
        (paying(lambda p: p + (p - p.detach()).sqrt()), "Bent.penalty has a gradient that is not finite"),
        (marking(lambda m: replace(m, per_clip=torch.ones(12))), "Bent.prepare marks an anchor or a clip whose score"),
        (marking(lambda m: replace(m, per_clip=m.per_clip[1:])), "Bent.prepare: per_clip must be [12]"),
        (marking(lambda m: None if next(COUNTER) % 2 else m), "Bent.prepare must give marks always or never"),
        (
            bent(SelectiveKL, "bright", ["dark"], state_dict=lambda _: {}, load_state_dict=lambda state, _: None),
            "Bent: after load_state_dict it goes on with other marks",
        ),
        (
            bent(SelectiveKL, "bright", ["dark"], state_dict=lambda _: {"ratio": SELECTIVE}),
            "Bent.state_dict must hold plain values and tensors alone",
        ),
    ],
)
def test_a_broken_promise_of_a_regularizer_is_seen(regularizer: Any, message: str):
    seen(lambda: check_regularizer(regularizer, NFT(), NOISE, GENERATOR), message)


def scoring(edit: Callable[[VideoBatch, Scores], Scores], **members: Any) -> Any:
    """A reward whose scores are edited."""
    return bent(Brightness, score=lambda videos, score: edit(videos, score()), **members)


def with_bright(edit: Callable[[Tensor], Tensor]) -> Any:
    """A reward one of whose signals is edited; what is finite is valid."""
    return scoring(lambda videos, s: Scores.of({**s.values, "bright": edit(s.values["bright"])}))


def darkened(videos: VideoBatch, scores: Scores) -> Scores:
    videos.frames.clamp_(max=200)
    return Brightness().score(videos)


def later(videos: VideoBatch, scores: Scores) -> Scores:
    """Something that is remembered and not saved."""
    return Scores.of({name: value + next(COUNTER) for name, value in scores.values.items()})


def failed_as_zero(videos: VideoBatch, scores: Scores) -> Scores:
    return Scores(
        scores.values | {"red": torch.zeros(len(videos))}, scores.valid | {"red": torch.arange(len(videos)) > 0}
    )


def turned_round(videos: VideoBatch, scores: Scores) -> Scores:
    """Right for one clip and for clips in the order of `VIDEOS`, and the wrong way round otherwise."""
    if torch.equal(videos.frames[-1:], VIDEOS.frames[:1]) and len(videos) > 1:
        return Scores.of({name: value.flip(0) for name, value in scores.values.items()})
    return scores


def windowed(table: Callable[[Tensor], Tensor]) -> Any:
    """A reward of one window per clip, whose scores a function makes of the clips' own."""
    return scoring(lambda videos, s: replace(s, windows={"bright": table(s.values["bright"])}))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (scoring(turned_round), "Bent gives other scores of bright when the clips come in another order"),
        (windowed(lambda x: x), "Bent: windows['bright'] must be [12, 1] without a graph, got [12]"),
        (windowed(lambda x: x[:, None].clone().requires_grad_()), "Bent: windows['bright'] must be [12, 1] without"),
        (windowed(lambda x: x[:, None] + 0.1), "Bent: bright is not the mean of its windows"),
        (scoring(lambda v, s: s, signals=("bright", "bright")), "Bent.signals must be distinct names"),
        (scoring(lambda v, s: s, signals=("bright",)), "Bent.signals=('bright',), but it scores ['bright', 'red']"),
        (scoring(lambda v, s: Scores.of({k: torch.rand(len(v)) for k in s.values})), "Bent.score draws from torch's"),
        (scoring(darkened), "Bent.score changes the frames that it is given"),
        (with_bright(lambda x: x.double()), "Bent: bright must be float32 [12], got torch.float64"),
        (with_bright(lambda x: x[:, None]), "Bent: bright must be float32 [12], got torch.float32 [12, 1]"),
        (with_bright(lambda x: x.requires_grad_()), "Bent: bright carries a graph"),
        (scoring(failed_as_zero), "Bent: red is invalid and yet [0.0]; a failed score is NaN"),
        (with_bright(lambda x: x * torch.nan), "Bent gives no valid bright for clips that can be scored"),
        (with_bright(lambda x: x - x.mean()), "Bent gives clip 0 bright=[0.0] alone and"),
        (scoring(lambda v, s: s), "Bent scores a clip that cannot be scored"),
        (scoring(later), "Bent.score gives two results for the same arguments"),
        (scoring(lambda v, s: s, state_dict=lambda _: {"model": VIDEOS}), "Bent.state_dict must hold plain values"),
    ],
)
def test_a_broken_promise_of_a_reward_is_seen(reward: Any, message: str):
    frames = VIDEOS.frames.clone()
    seen(lambda: check_reward(reward, replace(VIDEOS, frames=frames), unscorable=STILLS), message)


def ruling(edit: Callable[[Advantage], Advantage]) -> Any:
    """A rule whose advantages are edited."""
    return bent(GroupCentred, __call__=lambda scores, groups, anchors, rule: edit(rule()))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ruling(lambda a: replace(a, values=a.values * torch.rand(1))), "Bent draws from torch's global generator"),
        (ruling(lambda a: replace(a, values=a.values[1:])), "Bent: values must be [12]"),
        (ruling(lambda a: replace(a, active=a.active[1:])), "Bent: active must be [12]"),
        (ruling(lambda a: replace(a, values=a.values / 0)), "Bent: values is not finite"),
        (ruling(lambda a: replace(a, groups=a.groups * 0)), "Bent must hand the group ids on"),
        (ruling(lambda a: replace(a, active=torch.ones(12).bool())), "Bent leaves a clip active whose score failed"),
        (
            ruling(lambda a: replace(a, active=torch.arange(12) != 5)),
            "Bent leaves an anchor active",
        ),
        (
            bent(
                GroupCentred,
                __call__=lambda scores, groups, anchors, rule: replace(
                    rule(), active=rule().active & (scores.values["reward"] > scores.values["reward"].nanmean())
                ),
            ),
            "Bent: how hard one prompt is decides what another learns",
        ),
    ],
)
def test_a_broken_promise_of_an_advantage_rule_is_seen(rule: Any, message: str):
    seen(lambda: check_advantage(rule, anchored=True), message)


def test_signals_and_scenes_may_be_those_of_the_part():
    check_advantage(PrimaryOnly("sharp"), signals=("sharp", "still"))
    with pytest.raises(ValueError, match="sharp"):
        check_advantage(PrimaryOnly("sharp"))
    check_exploration(NOISE, GENERATOR, scenes=SCENES[:2], seed=5)


class Running(GroupCentred):
    """Divides by a deviation that it remembers."""

    def __init__(self, clip: float | None = 5.0) -> None:
        super().__init__(None, clip)
        object.__setattr__(self, "spread", 1.0)

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        advantage = super().__call__(scores, groups, anchors)
        object.__setattr__(self, "spread", 0.9 * self.spread + 0.1 * float(advantage.values.std()))
        return replace(advantage, values=advantage.values / self.spread)

    def state_dict(self) -> dict:
        return {"spread": self.spread}

    def load_state_dict(self, state: dict) -> None:
        object.__setattr__(self, "spread", state["spread"])


def test_a_rule_may_remember_what_it_saves():
    check_advantage(Running())
    forgetful = bent(Running, state_dict=lambda _: {}, load_state_dict=lambda state, _: None)
    seen(lambda: check_advantage(forgetful), "Bent gives two results for the same arguments")
