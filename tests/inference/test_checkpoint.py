"""Published checkpoint files: every form that is about, and every way in which a file can be bad."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

import net
from utils.common import InputError
from utils.inference.checkpoint import load_checkpoint, load_fitting, read_file, save_checkpoint
from zoo.fsidfusion import FSIDFusion


@pytest.fixture(scope="module")
def model() -> net.CDDFuse:
    torch.manual_seed(1)
    return net.CDDFuse()


def published(model: net.CDDFuse, prefix: str = "module.", encoder: str = "DIDF") -> dict:
    """What the published code saves."""
    names = {name.replace("DIDF", encoder): part for name, part in model.published_networks.items()}
    return {
        name: {prefix + key: value.clone() for key, value in getattr(model, part).state_dict().items()}
        for name, part in names.items()
    }


def saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def assert_same(a: net.CDDFuse, b: net.CDDFuse) -> None:
    for key, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("encoder", ["DIDF", "CDDF"])
def test_every_published_form_loads_key_for_key(model, tmp_path, prefix, encoder):
    other = net.CDDFuse()
    assert load_checkpoint(saved(published(model, prefix, encoder), tmp_path), other) == {}
    assert_same(model, other)


def test_what_we_save_is_the_published_format(model, tmp_path):
    save_checkpoint(tmp_path / "weights.pth", model, {"task": "mif"})
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert content.pop("about") == {"task": "mif"}
    wanted = published(model)
    assert list(content) == list(wanted)
    for name, state in wanted.items():
        assert list(content[name]) == list(state)  # the same keys in the same order
        assert all(value.dtype == torch.float32 for value in content[name].values())


def test_code_written_for_the_published_file_loads_our_weights(model, tmp_path):
    save_checkpoint(tmp_path / "weights.pth", model, {"task": "ivf"})
    encoder = torch.nn.DataParallel(net.Restormer_Encoder())  # as the published test scripts do
    encoder.load_state_dict(torch.load(tmp_path / "weights.pth")["DIDF_Encoder"])
    torch.testing.assert_close(encoder.module.patch_embed.proj.weight, model.encoder.patch_embed.proj.weight)


def test_round_trip_keeps_what_is_said_about_the_weights(model, tmp_path):
    about = {"task": "mif", "steps": 3, "learning_rate": 1e-3}
    save_checkpoint(tmp_path / "new" / "weights.pth", model, about)
    other = net.CDDFuse()
    assert load_checkpoint(tmp_path / "new" / "weights.pth", other) == about
    assert_same(model, other)


def test_weights_in_double_precision_load_into_a_single_precision_model(model, tmp_path):
    content = {name: {k: v.double() for k, v in state.items()} for name, state in published(model).items()}
    other = net.CDDFuse()
    load_checkpoint(saved(content, tmp_path), other)
    assert_same(model, other)


def test_failed_saving_keeps_the_old_file(model, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "weights.pth", model)
    before = (tmp_path / "weights.pth").read_bytes()

    def full_disk(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says to a file size limit and to a full disk

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="is the disk full"):
        save_checkpoint(tmp_path / "weights.pth", model)
    assert (tmp_path / "weights.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["weights.pth"]  # no half file is left behind


def old_format(content: dict) -> bytes:
    """As torch saved before 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def test_old_file_format_loads(model, tmp_path):
    (tmp_path / "old.pth").write_bytes(old_format(published(model)))
    other = net.CDDFuse()
    load_checkpoint(tmp_path / "old.pth", other)
    assert_same(model, other)


class Hostile:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def bad_files(folder: Path, model: net.CDDFuse) -> dict[str, tuple[Path, str]]:
    """Kind of badness -> (file, part of the message)."""
    content = published(model)
    files: dict[str, tuple[Path, str]] = {}

    def add(kind: str, message: str, data: bytes | object) -> None:
        path = folder / f"{kind}.pth"
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            torch.save(data, path)
        files[kind] = path, message

    whole = saved(content, folder).read_bytes()
    add("empty", "is empty", b"")
    add("truncated", "truncated or damaged", whole[: len(whole) // 2])
    middle = len(whole) // 2
    add("flipped_bit", "truncated or damaged", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    add("old_format", "truncated or damaged", old_format(content)[:300])
    add("pointer", "git lfs pull", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4805887\n")
    add("text", "not a PyTorch checkpoint", b"<html>404 not found</html>")
    add("tensor", "holds a Tensor", torch.zeros(3))
    add("hostile", "could run code", {"DIDF_Encoder": Hostile()})
    add("other_network", "another network", {"generator": {}, "discriminator": {}})
    add("fewer_networks", "another network", {k: v for k, v in content.items() if k != "BaseFuseLayer"})
    add("twice", "another network", {**content, "CDDF_Encoder": content["DIDF_Encoder"]})
    add("to_resume", "to resume a training from", {"model": {}, "optimizer": {}})
    whole_numbers = {key: value.int() for key, value in content["BaseFuseLayer"].items()}
    add("not_real", "torch.int32 where torch.float32", {**content, "BaseFuseLayer": whole_numbers})
    add("not_text", "not a dict of tensors", {**content, "BaseFuseLayer": {1: torch.zeros(1)}})
    add("not_tensors", "not a dict of tensors", {**content, "BaseFuseLayer": {"a": 1}})
    fewer = {k: v for k, v in content["DIDF_Decoder"].items() if "output.2" not in k}
    add("missing_key", r"1 keys are missing \(output.2.weight\)", {**content, "DIDF_Decoder": fewer})
    more = {**content["DIDF_Decoder"], "module.extra.bias": torch.zeros(1)}
    add("foreign_key", r"1 are foreign \(extra.bias\)", {**content, "DIDF_Decoder": more})
    other_shape = {**content["DIDF_Decoder"], "module.output.2.weight": torch.zeros(3, 32, 3, 3)}
    add("wrong_shape", r"\(3, 32, 3, 3\) where \(1, 32, 3, 3\)", {**content, "DIDF_Decoder": other_shape})
    return files


KINDS = (
    "empty truncated flipped_bit old_format pointer text tensor hostile other_network fewer_networks twice to_resume "
    "not_real not_text not_tensors missing_key foreign_key wrong_shape"
).split()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_file_is_refused_in_one_line_and_changes_nothing(model, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path, message = bad_files(tmp_path, model)[kind]
    torch.manual_seed(2)
    other = net.CDDFuse()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path, other)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert not Path("hostile-code-ran").exists()


def test_bad_file_test_covers_every_kind(model, tmp_path):
    assert list(bad_files(tmp_path, model)) == KINDS


def test_missing_file_is_named_with_the_next_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python train.py"):
        read_file(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="but a folder"):
        read_file(tmp_path)


def test_saving_through_a_link_keeps_the_link(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "weights.pth").symlink_to(tmp_path / "disk" / "weights.pth")
    save_checkpoint(tmp_path / "weights.pth", model)
    assert (tmp_path / "weights.pth").is_symlink() and (tmp_path / "disk" / "weights.pth").is_file()


def test_published_style_file_at_hand_loads(fusion_data):
    path = fusion_data.parent / "golden" / "cddfuse_random.pth"
    if not path.is_file():
        pytest.skip(f"no file at {path}")
    assert load_checkpoint(path, net.CDDFuse()) == {}


def test_parts_that_fit_are_taken_from_a_file_of_another_system(model, tmp_path):
    save_checkpoint(tmp_path / "cddfuse.pth", model)
    other = FSIDFusion()
    before = {key: value.clone() for key, value in other.encoder.state_dict().items()}
    line = load_fitting(tmp_path / "cddfuse.pth", other)
    assert "DIDF_Decoder 47" in line and "SepcificFuseLayer 0" in line
    for key, value in model.decoder.state_dict().items():
        assert torch.equal(value, other.decoder.state_dict()[key])
    for key, value in other.encoder.state_dict().items():  # what both encoders hold: the shallow part
        assert torch.equal(value, model.encoder.state_dict().get(key, before[key]))
    torch.save({"DIDF_Encoder": {"weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="nothing of that fits"):
        load_fitting(tmp_path / "other.pth", other)
