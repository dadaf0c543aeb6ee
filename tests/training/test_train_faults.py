"""train.py where something goes wrong: nothing is lost, and what is said is true."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from utils.common import ROOT
from utils.data.patches import random_batches
from utils.inference.checkpoint import read_file
from utils.training import loop, run_state


def run(patch_file, out, *options, epochs=(1, 1)):
    argv = ["--data", str(patch_file), "--out", str(out), "--device", "cpu", "--recipe", "published"]
    argv += ["--batch-size", "4", "--validate-every", "0"]
    argv += ["--stage1-epochs", str(epochs[0]), "--stage2-epochs", str(epochs[1]), *options]
    return train.main(argv)


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


def test_forced_weight_decay_is_trained_with(patch_file, tmp_path, monkeypatch):
    assert run(patch_file, tmp_path / "run", epochs=(1, 1)) == 0
    used = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *args: (used.append({g["weight_decay"] for g in self.param_groups}), step(self, *args))[1],
    )  # fmt: skip
    options = ("--resume", "auto", "--force", "--weight-decay", "0.5")
    assert run(patch_file, tmp_path / "run", *options, epochs=(1, 2)) == 0
    assert used and all(values == {0.5} for values in used)


def test_full_disk_at_a_validation_is_a_warning(patch_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "write_image", fail_with(OSError(28, "No space left on device")))
    assert run(patch_file, tmp_path / "run", "--validate-every", "1") == 0
    assert "No space left on device; training goes on" in capsys.readouterr().err


def test_best_weights_are_those_of_the_last_stage_that_has_epochs(patch_file, tmp_path):
    assert run(patch_file, tmp_path / "run", "--validate-every", "1", epochs=(2, 0)) == 0
    assert (tmp_path / "run" / "CDDFuse_IVF_best.pth").exists()
    # Gone on with elsewhere, the best weights are to be found there.
    options = ("--resume", str(tmp_path / "run" / "last.pt"), "--force", "--validate-every", "1")
    assert run(patch_file, tmp_path / "other", *options, epochs=(3, 0)) == 0
    assert (tmp_path / "other" / "CDDFuse_IVF_best.pth").exists()


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
