"""The fourth method keeps the framework's promises and is the loss that it says."""

import math

import pytest
import torch
from endpoint_dpo import EndpointDPO, pair_loss

from backbones.embedded.generator import packaged_generator
from framework.conformance import check_surrogate
from framework.types import Advantage
from strategies.exploration.noise_endpoint import NoiseEndpoint


def test_it_keeps_the_promises_of_a_surrogate():
    check_surrogate(EndpointDPO(), NoiseEndpoint(group_size=3, stream_blocks=2), packaged_generator())


def loss(values: list[float], groups: list[int], active: list[bool]) -> list[float]:
    """Of two clips with the margins .3 and −.1."""
    advantage = Advantage(torch.tensor(values), torch.tensor(active), torch.tensor(groups))
    return pair_loss(torch.tensor([0.3, -0.1]), advantage, beta=2.0).tolist()


def test_the_loss_of_a_pair_is_that_of_dpo():
    won, lost = loss([1.0, -1.0], [5, 5], [True, True])
    assert won == pytest.approx(-math.log(1 / (1 + math.exp(2.0 * 0.4)))) and lost == 0


def test_clips_of_different_prompts_or_without_a_score_make_no_pair():
    assert loss([1.0, -1.0], [5, 6], [True, True]) == [0, 0]
    assert loss([1.0, -1.0], [5, 5], [True, False]) == [0, 0]
