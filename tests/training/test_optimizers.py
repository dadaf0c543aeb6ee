"""Muon with Adam: what a step does, which parameters it is for, and that a state can be taken up again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils.training.optimizers import Muon, load_state, matrices

RATE = 1e-2
ADAM = {"lr": RATE, "weight_decay": 0.0}


def small_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),  # one input channel
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise
        nn.Conv2d(8, 24, 1),
        nn.Conv2d(24, 6, 3, padding=1),
        nn.Conv2d(6, 1, 1),  # one output channel
    )


def muon(network):
    return Muon([{"name": "all", "params": list(network.parameters())}], matrices(network), **ADAM)


def step(network, optimizer, seed=0):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    (network(torch.randn(2, 1, 12, 12)) - torch.randn(2, 1, 12, 12)).square().mean().backward()
    optimizer.step()


def test_matrices_are_weights_between_several_channels():
    network = small_network()
    chosen = matrices(network)
    assert [name for name, parameter in network.named_parameters() if parameter in chosen] == ["2.weight", "3.weight"]


def test_a_step_goes_along_the_nearest_orthogonal_matrix_and_has_the_size_of_adams():
    network = small_network()
    weight = network[3].weight
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    before, weight.grad = weight.detach().flatten(1).clone(), gradient
    muon(network).step()
    moved = (before - weight.detach().flatten(1)) / RATE
    # The first step's mean is along the gradient, whose polar factor is found here by its decomposition.
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    polar = left @ right
    assert (moved * polar).sum() / (moved.norm() * polar.norm()) > 0.95
    singular = torch.linalg.svdvals(moved) / (0.2 * math.sqrt(max(moved.shape)))
    assert 0.5 < singular.min() and singular.max() < 1.5


def test_other_parameters_are_adams_bit_for_bit():
    ours, plain = small_network(), small_network()
    step(ours, muon(ours))
    step(plain, torch.optim.Adam(plain.parameters(), **ADAM))
    chosen = matrices(ours)
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs) != (mine in chosen), name


def test_what_has_no_gradient_stays_and_gradients_are_dropped():
    network = small_network()
    network[2].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = muon(network)
    step(network, optimizer)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("2."), name
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in [*network.parameters(), *optimizer.views.values()])


def test_state_taken_up_goes_on_bit_for_bit_with_weights_that_were_loaded():
    straight, stopped, resumed = small_network(), small_network(), small_network(1)
    first, second, third = muon(straight), muon(stopped), muon(resumed)
    for seed in range(4):
        step(straight, first, seed)
    for seed in range(2):
        step(stopped, second, seed)
    resumed.load_state_dict(stopped.state_dict())
    load_state(third, second.state_dict())
    for seed in range(2, 4):
        step(resumed, third, seed)
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("damage", [lambda x: x[:1], lambda x: x.double(), lambda x: x.tolist()])
@pytest.mark.parametrize("part", ["adam", "muon"])
def test_a_state_that_does_not_fit_is_refused(part, damage):
    network = small_network()
    optimizer = muon(network)
    step(network, optimizer)
    state = optimizer.state_dict()
    values = state[part]["state"][0]
    kind = [*values][-1]
    values[kind] = damage(values[kind])
    with pytest.raises(ValueError, match=kind):
        load_state(muon(small_network()), state)
