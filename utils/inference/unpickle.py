"""`torch.load` for files of strangers: nothing in a file is run, and what no honest file holds is refused first.

Some published checkpoints hold a pickled `nn.Module` or numbers of numpy beside the weights. `weights_only=True`
refuses every class that torch does not know. Here each of them has an inert stand-in, and the tensors are read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import threading
import zipfile
from typing import Any, BinaryIO

import torch

ZIP_START = b"PK\x03\x04"
_MOST_NESTED = 10_000  # hashing nested tuples recurses without a limit, and ends the process at about 100 000
# What honest files call for values that are no weights. All other calls are refused, though no call reaches anything.
_HARMLESS = ("numpy.", "collections.", "pathlib.", "datetime.", "functools.", "builtins.frozenset", "builtins.slice")
_CONTAINERS = {"collections.defaultdict": lambda *args: {}, "collections.deque": lambda *args: []}
_LOCK = threading.Lock()  # torch has one list of safe classes for all threads


class _Refusing(type):
    """A class that may have objects, which unpickling makes by `__new__`, but is not called."""

    def __call__(cls, *args: Any) -> Any:
        raise pickle.UnpicklingError(f"asks to call {cls.__name__}")


def _stand_in(name: str) -> Any:
    kind = type if name.startswith(_HARMLESS) else _Refusing
    inert = {"__new__": lambda cls, *args: object.__new__(cls), "__setstate__": lambda self, state: None}
    return _CONTAINERS.get(name) or kind(name, (), inert)


def load_data(file: BinaryIO, size: int, map_location: str | torch.device = "cpu") -> Any:
    """What torch.save has written to a file of `size` bytes; all but data is replaced by objects without content.

    Raises:
        pickle.UnpicklingError: it asks for a call.
        Exception: anything else, where bytes are damaged or torch.save has not written them in this way.
    """
    names: list[str] = []
    if file.read(4) == ZIP_START:  # as torch decides
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            if packed or sum(record.file_size for record in records) > size:  # a few bytes could grow to gigabytes
                raise ValueError("it is compressed, which torch.save never does")
            # torch does not look at check sums, and leaves memory as it is for a record that is marked as a folder.
            if archive.testzip() or any(record.external_attr & 16 for record in records):
                raise ValueError("its check sums or marks are wrong")
            for record in records:
                if record.filename.endswith("data.pkl"):
                    _check_nesting(io.BytesIO(archive.read(record)))
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    else:  # as before torch 1.6: a header of three pickles, the content, the names of the storages
        file.seek(0)
        for _ in range(5):
            _check_nesting(file)
    file.seek(0)
    with _LOCK, torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
        return torch.load(file, map_location=map_location, weights_only=True)


def _check_nesting(pickled: BinaryIO) -> None:
    """Follows a pickle with what each value on the stack costs to hash: a tuple, the sum of its items."""
    stack: list[Any] = []
    memo: dict[Any, int] = {}
    for code, argument, _ in pickletools.genops(pickled):
        if code.name == "PROTO" and argument != 2:
            raise ValueError(f"its pickle protocol is {argument}, that of torch.save is 2")
        if code.name == "GLOBAL" and argument.endswith(" bytearray"):  # of any size, in ten bytes
            raise pickle.UnpicklingError("asks to call bytearray")
        if code.name.endswith("GET"):
            stack.append(memo[argument])
        elif code.name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif code.name == "MARK":
            stack.append(None)
        else:
            taken = []
            for kind in reversed(code.stack_before):
                if kind is pickletools.stackslice:  # everything down to the mark
                    taken += iter(stack.pop, None)
                elif kind is not pickletools.markobject:
                    taken.append(stack.pop())
            cost = 1 + (sum(taken) if code.name.startswith("TUPLE") else max(taken, default=0))
            if cost > _MOST_NESTED:
                raise ValueError("it is nested too deeply")
            stack += [cost] * len(code.stack_after)
