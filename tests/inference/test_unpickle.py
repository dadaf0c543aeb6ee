"""Files of strangers are read as data: pickled modules are passed over, and nothing that a file asks for is run."""

from __future__ import annotations

import os
import struct
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.common import InputError
from utils.inference.checkpoint import read_file


def test_pickled_module_is_passed_over_and_its_weights_are_read(tmp_path, monkeypatch):
    module = types.ModuleType("Model.Foreign")  # which cannot be imported when the file is read

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.LayerNorm([4, 2, 2]))
            self.register_buffer("size", torch.tensor([128, 256]))
            self.shape, self.device, self.norm, self.seen = torch.Size([1, 2]), torch.device("cpu"), nn.LayerNorm, {1}
            self.more = [frozenset("a"), (2, b"3"), slice(3), Path("a")]

    Net.__module__, Net.__qualname__, module.Net = module.__name__, "Net", Net
    with monkeypatch.context() as here:
        here.setitem(sys.modules, "Model", types.ModuleType("Model"))
        here.setitem(sys.modules, module.__name__, module)
        model = Net()
        torch.save({"model": model, "state_dict": model.state_dict(), "epoch": 50}, tmp_path / "a.pth")
    known = torch.serialization.get_safe_globals()
    content = read_file(tmp_path / "a.pth")
    assert list(content) == ["model", "state_dict", "epoch"] and content["epoch"] == 50
    assert not isinstance(content["model"], nn.Module) and not vars(content["model"])
    assert list(content["state_dict"]) == list(model.state_dict())
    assert all(torch.equal(content["state_dict"][key], value) for key, value in model.state_dict().items())
    assert "Model" not in sys.modules and set(torch.serialization.get_safe_globals()) == set(known)


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = {
    "mkdir": lambda: Calls(os.mkdir, "hostile-code-ran"),
    "system": lambda: Calls(os.system, "mkdir hostile-code-ran"),
    "eval": lambda: Calls(eval, "__import__('os').mkdir('hostile-code-ran')"),
    "import": lambda: Calls(__import__, "antigravity"),
    "getattr": lambda: Calls(getattr, dict, "get"),
    "load": lambda: Calls(torch.load, "other.pth"),
    "class": lambda: Calls(zipfile.ZipFile, "hostile-code-ran", "w"),
    "memory": lambda: Calls(bytearray, 10**11),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, kind, zipped):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"weight": torch.zeros(2)}, "more": [{"a": (1, HOSTILE[kind]())}]}
    torch.save(content, "hostile.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="only running code could rebuild") as error:
        read_file("hostile.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert os.listdir() == ["hostile.pth"] and "antigravity" not in sys.modules


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(storage: str = "0", count: int = 1, offset: int = 0, size: int = 1) -> bytes:
    """A dict {"t": a tensor of one axis}, as torch.save pickles it."""
    stored = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(storage) + text("cpu")
    numbers = [b"J" + struct.pack("<i", number) for number in (count, offset, size)]
    return (
        b"\x80\x02}" + text("t") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + numbers[0] + b"tQ" + numbers[1]
        + numbers[2] + b"\x85K\x01\x85\x89}tRs."
    )  # fmt: skip


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save by hand."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "data/0": struct.pack("<f", 1)}.items():
            file.writestr(f"a/{name}", data)
    return path


DOUBLED = b"".join(b"q\x01h\x01h\x01\x86" for _ in range(60))  # a tuple of itself twice, sixty times
BY_HAND = {
    "instance": b"\x80\x02(" + text("hostile-code-ran") + b"i" + b"os\nmkdir\n" + b".",
    "attribute": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + text("x") + b"cos\nmkdir\ns\x86b.",
    "nested_key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",  # hashing it would end the process
    "doubled_key": b"\x80\x02})" + DOUBLED + b"K\x01s.",  # hashing it would take centuries
    "nested_value": b"\x80\x02}K\x01" + b"](" * 100_000 + b"e" * 100_000 + b"s.",
    "protocol": b"\x80\x05}.",
    "huge_count": tensor(count=10**6, size=10**6),
    "huge_view": tensor(size=10**6),
    "outside": tensor(offset=7),
    "escape": tensor("../data.pkl"),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_pickle_by_hand_is_refused_at_once_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        read_file(archive(Path("a.pth"), BY_HAND[kind]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert os.listdir() == ["a.pth"] and time.monotonic() - begin < 5


def test_files_by_hand_are_right_but_for_what_they_test(tmp_path):
    assert read_file(archive(tmp_path / "a.pth", tensor()))["t"].tolist() == [1]


def test_other_archives_are_refused(tmp_path):
    packed = archive(tmp_path / "packed.pth", tensor() + bytes(10**8), zipfile.ZIP_DEFLATED)  # 100 MB in 100 kB
    data = bytearray(archive(tmp_path / "folder.pth", tensor()).read_bytes())
    attributes = data.rindex(b"PK\x01\x02") + 38  # of the last record: torch would read a folder as random numbers
    data[attributes] |= 16
    (tmp_path / "folder.pth").write_bytes(data)
    for path, message in ((packed, "compressed"), (tmp_path / "folder.pth", "marks are wrong")):
        with pytest.raises(InputError, match=message) as error:
            read_file(path)
        assert "\n" not in str(error.value) and len(str(error.value)) - len(str(path)) < 200
