"""Files <-> networks: the published checkpoint formats, safe loading, whole-or-nothing saving.

A published file is one dict from network name (`DIDF_Encoder`, ...) to state dict, with every key inside prefixed by
`module.`. A model names its parts in `published_networks`, a dict from the name in the file to the attribute that
holds the network; a file of one network may also be its state dict alone. All forms in which people save such weights
are read: see `load_checkpoint`. We write the published form, on request in half precision, plus one entry `about` of
plain values (task, commit, recipe), which code written for the published files does not look at.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.common import InputError, listed, reason_of, whole_file
from utils.inference.unpickle import load_data

ABOUT = "about"
_POINTER_START = b"version https://git-lfs"
_WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net")  # entries that whole files of weights lie in
_ADDED = ("module", "_orig_mod")  # to keys, by DataParallel and by torch.compile
_SIGNS = {  # a name that only files of one system hold -> how --system calls it
    "BaseFuseLayer": "cddfuse", "base_fusion": "cddfuse", "SepcificFuseLayer": "fsidfusion",
    "specific_fusion": "fsidfusion", "inc_edg": "mlfuse", "encoder_a": "tsdm", "conv_first_ir": "tsdm",
}  # fmt: skip

StateDict = dict[str, Tensor]
Form = Mapping[str, str]  # what a file holds: name in it -> attribute of the model, as `published_networks`


def load_checkpoint(path: Path | str, model: nn.Module) -> dict[str, Any]:
    """Loads a file of weights into a model, key for key; on any error the model is unchanged.

    The networks are found under their published names or those of the model's attributes, with `CDDF_` or nothing in
    the place of `DIDF_`; one dict each or all in one; at the top of the file or in an entry such as `state_dict` or
    `model`; with or without `module.` and `_orig_mod.`; in any floating precision, while whole numbers (batch norm
    counts its batches) must be of the model's type. What lies beside them is left out; one line on stderr names it.

    Args:
        path: the file.
        model: e.g. `net.CDDFuse()`. A network's attribute `computed` holds last parts of keys that some files hold
            and nobody needs; they are left out.

    Returns:
        The file's `about` entry; empty for files of others.

    Raises:
        FileNotFoundError: no such file.
        InputError: as `read_file`; or another network, missing or foreign keys, wrong shapes or types of tensors.
    """
    return load_one_of(path, model, [model.published_networks])[0]


def load_one_of(path: Path | str, model: nn.Module, forms: Sequence[Form]) -> tuple[dict[str, Any], Form]:
    """As `load_checkpoint`, for a file that holds one of several parts of a model, each given like
    `published_networks`; which one it is, is returned beside `about`."""
    content = read_file(path)
    found, form = max(((_find(path, content, model, form), form) for form in forms), key=lambda pair: pair[0].fits)
    if {"settings", "random", "ema"} <= content.keys():
        raise InputError(f"{path} is a file to resume a training from, not weights; they lie beside it")
    absent = [name for name in form if not found.states.get(name)]
    if absent or not found.fits:
        raise _another_network(path, content, model, absent or form)
    states = {name: _checked(path, name, found.states[name], getattr(model, form[name])) for name in form}
    for name, attribute in form.items():
        getattr(model, attribute).load_state_dict(states[name])
    if any(not isinstance(value, (int, float, str, type(None))) for value in found.beside.values()):
        print(f"note: {path}: not asked for, and left out: {_names(found.beside)}", file=sys.stderr)
    about = content.get(ABOUT)
    return dict(about) if isinstance(about, dict) else {}, form


def load_fitting(path: Path | str, model: nn.Module) -> str:
    """Loads what fits of a file, for a training that begins with parts of another network; the rest stays.

    Returns:
        One line: how many tensors of each network were taken.

    Raises:
        FileNotFoundError, InputError: as `read_file`; or nothing fits. The model is unchanged then.
    """
    form = model.published_networks
    states = _find(path, read_file(path), model, form).states
    wanted = {name: getattr(model, attribute).state_dict() for name, attribute in form.items()}
    taken = {
        name: {key: value.to(state[key].dtype) for key, value in states.get(name, {}).items()
               if key in state and not _misfit(value, state[key])}
        for name, state in wanted.items()
    }  # fmt: skip
    if not any(taken.values()):
        raise InputError(f"{path} holds nothing that fits {_names(form)}; name another file")
    for name, attribute in form.items():
        getattr(model, attribute).load_state_dict(taken[name], strict=False)
    return f"{path}: taken " + ", ".join(
        f"{len(taken[name])} of {len(wanted[name])} tensors of {name}" for name in form
    )


def save_checkpoint(
    path: Path | str,
    model: nn.Module,
    about: dict[str, Any] | None = None,
    *,
    half: bool = False,
    prefix: str = "module.",
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model in its published format, in float32, whole or not at all.

    Args:
        path: the file; folders are made.
        model: as for `load_checkpoint`.
        about: plain values (strings, numbers, lists, dicts) stored beside the networks.
        half: store tensors of two axes or more in float16, 11 bits of precision in half the bytes. Biases, norms
            and running statistics stay float32: they are few, and a running variance may have any size. Whoever
            loads the file into a float32 network, by `load_state_dict` too, gets float32.
        prefix: of every key.
        beside: what else the published format holds, before the networks.

    Raises:
        InputError: with `half`, a weight is beyond the range of float16.
        OSError: as `save_file`.
    """
    content: dict[str, Any] = dict(beside or {})
    for name, attribute in model.published_networks.items():
        state = getattr(model, attribute).state_dict()
        content[name] = {prefix + key: _stored(value, f"{name}: {key}", half) for key, value in state.items()}
    save_file(path, content | ({ABOUT: about} if about else {}))


def save_file(path: Path | str, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all.

    Raises:
        OSError: the file could not be written; what was there before is kept.
    """
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch raises when the disk is full
            raise OSError(f"{path} could not be written ({reason_of(error)}); is the disk full?") from error


def read_file(path: Path | str, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads the dict in a file of torch.save without running anything; objects other than data come without content.

    Args:
        path: the file.
        map_location: device to read the tensors to.

    Raises:
        FileNotFoundError: no such file.
        InputError: empty, damaged, compressed, a large-file pointer, no dict, or it asks for a call. The message is
            one line with a next step.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"no file at {path} but {what}. Weights are made by `python train.py`; name theirs or another's file"
        )
    with open(path, "rb") as file:
        start = file.read(len(_POINTER_START))
        if start == _POINTER_START:
            raise InputError(f"{path} is a text pointer to a large file; run `git lfs pull` in its repository")
        file.seek(0)
        try:
            content = load_data(file, path.stat().st_size, map_location)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} was not loaded: it holds what only running code could rebuild. Save its state_dict() with "
                "torch.save where it was made"
            ) from error
        except Exception as error:  # a reader of damaged bytes may stumble over anything
            reason = "it is empty" if not start else reason_of(error)[:60]
            raise InputError(
                f"{path} is not a PyTorch checkpoint, or damaged ({reason}); copy it again, or name another file"
            ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__[:60]
        raise InputError(f"{path} holds a {kind}, not a dict of networks; save its state_dict(), or name another file")
    return content


class _Found(NamedTuple):
    """What a file holds of the wanted networks, what else it holds, and how many of the wanted keys there are."""

    states: dict[str, StateDict]
    beside: dict[str, Any]
    fits: int


def _find(path: Path | str, content: dict[str, Any], model: nn.Module, form: Form) -> _Found:
    """Looks for networks at the top of a file and in its wrappers; where most keys are, the first of equals."""
    names = {_plain(known): name for name, attribute in form.items() for known in (name, attribute)}
    found = []
    for wrapper in (None, *_WRAPPERS):
        place = content if wrapper is None else content.get(wrapper)
        if not isinstance(place, dict):
            continue
        flat = _tensors(place)
        parts: dict[str, Any] = {}
        for key, value in flat.items():
            part, _, rest = key.partition(".")
            parts.setdefault(part, {})[rest] = value
        others = {k: v for k, v in place.items() if isinstance(k, str) and not isinstance(v, Tensor)}
        parts |= {k: _tensors(v) if isinstance(v, dict) else v for k, v in others.items()}
        used = [part for part, state in parts.items() if _plain(part) in names and state and isinstance(state, dict)]
        states = {names[_plain(part)]: parts[part] for part in used}
        if len(states) < len(used):
            raise InputError(f"{path} holds a network twice ({_names(used)}); leave one of them")
        if not used and len(form) == 1:  # a state dict alone
            used, states = [part for part in parts if part not in others], {name: flat for name in form}
        around = {k: v for k, v in content.items() if k != wrapper} if wrapper else {}
        beside = {k: v for k, v in {**around, **parts}.items() if k not in (*used, ABOUT) and isinstance(k, str)}
        fits = sum(len(state.keys() & getattr(model, form[name]).state_dict()) for name, state in states.items())
        found.append(_Found(states, beside, fits))
    return max(found, key=lambda place: place.fits)


def _plain(name: str) -> str:
    """What published names, their variants and attributes have in common."""
    return name.lower().replace("_", "").removeprefix("didf").removeprefix("cddf")


def _tensors(state: dict[Any, Any]) -> StateDict:
    """The tensors of a state dict, without what a file may have set on them, under keys without additions."""
    tensors: StateDict = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            short = ".".join(part for part in key.split(".") if part not in _ADDED)
            tensors[key if short in tensors else short] = Tensor.detach(value)  # a key that is there twice is foreign
    return tensors


def _another_network(path: Path | str, content: dict[str, Any], model: nn.Module, absent: Iterable[str]) -> InputError:
    """The error for a file that lacks networks, with the system that it seems to be of."""
    places = [place for place in map(content.get, _WRAPPERS) if isinstance(place, dict)]
    parts = {part for place in (content, *places) for key in place if isinstance(key, str) for part in key.split(".")}
    own = {part for key in model.state_dict() for part in key.split(".")} | {*model.published_networks}
    system = next((_SIGNS[part] for part in _SIGNS if part in parts - own), None)
    advice = f"choose its system with --system {system}" if system else "name another file"
    held = _names(key for key in content if isinstance(key, str))
    return InputError(f"{path} is a file of another network: it holds {held}, not {_names(absent)}; {advice}")


def _checked(path: Path | str, name: str, state: StateDict, network: nn.Module) -> StateDict:
    """The tensors of a file in the types of the network, key for key."""
    wanted = network.state_dict()
    state = {k: v for k, v in state.items() if k.rpartition(".")[2] not in getattr(network, "computed", ())}
    missing, foreign = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    problems = [f"{len(missing)} keys are missing ({_names(missing)})"] if missing else []
    problems += [f"{len(foreign)} are foreign ({_names(foreign)})"] if foreign else []
    problems = problems or [f"{_names([k])} is {why}" for k in wanted if (why := _misfit(state[k], wanted[k]))][:1]
    if problems:
        raise InputError(f"{path}: {name} does not fit this network: {' and '.join(problems)}; name another file")
    return {key: state[key].to(value.dtype) for key, value in wanted.items()}


def _misfit(value: Tensor, wanted: Tensor) -> str:
    """Why a tensor of a file cannot be one of a network; empty where it can."""
    if type(value) is not Tensor or value.layout != torch.strided or value.is_meta or value.is_nested:
        return "sparse or of another kind without plain numbers"
    if value.shape != wanted.shape:
        return f"of shape {tuple(value.shape)} where {tuple(wanted.shape)} is expected"
    if value.dtype != wanted.dtype and not (value.is_floating_point() and wanted.is_floating_point()):
        return f"of type {value.dtype} where {wanted.dtype} is expected"
    return "" if value.to(wanted.dtype).isfinite().all() else "NaN or infinite in part"


def _stored(value: Tensor, name: str, half: bool) -> Tensor:
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


def _names(names: Iterable[str]) -> str:
    """Names for a message: the first few, printable and short, however long they are."""
    text = repr(listed((name[:60] for name in names), most=3))[1:-1]
    return text if len(text) <= 48 else text[:45] + "..."
