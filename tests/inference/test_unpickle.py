"""Files with pickled modules are read as data, and files that would run code are refused."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.common import InputError
from utils.inference.checkpoint import load_network, read_file, save_network
from utils.inference.unpickle import read_pickled_modules


@pytest.fixture
def foreign(monkeypatch) -> type[nn.Module]:
    """A network whose module cannot be imported when its file is read, as with published files."""
    module = types.ModuleType("Model.Foreign")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.LayerNorm([4, 2, 2]))
            self.register_buffer("size", torch.tensor([128, 256]))
            self.shape, self.scale, self.device = torch.Size([1, 2]), np.float64(0.5), torch.device("cpu")
            self.norm, self.where, self.seen = nn.LayerNorm, Path, {1, 2}
            self.more = [collections.OrderedDict(a=1), (2, b"3"), slice]

    Net.__module__, Net.__qualname__ = module.__name__, "Net"
    module.Net = Net
    monkeypatch.setitem(sys.modules, "Model", types.ModuleType("Model"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Net


def test_pickled_module_is_passed_over_and_its_weights_are_read(foreign, tmp_path, monkeypatch):
    model = foreign()
    path = tmp_path / "published.pth"
    torch.save({"model": model, "state_dict": model.state_dict(), "epoch": 50}, path)
    monkeypatch.delitem(sys.modules, "Model.Foreign")
    monkeypatch.delitem(sys.modules, "Model")
    with pytest.raises(InputError, match="could run code"):
        read_file(path)
    content = read_file(path, modules=True)
    assert list(content) == ["model", "state_dict", "epoch"] and content["epoch"] == 50
    assert not isinstance(content["model"], nn.Module) and not vars(type(content["model"])).get("forward")
    assert list(content["state_dict"]) == list(model.state_dict())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(content["state_dict"][key], value, rtol=0, atol=0)
    assert "Model" not in sys.modules and "Model.Foreign" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_type_and_view_of_a_storage_is_rebuilt(tmp_path, dtype):
    whole = (torch.arange(24) % 2 if dtype == torch.bool else torch.arange(24)).to(dtype).view(4, 6)
    views = {"whole": whole, "turned": whole.T, "part": whole[1:3, ::2], "one": whole[2, 3], "none": whole[:0]}
    torch.save({"state_dict": views, "parameter": nn.Parameter(torch.rand(3))}, tmp_path / "a.pth")
    content = read_pickled_modules(tmp_path / "a.pth")
    for name, value in views.items():
        assert torch.equal(content["state_dict"][name], value) and content["state_dict"][name].dtype == dtype
    content["state_dict"]["whole"].zero_()
    assert torch.equal(content["state_dict"]["turned"], whole.T)  # no memory is shared
    assert content["parameter"].shape == (3,)


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
    "nested": lambda: [{"a": (1, Calls(os.mkdir, "hostile-code-ran"))}],
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["model", "state_dict", "key"])
def test_hostile_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, kind, place):
    monkeypatch.chdir(tmp_path)
    hostile = HOSTILE[kind]()
    content = {"model": None, "state_dict": {"weight": torch.zeros(2)}}
    if place == "key":
        content["state_dict"]["more"] = hostile
    else:
        content[place] = hostile
    torch.save(content, "hostile.pth")
    with pytest.raises(InputError, match="asks to call .*could run code") as error:
        read_file("hostile.pth", modules=True)
    assert "\n" not in str(error.value)
    assert os.listdir() == ["hostile.pth"] and "antigravity" not in sys.modules


def archive(path: Path, pickled: bytes, *, storages: dict[str, bytes] | None = None, compress: bool = False) -> Path:
    """A file of torch.save by hand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
        file.writestr("a/data.pkl", pickled)
        file.writestr("a/version", "3\n")
        for name, data in (storages or {}).items():
            file.writestr(f"a/data/{name}", data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


# By hand: what no pickler writes. Each is (pickle, part of the message).
STORAGE = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")  # and a count, "tQ"
BY_HAND = {
    # The old way to make an object of a class: module and name in the opcode.
    "instance": (b"\x80\x02(" + text("hostile-code-ran") + b"i" + b"os\nmkdir\n" + b".", "asks to call os.mkdir"),
    "object": (b"\x80\x02(" + named("os", "mkdir") + text("hostile-code-ran") + b"o.", "asks to call os.mkdir"),
    # Attributes set on what the file may call: (None, {"_function": ...}) is state for slots.
    "set_builder": (
        b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("_function")
        + named("os", "mkdir") + b"s\x86b.", "sets _function",
    ),
    "set_class": (
        b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"N}" + text("__class__")
        + named("os", "mkdir") + b"s\x86b.", "sets __class__",
    ),
    "huge_view": (  # one number that claims to be 10^12
        b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE + b"K\x01tQK\x00"
        + b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85K\x00\x85\x89}tR.", "a tensor of",
    ),
    "outside": (
        b"\x80\x02" + named("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE + b"K\x01tQK\x07"
        + b"K\x01\x85K\x01\x85\x89}tR.", "damaged",
    ),
    "wrong_count": (b"\x80\x02" + STORAGE + b"K\x09tQ.", "in place of 9"),
    "no_storage": (b"\x80\x02(" + text("file") + text("x") + text("0") + text("cpu") + b"K\x01tQ.", "a storage"),
    "escape": (
        b"\x80\x02(" + text("storage") + named("torch", "FloatStorage") + text("../../data.pkl") + text("cpu")
        + b"K\x01tQ.", "damaged",
    ),
    "huge_memo": (b"\x80\x02}r\xff\xff\xff\xff.", "a memo larger"),
    "no_dict": (b"\x80\x02K\x01.", "holds a int"),
    "cut_off": (b"\x80\x02}", "damaged"),
    "buffer": (b"\x80\x05\x97.", "damaged"),
    "extension": (b"\x80\x02\x82\x01.", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_HAND)
def test_pickle_by_hand_is_refused_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    pickled, message = BY_HAND[kind]
    path = archive(tmp_path / "a.pth", pickled, storages={"0": struct.pack("<f", 1)})
    with pytest.raises(InputError, match=message) as error:
        read_pickled_modules(path)
    assert "\n" not in str(error.value)
    assert os.listdir() == ["a.pth"]


def test_by_hand_files_are_right_but_for_what_they_test(tmp_path):
    tensor = (
        b"\x80\x02}" + text("t") + named("torch._utils", "_rebuild_tensor_v2") + b"(" + STORAGE + b"K\x01tQK\x00"
        + b"K\x01\x85K\x01\x85\x89}tRs."
    )  # fmt: skip
    path = archive(tmp_path / "a.pth", tensor, storages={"0": struct.pack("<f", 1)})
    assert read_pickled_modules(path)["t"].tolist() == [1]
    assert torch.load(path, weights_only=True)["t"].tolist() == [1]


def test_what_a_file_sets_on_a_stand_in_does_not_outlive_it(tmp_path):
    sets = b"\x80\x02}" + text("x") + named("any", "Thing") + b")\x81}" + text("mark") + b"K\x01sbs."
    first = read_pickled_modules(archive(tmp_path / "a.pth", sets))["x"]
    again = read_pickled_modules(archive(tmp_path / "a.pth", sets))["x"]
    assert type(first) is not type(again) and not hasattr(first, "mark")


def test_other_archives_are_refused(tmp_path):
    simple = pickle.dumps({}, 2)
    with pytest.raises(InputError, match="compressed"):  # what could grow a thousandfold
        read_pickled_modules(archive(tmp_path / "a.pth", simple, compress=True))
    archive(tmp_path / "a.pth", simple)
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as file:
        file.writestr("a/constants.pkl", simple)  # TorchScript
    with pytest.raises(InputError, match="not a file of torch.save"):
        read_pickled_modules(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as file:
        file.writestr("a/other", simple)
    with pytest.raises(InputError, match="not a file of torch.save"):
        read_pickled_modules(tmp_path / "b.pth")
    archive(tmp_path / "c.pth", simple)
    with zipfile.ZipFile(tmp_path / "c.pth", "a") as file:
        file.writestr("a/byteorder", "big")
    with pytest.raises(InputError, match="big-endian"):
        read_pickled_modules(tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"text")
    with pytest.raises(InputError, match="damaged"):
        read_pickled_modules(tmp_path / "d.pth")


# ---------------------------------------------------------------------------------------------------------
# Files of one network
# ---------------------------------------------------------------------------------------------------------


def networks() -> dict[str, nn.Module]:
    return {"small": nn.Linear(2, 3), "large": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))}


def test_file_of_one_network_finds_its_network(tmp_path):
    made, other = networks(), networks()
    save_network(tmp_path / "a.pth", made["large"], {"task": "ivf"})
    before = {key: value.clone() for key, value in other["small"].state_dict().items()}
    assert load_network(tmp_path / "a.pth", other) == ("large", {"task": "ivf"})
    for key, value in made["large"].state_dict().items():
        assert torch.equal(other["large"].state_dict()[key], value)
    assert all(torch.equal(value, before[key]) for key, value in other["small"].state_dict().items())
    save_network(tmp_path / "half.pth", made["small"], half=True)
    assert torch.load(tmp_path / "half.pth")["state_dict"]["weight"].dtype == torch.float16
    assert load_network(tmp_path / "half.pth", other) == ("small", {})


def test_computed_tensors_may_be_there_or_not(tmp_path):
    state = {f"module.{key}": value for key, value in networks()["small"].state_dict().items()}
    torch.save({"state_dict": {**state, "module.blocks.1.mask": torch.zeros(9)}}, tmp_path / "a.pth")
    assert load_network(tmp_path / "a.pth", networks(), computed=("mask",))[0] == "small"
    with pytest.raises(InputError, match=r"1 are foreign \(blocks.1.mask\)"):
        load_network(tmp_path / "a.pth", networks())


@pytest.mark.parametrize("content", [{}, {"state_dict": 1}, {"state_dict": {1: torch.zeros(1)}}, {"DIDF_Encoder": {}}])
def test_file_of_another_kind_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match="no dict of tensors called state_dict"):
        load_network(tmp_path / "a.pth", networks())
