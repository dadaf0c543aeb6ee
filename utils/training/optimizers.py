"""Optimisers of train.py. Adam is PyTorch's own; Muon here is PyTorch's for matrices, with Adam for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adam", "muon")


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon is for it: weights of linear layers and of convolutions between several channels.

    Depthwise kernels are no matrices, and the first and the last layer of a network do not profit, as Muon's author
    found for embeddings and heads.
    """
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1


class Muon:
    """Muon for the matrices among the parameters and Adam for the others, behind the interface of one optimiser.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) replaces the gradient's running mean by the
    nearest matrix whose singular values are about 1. A convolution is taken as the matrix (outputs, inputs x kernel).
    Steps are scaled as Liu et al. (2025, arXiv 2502.16982) do, to the size of Adam's, so one learning rate serves both.

    Args:
        groups: as those of a torch optimiser: dictionaries of `params`, lists, and other entries.
        adam: the same parameters' Adam, as keyword arguments of `torch.optim.Adam` (`lr` and `weight_decay` hold for
            both; Muon's weight decay is always taken off the weights).

    Attributes:
        param_groups: those of Adam, then those of Muon, which have `by` "muon"; each with the other entries of its
            group.
    """

    def __init__(self, groups: list[dict[str, Any]], **adam: Any) -> None:
        others, matrices = [], []
        # PyTorch's Muon takes two dimensions alone, so it is given matrices of its own to work on.
        self.pairs: list[tuple[Tensor, nn.Parameter]] = []
        for group in groups:
            pairs = [(p, nn.Parameter(p.detach().flatten(1).clone())) for p in group["params"] if is_matrix(p)]
            self.pairs += pairs
            matrices.append({**group, "by": "muon", "params": [matrix for _, matrix in pairs]})
            others.append({**group, "params": [p for p in group["params"] if not is_matrix(p)]})
        self.adam = torch.optim.Adam(others, **adam)
        self.muon = torch.optim.Muon(
            matrices, lr=adam["lr"], weight_decay=adam["weight_decay"], adjust_lr_fn="match_rms_adamw"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.adam.param_groups + self.muon.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or sets those that there are to zero."""
        self.adam.zero_grad(set_to_none)
        for parameter, _ in self.pairs:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Moves every parameter that has a gradient."""
        self.adam.step()
        moved = [(parameter, matrix) for parameter, matrix in self.pairs if parameter.grad is not None]
        for parameter, matrix in moved:
            matrix.copy_(parameter.flatten(1))  # other weights may have been loaded since the last step
            matrix.grad = parameter.grad.flatten(1)
        self.muon.step()
        for parameter, matrix in moved:
            parameter.copy_(matrix.view_as(parameter))
            matrix.grad = None  # or the memory of the gradient would be held during the next step

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a stored state.

        Raises:
            ValueError: of other parameters.
        """
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])
