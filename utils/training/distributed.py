"""Several processes that train one model: who this one is, and what they agree on. One process needs none of it.

The processes are started by torchrun, which tells each its place in the environment. Every process holds the
whole model and a part of each batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from utils.common import InputError

T = TypeVar("T")


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, for the length of the block; nothing where it started none.

    Raises:
        InputError: the processes could not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the processes could not join ({error}); start them with torchrun, as many as there are GPUs "
            "(README, Train)"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process: all of them must ask."""
    if ranks() == 1:
        return flag
    shared = torch.tensor(float(flag), device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared.item())


def from_first(make: Callable[[], T]) -> T:
    """Calls a function in the first process and gives its result to all; so do its errors of input."""
    if ranks() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_first():
        try:
            box[0] = make()
        except (InputError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, through which gradients flow to all of them; without gradients the
    tensor as it is, since one process validates while the others wait."""
    # What is minimised is the mean of the totals of all processes, and gradients of parameters are averaged over
    # them too; so the derivative of a mean is, like the mean itself, a mean over the processes.
    return value if ranks() == 1 or not torch.is_grad_enabled() else all_reduce(value) / ranks()
