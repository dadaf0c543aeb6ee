"""train.py where something goes wrong: nothing is lost, and what is said is true."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from tests.training.test_train import run
from utils.common import ROOT
from utils.data.patches import PatchWriter, random_batches
from utils.inference.checkpoint import read_file, save_file
from utils.training import loop, run_state
from zoo.cddfuse import CDDFuseSystem


def fail_with(error):
    def fails(*args, **options):
        raise error

    return fails


def test_fallback_to_the_checkpoint_before_keeps_it_until_a_new_one_is_whole(patch_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert run(patch_file, out, "--save-every-minutes", "0", epochs=(1, 2)) == 0
    whole = (out / "previous.pt").read_bytes()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_file", fail_with(OSError(28, "No space left on device")))
        assert run(patch_file, out, "--resume", "auto", epochs=(1, 2)) == 2
    assert (out / "previous.pt").read_bytes() == whole and (out / "last.pt.damaged").stat().st_size == 1000
    assert run(patch_file, out, "--resume", "auto", epochs=(1, 2)) == 0


def test_full_disk_at_a_validation_is_a_warning(patch_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "write_image", fail_with(OSError(28, "No space left on device")))
    assert run(patch_file, tmp_path / "run", "--validate-every", "1") == 0
    assert "No space left on device; training goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "begun_again"), [("--ssim-weight", "500", True), ("--learning-rate", "1e-5", False)]
)
def test_best_weights_are_not_compared_with_those_of_another_loss(option, value, begun_again, patch_file, tmp_path):
    assert run(patch_file, tmp_path / "run", "--validate-every", "1", epochs=(2, 0)) == 0
    best = tmp_path / "run" / "CDDFuse_IVF_best.pth"
    lowest = read_file(best)["about"]["validation_loss"]
    options = ("--resume", "auto", "--force", "--validate-every", "1", option, value)
    assert run(patch_file, tmp_path / "run", *options, epochs=(3, 0)) == 0
    assert (read_file(best)["about"]["validation_loss"] > lowest) == begun_again


@pytest.mark.parametrize("options", [[], ["--resume", "auto"]])
def test_folder_of_a_run_is_closed_to_others_until_it_has_ended(options, patch_file, tmp_path, monkeypatch, capsys):
    out, others = tmp_path / "run", []
    step = loop.Run.train_step

    def beside(self, *args):
        others.append(run(patch_file, out, *options))
        step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "train_step", beside)
        assert run(patch_file, out, "--max-minutes", "1e-6") == train.EXIT_UNFINISHED
    assert others == [2]
    assert f"another process writes to {out}" in capsys.readouterr().err
    assert run(patch_file, out, "--resume", "auto") == 0


def test_signals_that_come_together_are_one(monkeypatch, capsys):
    with loop.Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_asked() and stop.why == "SIGTERM"
        monkeypatch.setattr(stop, "since", stop.since - 1.01 * stop.TOGETHER_S)
        os.kill(os.getpid(), signal.SIGTERM)  # clusters repeat themselves
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_reader_that_has_gone_costs_no_step(patch_file, tmp_path):
    argv = [sys.executable, str(ROOT / "train.py"), "--data", str(patch_file), "--out", str(tmp_path / "run")]
    argv += ["--device", "cpu", "--recipe", "published", "--batch-size", "4", "--stage1-epochs", "1"]
    argv += ["--stage2-epochs", "1", "--max-minutes", "0.0001"]
    reading, writing = os.pipe()
    process = subprocess.Popen(argv, stdout=writing, stderr=writing)
    os.close(writing)
    os.read(reading, 10)  # its first words; then nobody listens any more
    os.close(reading)
    assert process.wait(timeout=240) == 75
    assert (tmp_path / "run" / "last.pt").exists()


def test_stop_is_obeyed_between_two_looks(patch_file, tmp_path, monkeypatch):
    monkeypatch.setitem(loop.STEPS_BETWEEN_LOOKS, "cpu", 25)  # as on CUDA
    step = loop.Run.train_step

    def ask_in_step_two(self, *args):
        step(self, *args)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "train_step", ask_in_step_two)
    assert run(patch_file, tmp_path / "run", "--epoch-batches", "6") == 75
    assert read_file(tmp_path / "run" / "last.pt")["step"] == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A patch file, a run that was stopped after its second checkpoint, and what last.pt then holds."""
    folder = tmp_path_factory.mktemp("saved")
    with PatchWriter(folder / "patches.h5", 16) as writer:
        writer.add(*np.random.default_rng(0).uniform(0, 255, (2, 6, 16, 16)))
    common = ("--optimizer", "muon", "--ema", "0.5", "--save-every-minutes", "0")
    for more in ((), ("--resume", "auto")):
        assert run(folder / "patches.h5", folder / "run", *common, "--max-minutes", "1e-6", *more) == 75
    return folder / "patches.h5", folder / "run", common


DAMAGES = {
    "a counter": lambda x: x.update(step="2"),
    "an epoch that was not": lambda x: x.update(epoch=7),
    "sums": lambda x: x.update(sums={"": float("nan")}),
    "settings": lambda x: x.update(settings=[1]),
    "no commit": lambda x: x.update(about={}),
    "a missing weight": lambda x: x["model"].popitem(),
    "the type of a weight": lambda x: x["model"].update({k: v.double() for k, v in x["model"].items()}),
    "the shape of a mean": lambda x: x["optimizer"]["adam"]["state"][0].update(exp_avg=torch.zeros(1)),
    "the type of a mean": lambda x: x["optimizer"]["muon"]["state"][0].update(momentum_buffer="far"),
    "another optimiser": lambda x: x.update(optimizer={"state": {}}),
    "an average": lambda x: x.update(ema=x["ema"][:-1]),
    "random numbers": lambda x: x.update(random={"cpu": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_checkpoint_with_anything_wrong_in_it_is_passed_over_in_one_line(damage, saved, tmp_path, capsys):
    patches, made, common = saved
    out = tmp_path / "run"
    out.mkdir()
    content = read_file(made / "last.pt")
    damage(content)
    save_file(out / "last.pt", content)
    (out / "previous.pt").write_bytes((made / "previous.pt").read_bytes())
    assert run(patches, out, *common, "--resume", "auto", "--max-minutes", "1e-6") == 75
    warning, *others = capsys.readouterr().err.strip().splitlines()
    assert str(out / "last.pt") in warning and f"Going on with {out / 'previous.pt'}" in warning
    assert len(others) == 1 and "stopped by --max-minutes" in others[0]


def test_checkpoint_under_former_names_of_options_is_gone_on_with(saved, tmp_path):
    patches, made, common = saved
    content = read_file(made / "last.pt")
    content["settings"]["patches_digest"] = content["settings"].pop("patches_hash")
    save_file(tmp_path / "last.pt", content)
    assert run(patches, tmp_path, *common, "--resume", "auto", "--max-minutes", "1e-6") == 75


def test_weights_come_before_the_large_checkpoint(patch_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run_state, "save_file", fail_with(OSError(28, "No space left on device")))
        assert run(patch_file, tmp_path / "run") == 2
    assert (tmp_path / "run/CDDFuse_IVF.pth").exists() and not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("is_kept", [True, False])
def test_loss_that_is_not_finite_is_told_with_what_there_is(is_kept, tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).uniform(0, 255, (2, 4, 16, 16))
    images[0, 1] = images[1, 3] = 7
    with PatchWriter(tmp_path / "p.h5", 16) as writer:
        writer.add(*images)
    forward, calls = loop.PassLosses.forward, []

    def breaks(self, given):
        calls.append(1)
        return {"total": forward(self, given)["total"] * (1 if is_kept and len(calls) == 1 else float("nan"))}

    monkeypatch.setattr(loop.PassLosses, "forward", breaks)
    assert run(tmp_path / "p.h5", tmp_path / "run", "--save-every-minutes", "0") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "total nan" in error and "2 of the 4 patches of this step are constant" in error
    assert (f"{tmp_path / 'run/last.pt'} is kept" in error) == is_kept == (tmp_path / "run/last.pt").exists()


def test_parts_of_other_weights_are_taken_and_named(patch_file, tmp_path, capsys):
    save_file(tmp_path / "half.pth", {"encoder": CDDFuseSystem().encoder.state_dict(), "note": "x"})
    stop = ("--init-partial", str(tmp_path / "half.pth"), "--max-minutes", "1e-6")
    assert run(patch_file, tmp_path / "run", *stop) == 75
    printed = capsys.readouterr().out
    assert "tensors of DIDF_Encoder" in printed and "0 of" in printed.split("DIDF_Encoder")[1]


@pytest.mark.slow
def test_step_is_compiled_as_one_graph(patch_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    assert run(patch_file, tmp_path / "run", "--compile", "--epoch-batches", "1") == 0


class Oblong:
    """What `random_batches` takes of a dataset, with patches that are not square."""

    def __init__(self):
        self.vis = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
        self.ir, self.ir_saliency = self.vis, None

    def __len__(self):
        return 3


def test_patches_that_are_not_square_are_flipped_only():
    dataset = Oblong()
    batches = list(random_batches(dataset, 3, (0,), flips=True, batches=4))
    assert {tuple(batch.vis.shape) for batch in batches} == {(3, 1, 4, 6)}
    whole = {tuple(sorted(patch.flatten().tolist())) for patch in dataset.vis}
    for batch in batches:
        assert {tuple(sorted((patch * 255).round().int().flatten().tolist())) for patch in batch.vis} == whole
