"""Files of weights: every form that is about loads, and whatever is bad is refused and changes nothing."""

from __future__ import annotations

import argparse
import collections
import io
import os
import random
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import net
from utils.common import InputError
from utils.inference.checkpoint import load_checkpoint, load_fitting, read_file, save_checkpoint
from zoo import find_system
from zoo.fsidfusion import FSIDFusion


@pytest.fixture(scope="module")
def model() -> net.CDDFuse:
    torch.manual_seed(1)
    return net.CDDFuse()


class Small(nn.Module):
    """A model of two networks, quickly read and written."""

    published_networks = {"DIDF_Encoder": "encoder", "BaseFuseLayer": "base_fusion"}

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.base_fusion = nn.Linear(3, 2)


def published(model: nn.Module, prefix: str = "module.") -> dict[str, dict[str, Tensor]]:
    """What the published code saves."""
    return {
        name: {prefix + key: value.clone() for key, value in getattr(model, part).state_dict().items()}
        for name, part in model.published_networks.items()
    }


def saved(content: object, folder: Path, **options: bool) -> Path:
    torch.save(content, folder / "weights.pth", **options)
    return folder / "weights.pth"


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- Files that load ----------------------------------------------------------------------------------------


def renamed(content: dict, names: dict[str, str]) -> dict:
    return {names.get(name, name): state for name, state in content.items()}


FORMS = {
    "published": lambda model: published(model),
    "no_prefix": lambda model: published(model, ""),
    "compiled": lambda model: published(model, "_orig_mod.module."),
    "later_name": lambda model: renamed(published(model), {"DIDF_Encoder": "CDDF_Encoder"}),
    "short_name": lambda model: renamed(published(model), {"DIDF_Encoder": "Encoder"}),
    "attributes": lambda model: {part: getattr(model, part).state_dict() for part in ("encoder", "base_fusion")},
    "flat": lambda model: model.state_dict(),
    "parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled_parts": lambda model: {k.replace(".", "._orig_mod.", 1): v for k, v in model.state_dict().items()},
    "in_state_dict": lambda model: {"state_dict": published(model), "epoch": 3},
    "flat_in_model": lambda model: {"model": model.state_dict(), "optimizer": {"state": {}}},
    "double": lambda model: {
        k: {n: v.double() if v.ndim else v for n, v in s.items()} for k, s in published(model).items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_key_for_key(tmp_path, form):
    other = Small(1)
    assert load_checkpoint(saved(FORMS[form](Small()), tmp_path), other) == {}
    assert same(other, Small().state_dict())


def test_file_from_before_torch_1_6_loads(tmp_path):
    other = Small(1)
    load_checkpoint(saved(published(Small()), tmp_path, _use_new_zipfile_serialization=False), other)
    assert same(other, Small().state_dict())


def test_whatever_lies_beside_the_networks_is_left_out_and_named_in_one_line(tmp_path, capsys):
    beside = {
        "loss_history": [np.float64(0.5), np.arange(3)],
        "optimizer": torch.optim.Adam(Small().parameters()).state_dict(),
        "args": argparse.Namespace(out=Path("runs")),
        "meters": collections.defaultdict(list, loss=collections.deque([1.0])),
        "whole": nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU()),
        "epoch": 3,
    }
    other = Small(1)
    load_checkpoint(saved({**published(Small()), **beside, "about": {"task": "mif"}}, tmp_path), other)
    assert same(other, Small().state_dict())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "left out" in err and "args, epoch, loss_history and 3 more" in err
    load_checkpoint(saved({**published(Small()), "epoch": 3}, tmp_path), other)
    assert not capsys.readouterr().err  # as published files have it


def test_what_we_save_is_the_published_format(model, tmp_path):
    about = {"task": "mif", "steps": 3, "learning_rate": 1e-3}
    save_checkpoint(tmp_path / "new" / "weights.pth", model, about)
    content = torch.load(tmp_path / "new" / "weights.pth", weights_only=True)
    assert content.pop("about") == about
    wanted = published(model)
    assert list(content) == list(wanted)
    for name, state in wanted.items():
        assert list(content[name]) == list(state)  # the same keys in the same order
        assert all(value.dtype == torch.float32 for value in content[name].values())
    encoder = nn.DataParallel(net.Restormer_Encoder())  # as the published test scripts do
    encoder.load_state_dict(content["DIDF_Encoder"])
    other = net.CDDFuse()
    assert load_checkpoint(tmp_path / "new" / "weights.pth", other) == about
    assert same(other, model.state_dict())


def test_parts_that_fit_are_taken_from_a_file_of_another_system(model, tmp_path):
    save_checkpoint(tmp_path / "cddfuse.pth", model)
    other = FSIDFusion()
    before = {key: value.clone() for key, value in other.encoder.state_dict().items()}
    line = load_fitting(tmp_path / "cddfuse.pth", other)
    assert "47 of 47 tensors of DIDF_Decoder" in line and "0 of 44 tensors of SepcificFuseLayer" in line
    for key, value in model.decoder.state_dict().items():
        assert torch.equal(value, other.decoder.state_dict()[key])
    for key, value in other.encoder.state_dict().items():  # what both encoders hold: the shallow part
        assert torch.equal(value, model.encoder.state_dict().get(key, before[key]))
    with pytest.raises(InputError, match="holds nothing that fits"):
        load_fitting(saved({"DIDF_Encoder": {"weight": torch.ones(1)}}, tmp_path), other)


# --- Files that do not --------------------------------------------------------------------------------------


def changed(**tensors: Tensor | int | None) -> dict:
    """A published file with other tensors in its BaseFuseLayer; None leaves one out."""
    content = published(Small(), "")
    state = content["BaseFuseLayer"] | tensors
    return {**content, "BaseFuseLayer": {key: value for key, value in state.items() if value is not None}}


WEIGHT = torch.zeros(2, 3)
BAD = {
    "it is empty": b"",
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "not a PyTorch checkpoint": b"text",
    "holds a Tensor, not a dict": WEIGHT,
    "holds a torch.nn.modules.linear.Linear, not a dict": nn.Linear(1, 1),
    "another network: it holds nothing, not BaseFuseLayer, DIDF_Encoder": {},
    "it holds BaseFuseLayer, not DIDF_Encoder": {"BaseFuseLayer": published(Small())["BaseFuseLayer"]},
    "holds a network twice": {**published(Small()), "CDDF_Encoder": published(Small())["DIDF_Encoder"]},
    "to resume a training from": {**published(Small()), "settings": {}, "random": {}, "ema": []},
    r"1 keys are missing \(weight\)": changed(weight=None),
    r"1 keys are missing \(bias\)": changed(bias=3),
    r"1 are foreign \(extra\)": changed(extra=WEIGHT),
    r"1 are foreign \(module.weight\)": changed(**{"module.weight": WEIGHT}),
    r"of shape \(3, 2\) where \(2, 3\) is expected": changed(weight=WEIGHT.T),
    "of type torch.int32 where torch.float32": changed(weight=WEIGHT.int()),
    "weight is NaN or infinite": changed(weight=torch.full((2, 3), torch.nan)),
    "weight is sparse or": changed(weight=WEIGHT.to_sparse()),
    "weight is sparse or of": changed(weight=WEIGHT.to("meta")),
    r"1 are foreign \(kkkk": changed(**{"k" * 10**6: WEIGHT}),
    r"1 are foreign \(a\\nb\)": changed(**{"a\nb": WEIGHT}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_file_is_refused_in_one_line_and_changes_nothing(tmp_path, message):
    path = saved(BAD[message], tmp_path)
    if isinstance(BAD[message], bytes):
        path.write_bytes(BAD[message])
    other = Small(1)
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path, other)
    assert str(error.value).count(str(path)) == 1
    assert "\n" not in str(error.value) and len(str(error.value)) - len(str(path)) < 200
    assert same(other, Small(1).state_dict())


def test_missing_file_is_named_with_the_next_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python train.py"):
        read_file(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="but a folder"):
        read_file(tmp_path)


def test_every_bundled_file_is_recognised_by_every_other_system(tmp_path):
    for name in ("cddfuse", "fsidfusion", "mlfuse", "tsdm"):
        find_system(name)().save(tmp_path / f"{name}.pth")
    for name in ("cddfuse", "mlfuse"):
        for other in {"cddfuse", "fsidfusion", "mlfuse", "tsdm"} - {name}:
            with pytest.raises(InputError, match=f"another network.*--system {other}"):
                find_system(name)().load_published(tmp_path / f"{other}.pth")


def mutated(draw: random.Random, path: Path) -> None:
    """Writes a file of `Small` with one random change, of its content or of its bytes."""
    content = published(Small(), draw.choice(["", "module.", "_orig_mod."]))
    name = draw.choice(list(content))
    state = content[name]
    key = draw.choice(list(state))
    value = state[key]
    kind = draw.choice("key name value value lost extra beside whole wrap old packed cut flip flip tail".split())
    if kind == "key":
        state[draw.choice([key.upper(), key[1:], f"module.{key}", "k" * 5000, f"{key}\n"])] = state.pop(key)
    elif kind == "name":
        content[draw.choice([name.lower(), name[1:], "CDDF_Encoder", "Encoder", "base_fusion", ""])] = content.pop(name)
    elif kind == "value":
        tensors = [value[None], value.flatten()[:1], value.expand(2, *value.shape), value.to_sparse(), value.to("meta")]
        tensors += [value.double(), value.half(), value.bfloat16(), value.long(), value.bool(), value.cfloat()]
        state[key] = draw.choice([*tensors, nn.Parameter(value.float()), None, 0.5, "text", [value], nn.ReLU()])
    elif kind == "lost":
        del state[key]
    elif kind == "extra":
        state[draw.choice(["extra", "module.extra"])] = draw.choice([value, {}, 1])
    elif kind == "beside":
        content["extra"] = draw.choice([value, {}, 1, state, nn.ReLU(), np.float64(1)])
    elif kind == "whole":
        content = draw.choice([[content], (content,), value, "text", 3, {}, nn.Linear(1, 1), {3: content}, {(1, 2): 3}])
    elif kind == "wrap":
        content = {draw.choice(["model", "state_dict", "weights", name]): content, "epoch": 1}
    torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if kind in ("cut", "old"):  # old files have no check sums: what is flipped there cannot be seen
        data = data[: draw.choice([place, place, place, len(data)])]
    elif kind == "flip":
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "tail":
        data += draw.choice([bytes(data), bytes(place), b"PK\x05\x06"])
    path.write_bytes(data)
    if kind == "packed":
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for record in old.namelist():
                new.writestr(record, old.read(record))


def test_mutated_files_load_right_or_are_refused_and_change_nothing(tmp_path):
    draw, begin, counts = random.Random(0), time.monotonic(), collections.Counter()
    wanted, before = Small().state_dict(), Small(1).state_dict()
    for _ in range(400):
        mutated(draw, tmp_path / "weights.pth")
        other = Small(1)
        try:
            load_checkpoint(tmp_path / "weights.pth", other)
        except InputError as error:
            counts["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) - len(str(tmp_path)) < 220
            assert same(other, before)
        else:
            counts["loaded"] += 1
            for key, value in other.state_dict().items():  # in half precision where the file has it
                torch.testing.assert_close(value, wanted[key], rtol=2**-8, atol=0)
    print(f"\n{dict(counts)} of {counts.total()} mutated checkpoints in {time.monotonic() - begin:.1f} s")
    assert min(counts.values()) > 50


def test_failed_saving_keeps_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "weights.pth", Small())
    before = (tmp_path / "weights.pth").read_bytes()

    def full_disk(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says to a file size limit and to a full disk

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="is the disk full"):
        save_checkpoint(tmp_path / "weights.pth", Small())
    assert (tmp_path / "weights.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.pth"]  # no half file is left behind
