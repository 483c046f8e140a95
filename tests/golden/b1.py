"""Kind b1: a Self-Forcing rollout with the full history and absolute positions, every number of every step."""

from tests.golden.backbone import ROLLOUT_INPUTS, check_probe, check_rollout, frame_policy
from tests.golden.case import Case, Row

INPUTS: tuple[str, ...] = ROLLOUT_INPUTS
NOT_TAKEN_UP: tuple[str, ...] = ()


def check(case: Case) -> list[Row]:
    """Schedule, rollout, the discarded output of the clean pass, and probes behind a given history."""
    policy = frame_policy(case.hparam("sink"), case.hparam("window"))
    return [
        *check_rollout(case, policy, ("velocity", "x0", "latents", "clean_velocity")),
        *check_probe(case, "probe_velocity", policy),
    ]
