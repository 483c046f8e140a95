"""Kind b2: a LongLive rollout with frame sink and rolling window at absolute positions."""

from tests.golden.backbone import ROLLOUT_INPUTS, check_probe, check_rollout, frame_policy, policy_name, policy_names
from tests.golden.case import Case, Row

INPUTS: tuple[str, ...] = ROLLOUT_INPUTS
NOT_TAKEN_UP: tuple[str, ...] = ()


def check(case: Case) -> list[Row]:
    """The rollout, and the probes of every policy that the hyper-parameters list or a tensor names."""
    policy = frame_policy(case.hparam("sink_frames"), case.hparam("window_frames_including_current_block"))
    listed = {f"probe_velocity.{policy_name(s, w)}": (s, w) for s, w in case.hparam("probe_policies")}
    rows = list(check_rollout(case, policy, ("velocity", "latents")))
    for tensor, (sink, window) in (listed | policy_names(case, "probe_velocity")).items():
        rows += check_probe(case, tensor, frame_policy(sink, window))
    return rows
