"""What an extension point promises, tried on anybody's part: one function per interface, one line per broken promise.

    check_surrogate(MySurrogate(), NoiseEndpoint(4, stream_blocks=2), packaged_generator())

Each runs a part on a few clips as the trainer would and raises `Nonconforming` at the first promise of
`framework.interfaces` that it breaks. What passes can be trained in micro-batches of any size, beside any other groups,
and repeated; whether its mathematics is right is for tests of its own. A few seconds with the embedded generator.
"""

from framework.conformance.exploration import check_exploration
from framework.conformance.regularizer import check_regularizer
from framework.conformance.running import SCENES, Nonconforming
from framework.conformance.scores import check_advantage, check_reward
from framework.conformance.surrogate import check_surrogate

__all__ = [
    "SCENES",
    "Nonconforming",
    "check_advantage",
    "check_exploration",
    "check_regularizer",
    "check_reward",
    "check_surrogate",
]
