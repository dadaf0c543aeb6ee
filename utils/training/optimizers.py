"""Optimisers of train.py. Adam is PyTorch's own; Muon here is PyTorch's for matrices, with Adam for everything else."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adam", "muon")


def matrices(network: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon is for: those of linear layers and of convolutions between several channels.

    Biases, norms and tables of positions are no matrices, and depthwise kernels neither. The first and the last layer
    of a network do not profit, as Muon's author found for embeddings and heads.
    """
    layers = (module for module in network.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return {layer.weight for layer in layers if min(layer.weight.shape[:2]) > 1}


class Muon:
    """Muon for matrices and Adam for the other parameters, behind the interface of one optimiser.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the gradient's running mean by the
    nearest matrix whose singular values are about 1. A convolution is taken as the matrix (outputs, inputs x kernel).
    Steps are scaled as Liu et al. (2025, arXiv 2502.16982) do, to the size of Adam's, so one learning rate serves both.

    Args:
        groups: as those of a torch optimiser: dictionaries of `params`, lists, and other entries.
        chosen: the parameters that Muon moves; see `matrices`.
        adam: keyword arguments of `torch.optim.Adam` (`lr` and `weight_decay` hold for both; Muon's weight decay is
            always taken off the weights).

    Attributes:
        param_groups: those of Adam, then those of Muon, which have `by` "muon"; each with the other entries of its
            group.
    """

    def __init__(self, groups: list[dict[str, Any]], chosen: Set[nn.Parameter], **adam: Any) -> None:
        # PyTorch's Muon takes two dimensions alone, so it is given views of the weights.
        self.views = {p: nn.Parameter(p.detach().view(len(p), -1)) for g in groups for p in g["params"] if p in chosen}
        others = [{**g, "params": [p for p in g["params"] if p not in chosen]} for g in groups]
        views = [{**g, "params": [self.views[p] for p in g["params"] if p in chosen], "by": "muon"} for g in groups]
        self.adam = torch.optim.Adam(others, **adam)
        self.muon = torch.optim.Muon(
            views, lr=adam["lr"], weight_decay=adam["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.adam.param_groups + self.muon.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.adam.zero_grad(set_to_none)
        for parameter, view in self.views.items():
            parameter.grad = view.grad = None

    def step(self) -> None:
        """Moves every parameter that has a gradient."""
        for parameter, view in self.views.items():
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        self.adam.step()
        self.muon.step()

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict()}


def load_state(optimizer: torch.optim.Adam | Muon, state: dict[str, Any]) -> None:
    """Takes up what is stored of every parameter. Rates and decays stay: they are options.

    Raises:
        ValueError, or what a state of another kind leads to: not the state of these parameters. A running mean of
            another size would be read beyond its end.
    """
    parts = {"adam": optimizer.adam, "muon": optimizer.muon} if isinstance(optimizer, Muon) else {"": optimizer}
    for name, part in parts.items():
        stored = (state[name] if name else state)["state"]
        parameters = dict(enumerate(p for group in part.param_groups for p in group["params"]))
        kinds = {"momentum_buffer"} if name == "muon" else {"step", "exp_avg", "exp_avg_sq"}
        for number, values in stored.items():
            if values.keys() != kinds:
                raise ValueError(f"optimizer: {[*values]} of parameter {number}")
            for kind, value in values.items():
                like = torch.empty(()) if kind == "step" else parameters[number]
                check_tensor(f"optimizer: {kind} of parameter {number}", value, like)
        part.load_state_dict({"state": stored, "param_groups": part.state_dict()["param_groups"]})


def check_tensor(name: str, value: object, like: Tensor) -> None:
    """
    Raises:
        ValueError: the value is no dense tensor of the shape and type of another.
    """
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        raise ValueError(f"{name} is no dense tensor")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)} where {like.dtype} {tuple(like.shape)} is wanted")
