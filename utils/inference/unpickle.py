"""Tensors out of files that hold pickled modules, without running anything that is in them.

Some published checkpoints hold a whole pickled `nn.Module` beside its weights. Rebuilding it means importing and
calling whatever the file names, which `torch.load` rightly refuses. Here the same file is read as data: what it
names becomes an inert stand-in, tensors are built from their bytes by the few lines below, and a file that asks
for a call of anything else is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from utils.common import InputError

# Type of storage in a file -> type of its numbers.
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What pickled modules call besides, for parts that hold no weights. It is stood in for, never called.
_STOOD_IN_FOR = {
    "__builtin__": ("set", "frozenset"),
    "builtins": ("set", "frozenset", "bytearray"),
    "_codecs": ("encode",),  # how the protocol of torch.save writes bytes
    "torch": ("Size", "device"),
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
}


def read_pickled_modules(path: Path | str) -> dict[str, Any]:
    """The tensors and plain values of a file that may hold pickled modules too; nothing in it is run.

    Args:
        path: a file that `torch.save` of torch 1.6 or later wrote.

    Returns:
        The dict in the file. Modules and all other objects in it are stand-ins without content.

    Raises:
        InputError: the file asks for a call, is of another format, holds no dict, or is damaged.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if PurePosixPath(name).name == "data.pkl"]
            if len(pickles) != 1 or any(PurePosixPath(name).name == "constants.pkl" for name in records):
                raise InputError(f"{path} is not a file of torch.save; name the right file with --weights")
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                raise InputError(f"{path} is compressed, which torch.save does not do; name the right file")
            root = pickles[0].removesuffix("data.pkl")
            order = archive.read(root + "byteorder") if root + "byteorder" in records else b"little"
            if order != b"little":
                raise InputError(f"{path} was written on a big-endian machine; save it again on another")
            content = _Reader(archive, root, path).load()
    except InputError:
        raise
    except Exception as error:  # bytes that are made to confuse may raise anything
        raise InputError(f"{path} is damaged or no file of torch.save ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dict; name the right file with --weights")
    return content


class _Reader(pickle.Unpickler):
    """Reads the pickle of an archive. Every class that the file gets to see is made for this one reading, so that
    nothing which a file sets on them outlives it."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        data = archive.read(f"{root}data.pkl")
        # The memo is an array as long as its highest number, which a few bytes could put at four billion.
        if any("PUT" in code.name and argument > len(data) for code, argument, _ in pickletools.genops(data)):
            raise ValueError("a memo larger than the pickle")
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.archive, self.root, self.path = archive, root, path
        self.storages: dict[str, Tensor] = {}
        self.stand_ins: dict[tuple[str, str], type] = {}
        self.builders = {
            ("collections", "OrderedDict"): _dict_class(),
            ("torch._utils", "_rebuild_tensor_v2"): _Builder(_tensor),
            ("torch._utils", "_rebuild_parameter"): _Builder(_parameter),
        }

    def find_class(self, module: str, name: str) -> Any:
        """Instead of what the file names, which is not imported: a builder of tensors, or a stand-in."""
        key = module, name
        if key in self.builders:
            return self.builders[key]
        if key not in self.stand_ins:
            callable_ = name in _STOOD_IN_FOR.get(module, ())
            self.stand_ins[key] = _stand_in(self.path, f"{module}.{name}", callable_)
        return self.stand_ins[key]

    def persistent_load(self, key: Any) -> Tensor:
        kind, storage, name, _, count = key
        if kind != "storage" or not isinstance(name, str) or not isinstance(count, int):
            raise ValueError(f"a storage {key!r}")
        if name not in self.storages:
            dtype = _DTYPES[storage.__qualname__.removeprefix("torch.")]
            data = bytearray(self.archive.read(f"{self.root}data/{name}"))
            values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if len(values) != count:
                raise ValueError(f"storage {name} has {len(values)} numbers in place of {count}")
            self.storages[name] = values
        return self.storages[name]


class _Builder:
    """A function that a file may call. Without attributes, so that a file can set none."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"sets {name} of a function")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    # With strides of 0 a few bytes could claim to be any number of values.
    if type(storage) is not Tensor or math.prod(size) > len(storage):
        raise ValueError(f"a tensor of {size}")
    return storage.as_strided(size, stride, offset).clone()


def _parameter(data: Tensor, *rest: Any) -> Tensor:
    return data


def _dict_class() -> type:
    class Dict(dict):
        __slots__ = ()

        def __setstate__(self, state: object) -> None:
            """Attributes of a dict, such as the versions of modules in a state dict, are left out."""

    return Dict


def _stand_in(path: Path, full_name: str, callable_: bool) -> type:
    """A class without content that takes anything and does nothing; it is refused to be called, as a function
    would be, unless `callable_`. (Unpickling makes objects of classes by `__new__`, without a call.)"""

    class Meta(type):
        def __call__(cls, *args: Any, **options: Any) -> Any:
            if not callable_:
                raise InputError(
                    f"{path} asks to call {full_name}, which could run code; it was not loaded. "
                    "Save its state_dict() with torch.save where it was made"
                )
            return cls.__new__(cls)

    class StandIn(metaclass=Meta):
        def __new__(cls, *args: Any, **options: Any) -> Any:
            return object.__new__(cls)

        def __setstate__(self, state: object) -> None:
            """Whatever the object held is dropped."""

        def __setitem__(self, key: object, value: object) -> None:
            """As above."""

        def append(self, value: object) -> None:
            """As above."""

        def extend(self, values: object) -> None:
            """As above."""

    StandIn.__qualname__ = full_name
    return StandIn
