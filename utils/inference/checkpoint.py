"""Files <-> networks: the published checkpoint format, safe loading, whole-or-nothing saving.

A published file is one dict from network name (`DIDF_Encoder`, ...) to state dict, with every key inside
prefixed by `module.`. Later published code writes `CDDF_Encoder` for `DIDF_Encoder`. All of these are read, in
any floating precision; whole numbers (a batch norm counts its batches) must be of the model's type.
We write the published form, if asked for in half precision, plus one entry `about` of plain values (task, commit,
recipe), which code written for the published files does not look at.

A model that is saved here names its parts in `published_networks`, a dict from the name in the file to the
attribute that holds the network.

Other systems publish files of one network, `{"state_dict": ...}`, with the pickled module beside it, which is never
rebuilt: `load_network`, `save_network`.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.common import InputError, listed, whole_file
from utils.inference.unpickle import read_pickled_modules

ABOUT = "about"
STATE_DICT = "state_dict"
_PREFIX = "module."
_POINTER_START = b"version https://git-lfs"
_ALIASES = {"CDDF_Encoder": "DIDF_Encoder", "CDDF_Decoder": "DIDF_Decoder"}

StateDict = dict[str, Tensor]


def load_checkpoint(path: Path | str, model: nn.Module, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Loads a checkpoint in the published format into a model, key for key; on any error the model is unchanged.

    Args:
        path: the file.
        model: e.g. `net.CDDFuse()`; `model.published_networks` maps names in the file to its attributes.
        map_location: device to read the tensors to; they are copied to wherever the model is.

    Returns:
        The file's `about` entry; empty for files of others.

    Raises:
        FileNotFoundError: no such file.
        InputError: empty, truncated, a large-file pointer, another network, missing or foreign keys, wrong
            shapes, or content that only arbitrary code could rebuild. The message is one line with a next step.
    """
    path = Path(path)
    content = read_file(path, map_location)
    networks = _networks_in(path, content, model.published_networks)
    for name, attribute in model.published_networks.items():
        _check_keys(path, name, networks[name], getattr(model, attribute).state_dict())
    for name, attribute in model.published_networks.items():
        getattr(model, attribute).load_state_dict(networks[name])
    about = content.get(ABOUT, {})
    return dict(about) if isinstance(about, dict) else {}


def load_fitting(path: Path | str, model: nn.Module) -> str:
    """Loads what fits of a file, for a training that begins with parts of another network; the rest stays.

    Args:
        path: as for `load_checkpoint`.
        model: as for `load_checkpoint`.

    Returns:
        One line: how many tensors of each network were taken.

    Raises:
        FileNotFoundError, InputError: as `read_file`; or nothing fits.
    """
    path = Path(path)
    content = read_file(path)
    taken: dict[str, StateDict] = {}
    for name, attribute in model.published_networks.items():
        state = next((value for key, value in content.items() if _ALIASES.get(key, key) == name), {})
        state = {str(key).removeprefix(_PREFIX): value for key, value in dict(state).items()}
        wanted = getattr(model, attribute).state_dict()
        fits = [key for key in wanted if isinstance(state.get(key), Tensor) and state[key].shape == wanted[key].shape]
        taken[name] = {key: state[key] for key in fits}
    if not any(taken.values()):
        raise InputError(f"{path} holds {listed(content)}, and nothing of that fits; choose another file for --init")
    for name, attribute in model.published_networks.items():
        getattr(model, attribute).load_state_dict(taken[name], strict=False)
    counts = (f"{name} {len(taken[name])}" for name in model.published_networks)
    return f"{path}: tensors taken of each network: {', '.join(counts)}"


def save_checkpoint(
    path: Path | str, model: nn.Module, about: dict[str, Any] | None = None, *, half: bool = False
) -> None:
    """Saves a model in the published format (float32, `module.` prefixes), whole or not at all.

    Args:
        path: the file; folders are made.
        model: as for `load_checkpoint`.
        about: plain values (strings, numbers, lists, dicts) stored beside the networks.
        half: store tensors of two axes or more in float16, 11 bits of precision in half the bytes. Biases, norms
            and running statistics stay float32: they are few, and a running variance may have any size. Whoever
            loads the file into a float32 network, by `load_state_dict` too, gets float32.

    Raises:
        InputError: with `half`, a weight is beyond the range of float16.
        OSError: as `save_file`.
    """
    content: dict[str, Any] = {
        name: {
            _PREFIX + key: stored(value, f"{name}: {key}", half)
            for key, value in getattr(model, attribute).state_dict().items()
        }
        for name, attribute in model.published_networks.items()
    }
    if about:
        content[ABOUT] = about
    save_file(path, content)


def load_network(
    path: Path | str, networks: dict[str, nn.Module], *, computed: tuple[str, ...] = ()
) -> tuple[str, dict[str, Any]]:
    """Loads a file of one network into the one of several that it is of; on any error all are unchanged.

    Args:
        path: a dict with a state dict under `state_dict`; pickled modules in it are passed over.
        networks: the candidates, by name.
        computed: last parts of keys that some files hold and the networks compute; they are left out.

    Returns:
        The name of the network, and the file's `about` entry as in `load_checkpoint`.

    Raises:
        FileNotFoundError, InputError: as `load_checkpoint`.
    """
    path = Path(path)
    content = read_file(path, modules=True)
    state = content.get(STATE_DICT)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(
            f"{path} holds {listed(content)}, and no dict of tensors called {STATE_DICT}: "
            "it is a file of another network; choose its system with --system, or name another file"
        )
    state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key.rpartition(".")[2] not in computed}
    wanted = {name: network.state_dict() for name, network in networks.items()}
    name = max(wanted, key=lambda name: len(wanted[name].keys() & state.keys()))
    _check_keys(path, name, state, wanted[name])
    networks[name].load_state_dict(state)
    about = content.get(ABOUT, {})
    return name, dict(about) if isinstance(about, dict) else {}


def save_network(
    path: Path | str, network: nn.Module, about: dict[str, Any] | None = None, *, half: bool = False
) -> None:
    """Saves one network under `state_dict`, whole or not at all; `about` and `half` as in `save_checkpoint`.

    Raises:
        InputError, OSError: as `save_checkpoint`.
    """
    state = {key: stored(value, key, half) for key, value in network.state_dict().items()}
    save_file(path, {STATE_DICT: state} | ({ABOUT: about} if about else {}))


def save_file(path: Path | str, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all.

    Raises:
        OSError: the file could not be written; what was there before is kept.
    """
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch raises when the disk is full
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); is the disk full?") from error


def read_file(path: Path | str, map_location: str | torch.device = "cpu", *, modules: bool = False) -> dict[str, Any]:
    """Reads a file of tensors and plain values without running anything that is in it.

    Args:
        path: the file.
        map_location: device to read the tensors to.
        modules: whether it may hold pickled modules, which are passed over (utils/inference/unpickle.py). Tensors of
            such a file come to the CPU.

    Raises:
        FileNotFoundError, InputError: as `load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file at {path}{' but a folder' if path.is_dir() else ''}. "
            "Weights are made by `python train.py`; name theirs or another's file"
        )
    with open(path, "rb") as file:
        start = file.read(len(_POINTER_START))
    if not start:
        raise InputError(f"{path} is empty (0 bytes); copy or download it again")
    if start == _POINTER_START:
        raise InputError(
            f"{path} is a text pointer to a large file, not the file; run `git lfs pull` in its repository"
        )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch does not look at the check sums
            if damaged:
                raise EOFError(damaged)
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if modules and zipfile.is_zipfile(path):
            return read_pickled_modules(path)
        if zipfile.is_zipfile(path):
            raise InputError(
                f"{path} holds more than tensors and plain values, and what it holds could run code; it was not "
                "loaded. Save its state_dict() with torch.save where it was made"
            ) from error
        raise InputError(f"{path} is not a PyTorch checkpoint; name the right file with --weights") from error
    except Exception as error:  # a reader of damaged bytes may stumble over anything
        raise InputError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}, not a dict of networks; name the right file with --weights"
        )
    return content


def stored(value: Tensor, name: str, half: bool) -> Tensor:
    """A tensor as a file holds it: float32, or with `half` what `save_checkpoint` says; integers as they are."""
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value
    if not (half and value.ndim > 1):
        return value.float()
    halved = value.half()
    if not torch.equal(halved.isfinite(), value.isfinite()):
        raise InputError(f"{name} reaches {value.abs().max():.3g}, beyond float16; save these weights in float32")
    return halved


def _networks_in(path: Path, content: dict[str, Any], wanted: dict[str, str]) -> dict[str, StateDict]:
    """The wanted networks of a file, under their published names, keys without `module.`."""
    if {"model", "optimizer"} <= content.keys():
        raise InputError(f"{path} is a file to resume a training from, not weights; they lie beside it")
    # Some published files say beside their networks how long they were trained; a plain value is no network.
    parts = {k: v for k, v in content.items() if k != ABOUT and not isinstance(v, (int, float, str))}
    names = [_ALIASES.get(name, name) for name in parts]
    found = {_ALIASES.get(name, name): value for name, value in parts.items()}
    if set(found) != set(wanted) or len(names) > len(found):
        raise InputError(
            f"{path} holds {listed(names)} where {listed(wanted)} are expected: "
            "it is a file of another network; choose its system with --system, or name another file"
        )
    for name, state in found.items():
        if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        ):
            raise InputError(f"{path}: {name} is not a dict of tensors; name the right file with --weights")
    return {name: {key.removeprefix(_PREFIX): value for key, value in state.items()} for name, state in found.items()}


def _check_keys(path: Path, name: str, state: StateDict, wanted: StateDict) -> None:
    missing, foreign = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or foreign:
        parts = [f"{len(missing)} keys are missing ({listed(missing)})"] if missing else []
        parts += [f"{len(foreign)} are foreign ({listed(foreign)})"] if foreign else []
        raise InputError(
            f"{path}: {name} does not fit this network: {' and '.join(parts)}; name the right file with --weights"
        )
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            raise InputError(
                f"{path}: {name} has {key} of shape {tuple(state[key].shape)} where {tuple(value.shape)} is expected; "
                "it was made for another size of this network: name the right file with --weights"
            )
        found = state[key].dtype
        if found != value.dtype and not (found.is_floating_point and value.is_floating_point()):
            raise InputError(
                f"{path}: {name} has {key} of type {found} where {value.dtype} is expected; "
                "name the right file with --weights"
            )
