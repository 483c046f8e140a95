"""The promises of a `RewardModel` and an `AdvantageRule`: a failed score is NaN and invalid, and groups stay apart."""

from collections.abc import Sequence

import torch

from framework.conformance.running import check_rows, described, near, repeatable, require, saved
from framework.interfaces import AdvantageRule, RewardModel
from framework.types import Advantage, Scores, VideoBatch


def check_reward(
    reward: RewardModel, videos: VideoBatch, unscorable: VideoBatch | None = None, tolerance: float = 1e-4
) -> None:
    """Scores carry the declared signals, one per clip and the same in any batch and order; what failed is NaN, never 0.

    videos: clips that can be scored. unscorable: clips that cannot be, e.g. of one frame. tolerance: between a score
    alone and in company. Raises Nonconforming.
    """
    name, signals = described(reward), tuple(reward.signals)
    require(len(set(signals)) == len(signals) > 0, f"{name}.signals must be distinct names, got {signals}")
    frames, state = videos.frames.clone(), saved(name, reward)

    def score(clips: VideoBatch) -> Scores:
        reward.load_state_dict(state)  # what it remembers may change a score, what else happened may not
        return reward.score(clips)

    scores = repeatable(f"{name}.score", lambda: score(videos))
    require(torch.equal(frames, videos.frames), f"{name}.score changes the frames that it is given")
    _check_scores(name, scores, signals, len(videos))
    none = sorted(signal for signal in signals if not bool(scores.valid[signal].any()))
    require(not none, f"{name} gives no valid {', '.join(none)} for clips that can be scored")
    for i in range(len(videos)):
        alone = score(VideoBatch(videos.frames[i : i + 1], videos.fps, videos.windows[i : i + 1]))
        for signal in signals:
            left, right = alone.values[signal], scores.values[signal][i : i + 1]
            require(
                near(left, right, tolerance),
                f"{name} gives clip {i} {signal}={left.tolist()} alone and {right.tolist()} among others; clips are "
                f"compared by the advantage rule",
            )
    turned = score(VideoBatch(videos.frames.flip(0), videos.fps, videos.windows[::-1]))
    for signal in signals:
        require(
            near(turned.values[signal].flip(0), scores.values[signal], tolerance),
            f"{name} gives other scores of {signal} when the clips come in another order",
        )
    _check_windows(name, scores, videos, tolerance)
    if unscorable is not None:
        failed = score(unscorable)
        _check_scores(name, failed, signals, len(unscorable))
        valid = torch.stack([failed.valid[signal] for signal in signals]).all(0)
        require(not bool(valid.any()), f"{name} scores a clip that cannot be scored; give NaN and `Scores.of` them")


def _check_scores(name: str, scores: Scores, signals: Sequence[str], clips: int) -> None:
    """Names, shapes, no graph, and NaN where invalid."""
    require(set(scores.values) == set(signals), f"{name}.signals={signals}, but it scores {sorted(scores.values)}")
    for signal in signals:
        value, valid = scores.values[signal], scores.valid[signal]
        require(
            value.shape == (clips,) and value.dtype == torch.float32 and valid.dtype == torch.bool,
            f"{name}: {signal} must be float32 [{clips}], got {value.dtype} {list(value.shape)}",
        )
        require(not value.requires_grad, f"{name}: {signal} carries a graph; score under torch.no_grad()")
        kept = value[~valid & ~torch.isnan(value)].tolist()
        require(not kept, f"{name}: {signal} is invalid and yet {kept}; a failed score is NaN")


def _check_windows(name: str, scores: Scores, videos: VideoBatch, tolerance: float) -> None:
    """Scores of windows, where there are any: a column for each, NaN where a clip has none; the value is their mean."""
    most = max(len(windows) for windows in videos.windows)
    lacking = torch.arange(most) >= torch.tensor([[len(windows)] for windows in videos.windows])
    for signal, table in scores.windows.items():
        require(
            signal in scores.values and table.shape == (len(videos), most) and not table.requires_grad,
            f"{name}: windows[{signal!r}] must be [{len(videos)}, {most}] without a graph, got {list(table.shape)}",
        )
        require(
            bool(torch.isnan(table[lacking]).all()),
            f"{name}: windows[{signal!r}] must be NaN where a clip has no such window",
        )
        valid = scores.valid[signal]
        require(
            near(table[valid].nanmean(1), scores.values[signal][valid], tolerance),
            f"{name}: {signal} is not the mean of its windows",
        )


def check_advantage(rule: AdvantageRule, signals: Sequence[str] = ("reward",), anchored: bool = False) -> None:
    """Advantages do not reach from group to group, and anchors and clips without a score are inactive.

    signals: of the reward that the rule weighs. anchored: whether every group has an anchor, which rules that read
    `Anchors` need. Raises Nonconforming.
    """
    name, groups = described(rule), torch.tensor([3, 1, 2]).repeat_interleave(4)
    anchors = torch.arange(12) % 4 == 3 if anchored else None
    failed = torch.arange(12) == 5
    drawn = [torch.rand(12, generator=torch.Generator().manual_seed(i)) for i in range(len(signals))]
    values = {signal: value.where(~failed, torch.nan) for signal, value in zip(signals, drawn, strict=True)}
    state = saved(name, rule)

    def of(harder: float = 0.0) -> Advantage:
        """The advantages when the scores of the first group are lower by so much."""
        rule.load_state_dict(state)
        scores = {signal: value - harder * (groups == 3) for signal, value in values.items()}
        return rule(Scores.of(scores), groups, anchors)

    result = repeatable(name, of)
    check_rows(f"{name}: values", result.values, 12)
    check_rows(f"{name}: active", result.active, 12)
    require(torch.equal(result.groups, groups), f"{name} must hand the group ids on")
    require(not bool((result.active & failed).any()), f"{name} leaves a clip active whose score failed")
    require(anchors is None or not bool((result.active & anchors).any()), f"{name} leaves an anchor active")
    others, moved = groups != 3, of(harder=0.25)
    ranks = [a.values[others & a.active].argsort(stable=True) for a in (result, moved)]
    require(
        torch.equal(result.active[others], moved.active[others]) and torch.equal(*ranks),
        f"{name}: how hard one prompt is decides what another learns; compare inside groups",
    )
