"""Muon with Adam: what a step does, which parameters it is for, and that a state can be taken up again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils.training.optimizers import Muon, is_matrix

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


def step(network, optimizer, seed=0):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    (network(torch.randn(2, 1, 12, 12)) - torch.randn(2, 1, 12, 12)).square().mean().backward()
    optimizer.step()


def groups(network):
    return [{"name": "all", "params": list(network.parameters())}]


def test_matrices_are_weights_between_several_channels():
    names = [name for name, parameter in small_network().named_parameters() if is_matrix(parameter)]
    assert names == ["2.weight", "3.weight"]


def test_a_step_goes_along_the_nearest_orthogonal_matrix_and_has_the_size_of_adams():
    weight = small_network()[3].weight
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    before, weight.grad = weight.detach().flatten(1).clone(), gradient
    Muon([{"params": [weight]}], **ADAM).step()
    moved = (before - weight.detach().flatten(1)) / RATE
    # The first step's mean is along the gradient, whose polar factor is found here by its decomposition.
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    polar = left @ right
    assert (moved * polar).sum() / (moved.norm() * polar.norm()) > 0.95
    singular = torch.linalg.svdvals(moved) / (0.2 * math.sqrt(max(moved.shape)))
    assert 0.5 < singular.min() and singular.max() < 1.5


def test_other_parameters_are_adams_bit_for_bit():
    ours, plain = small_network(), small_network()
    step(ours, Muon(groups(ours), **ADAM))
    step(plain, torch.optim.Adam(groups(plain), **ADAM))
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs) != is_matrix(mine), name


def test_what_has_no_gradient_stays():
    network = small_network()
    network[2].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = Muon(groups(network), **ADAM)
    step(network, optimizer)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("2."), name


def test_weights_loaded_between_two_steps_are_what_is_moved():
    network, other = small_network(0), small_network(1)
    optimizer = Muon([{"params": list(network.parameters())}], lr=0.0, weight_decay=0.0)
    step(network, optimizer)
    network.load_state_dict(other.state_dict())
    step(network, optimizer)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_memory_layout_changes_nothing():
    plain, last = small_network(), small_network().to(memory_format=torch.channels_last)
    for network in (plain, last):
        optimizer = Muon(groups(network), **ADAM)
        network[3].weight.grad = (
            torch.randn(6, 24, 3, 3, generator=torch.Generator().manual_seed(3))
            .contiguous(memory_format=torch.channels_last if network is last else torch.contiguous_format)
        )  # fmt: skip
        optimizer.step()
    assert last[3].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last[3].weight, plain[3].weight, rtol=0, atol=0)


def test_learning_rate_and_name_of_every_group():
    network = small_network()
    optimizer = Muon(groups(network), **ADAM)
    assert [group["name"] for group in optimizer.param_groups] == ["all", "all"]
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(network, optimizer)
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_state_taken_up_goes_on_bit_for_bit():
    straight, stopped, resumed = small_network(), small_network(), small_network(1)
    first, second, third = (Muon(groups(network), **ADAM) for network in (straight, stopped, resumed))
    for seed in range(4):
        step(straight, first, seed)
    for seed in range(2):
        step(stopped, second, seed)
    resumed.load_state_dict(stopped.state_dict())
    third.load_state_dict(second.state_dict())
    for seed in range(2, 4):
        step(resumed, third, seed)
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_a_state_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="parameter"):
        Muon(groups(small_network()), **ADAM).load_state_dict(Muon(groups(nn.Conv2d(2, 2, 1)), **ADAM).state_dict())


def test_gradients_are_dropped_and_not_held():
    network = small_network()
    optimizer = Muon(groups(network), **ADAM)
    step(network, optimizer)
    assert all(matrix.grad is None for _, matrix in optimizer.pairs)
    optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in network.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())
