"""Kind b4: the policy of b2 with positions relative to the window (Infinity-RoPE, Astrolabe's inference class)."""

from tests.golden.backbone import ROLLOUT_INPUTS, check_probe, check_rollout, frame_policy, policy_names
from tests.golden.case import Case, Row

INPUTS: tuple[str, ...] = ROLLOUT_INPUTS
NOT_TAKEN_UP: tuple[str, ...] = ()


def check(case: Case) -> list[Row]:
    """The rollout, and one probe tensor per (sink, window) in its name."""
    rope = case.hparam("rope")
    if rope != "relative to the window":
        raise ValueError(f"{case.name}: rope is {rope!r}, a b4 case has 'relative to the window'")
    policy = frame_policy(case.hparam("sink_frames"), case.hparam("window_frames_including_current_block"), True)
    rows = list(check_rollout(case, policy, ("velocity", "latents")))
    probes = policy_names(case, "probe_velocity")
    if not probes:
        raise ValueError(f"{case.name} has no tensor probe_velocity.sinkS_windowW")
    for tensor, (sink, window) in probes.items():
        rows += check_probe(case, tensor, frame_policy(sink, window, True))
    return rows
