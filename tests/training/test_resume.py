"""A training survives whatever ends it: kills, signals, limits of time, damaged files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import zoo
from tests.training.test_extending import names_of
from utils.data.patches import PatchWriter
from utils.inference.checkpoint import read_file
from utils.training import loop
from utils.training.loop import Run, Stop
from utils.training.monitor import open_curves

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture
def patch_file(tmp_path):
    y, x = np.mgrid[:48, :48]
    waves = 127 + 100 * np.sin(0.5 * x + 0.3 * y + np.arange(6)[:, None, None])
    with PatchWriter(tmp_path / "patches.h5", 48) as writer:
        writer.add(waves, 255 - waves)
        writer.add_validation("one.png", waves[0], 255 - waves[1])
    return tmp_path / "patches.h5"


def arguments(patch_file, out, *options):
    return ["--data", str(patch_file), "--out", str(out), "--device", "cpu", "--crop", "8", "--flips", "--ema", "0.9",
            "--batch-size", "2", "--stage1-epochs", "2", "--stage2-epochs", "2", "--epoch-batches", "6",
            "--recipe", "published", "--validate-every", "0", *options]  # fmt: skip


def trained(out):
    """All tensors in the last files of a run, and the losses of every epoch."""
    saved = {path.name: read_file(path) for path in (out / "last.pt", *out.glob("*.pth"))}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return tensors_in(saved), [(line["losses"], line.get("validation")) for line in log]


def tensors_in(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, part in parts for k, v in tensors_in(part, f"{name}/{key}").items()}


def assert_same_run(first, second):
    (tensors, losses), (others, other_losses) = trained(first), trained(second)
    assert tensors.keys() == others.keys()
    for key, value in tensors.items():
        assert torch.equal(value, others[key]), key
    assert losses == other_losses


def child(argv, deadline, counted):
    """A run that is killed before its file operation number `deadline`; notes in `counted` how many it began."""
    torch.set_num_threads(1)
    sys.modules["torch.utils.tensorboard"] = None  # whose files have the time in their names
    sys.modules["snippet"] = types.SimpleNamespace(**names_of(2))
    zoo.SYSTEMS["tiny"] = ("snippet", "Tiny")
    out = argv[argv.index("--out") + 1]

    def operate(path):
        if str(path).startswith(out):
            counted.value += 1
            if counted.value == deadline:
                os.kill(os.getpid(), signal.SIGKILL)

    def look(event, given):  # Python reports its file operations to audit hooks before it does them
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (event == "open" and given[2] & WRITES):
            operate(given[0])

    synchronise, save = os.fsync, torch.save

    def fsync(descriptor):
        operate(os.readlink(f"/proc/self/fd/{descriptor}"))
        synchronise(descriptor)

    def in_two_halves(content, path):
        save(content, path)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        with open(path, "ab") as file:
            file.write(whole[len(whole) // 2 :])

    os.fsync, torch.save = fsync, in_two_halves
    sys.addaudithook(look)
    raise SystemExit(train.main(argv))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc which file is synchronised")
def test_run_killed_at_any_file_operation_ends_bit_for_bit_like_the_straight_one(patch_file, tmp_path):
    # A server that has loaded all that a run loads forks each of them: a start costs nothing then.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_resume", "kornia", "torch._dynamo"])

    def exit_code_and_operations(out, deadline=0):
        counted = context.Value("i", 0)
        argv = ["--system", "tiny", "--data", str(patch_file), "--out", str(out), "--device", "cpu", "--ema", "0.9",
                "--crop", "8", "--flips", "--batch-size", "2", "--epoch-batches", "2", "--validate-every", "1",
                "--save-every-minutes", "0", "--resume", "auto"]  # fmt: skip
        process = context.Process(target=child, args=(argv, deadline, counted))
        process.start()
        process.join()
        return process.exitcode, counted.value

    code, operations = exit_code_and_operations(tmp_path / "straight")
    assert code == 0 and operations >= 50
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    for deadline in range(1, operations + 1):
        out = tmp_path / f"killed_{deadline}"
        assert exit_code_and_operations(out, deadline) == (-signal.SIGKILL, deadline)
        assert exit_code_and_operations(out)[0] == 0, deadline
        assert_same_run(tmp_path / "straight", out)
        assert sorted(path.name for path in out.iterdir()) == names  # and no temporary file is left
        shutil.rmtree(out)
    print(operations, "kills")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_has_its_own_exit_code(patch_file, tmp_path, monkeypatch, capsys, number):
    argv = arguments(patch_file, tmp_path / "run")
    before = signal.getsignal(number)  # ignored, where the tests run in the background of a shell
    assert train.main(arguments(patch_file, tmp_path / "straight")) == 0
    step = Run.train_step

    def signalled(self, *args):
        if self.step == 8:
            os.kill(os.getpid(), number)
        step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_step", signalled)
        assert train.main(argv) == train.EXIT_UNFINISHED == 75
    error = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}" in error and "--resume auto" in error
    assert read_file(tmp_path / "run/last.pt")["step"] == 9
    assert signal.getsignal(number) is before
    assert train.main([*argv, "--resume", "auto"]) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_second_ctrl_c_ends_at_once(patch_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Stop, "TOGETHER_S", 0)  # tests/test_train_faults.py has those that come together

    def impatient(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(Run, "train_step", impatient)
    assert train.main(arguments(patch_file, tmp_path / "run")) == 130


def test_limit_of_time_stops_and_saves(patch_file, tmp_path, capsys):
    assert train.main(arguments(patch_file, tmp_path / "run", "--max-minutes", "1e-6")) == 75
    assert "stopped by --max-minutes" in capsys.readouterr().err
    assert read_file(tmp_path / "run/last.pt")["step"] == 1


@pytest.fixture
def stopped(patch_file, tmp_path):
    """A run of at least two checkpoints that was stopped after nine steps, and its arguments."""
    argv = arguments(patch_file, tmp_path / "run", "--save-every-minutes", "0")
    step = Run.train_step

    def ends(self, *args):
        if self.step == 9:
            raise KeyboardInterrupt
        step(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "train_step", ends)
        assert train.main(argv) == 130
    return tmp_path / "run", argv


def test_two_damaged_checkpoints_are_an_error_and_nothing_is_overwritten(stopped, capsys):
    out, argv = stopped
    for name in ("last.pt", "previous.pt"):
        (out / name).write_bytes(b"PK damaged")
    capsys.readouterr()
    assert train.main([*argv, "--resume", "auto"]) == 2
    assert "error:" in capsys.readouterr().err
    assert (out / "last.pt").read_bytes() == b"PK damaged"


def test_changed_options_need_force(stopped, capsys):
    out, argv = stopped
    capsys.readouterr()
    changed = [*argv, "--resume", "auto", "--learning-rate", "1e-3", "--batch-size", "4"]
    assert train.main(changed) == 2
    error = capsys.readouterr().err
    assert "learning_rate 0.0001 -> 0.001" in error and "batch_size 2 -> 4" in error and "--force" in error
    assert train.main([*changed, "--force"]) == 0
    assert "options changed" in capsys.readouterr().err
    assert read_file(out / "CDDFuse_IVF.pth")["about"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("has_bfloat16", "advice"),
    [(False, "--crop\n"), (True, "--crop, or --precision bfloat16\n")],
)
def test_too_little_memory_names_what_may_fit(has_bfloat16, advice, patch_file, tmp_path, monkeypatch, capsys):
    def hungry(self, given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "has_bfloat16", lambda device: has_bfloat16)
    monkeypatch.setattr(loop.PassLosses, "forward", hungry)
    assert train.main(arguments(patch_file, tmp_path / "run", "--batch-size", "8")) == 2
    assert "--batch-size 8, 8 pixels a side; try a smaller --batch-size or " + advice in capsys.readouterr().err


def test_validation_pairs_choose_the_best_weights_and_are_shown(patch_file, tmp_path, monkeypatch, capsys):
    losses = iter([0.5, 0.3, 0.4])
    validate = train.validate

    def scripted(model, stage, task, pairs, precision):
        found = validate(model, stage, task, pairs, precision)
        assert [pair.name for pair in pairs] == ["one.png"] and found.losses["total"] > 0
        return found._replace(losses={**found.losses, "total": next(losses)})

    monkeypatch.setattr(train, "validate", scripted)
    out = tmp_path / "run"
    argv = arguments(patch_file, out, "--stage1-epochs", "0", "--stage2-epochs", "3", "--epoch-batches", "1")
    assert train.main([*argv, "--validate-every", "1"]) == 0
    weights = f"{out / 'CDDFuse_IVF.pth'} {out / 'CDDFuse_IVF_best.pth'}"
    closing = capsys.readouterr().out.splitlines()[-1]  # its command scores both, and writes over nobody's results
    assert f"`python test_IVF.py --system cddfuse --weights {weights} --out {out / 'test_result'}`" in closing
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["validation"]["losses"]["total"] for line in lines] == [0.5, 0.3, 0.4]
    assert set(lines[0]["validation"]["metrics"]) == {"EN", "SD", "SF", "MI", "SCD", "VIF", "Qabf", "SSIM"}
    best = read_file(out / "CDDFuse_IVF_best.pth")["about"]
    assert (best["epochs"], best["validation_loss"]) == (2, 0.3)
    assert sorted(path.name for path in (out / "panels").iterdir()) == [f"epoch_000{i}.png" for i in (1, 2, 3)]


def test_folder_that_tensorboard_cannot_open_costs_the_curves_alone(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    assert open_curves(tmp_path / os.fsdecode(b"\xff"), 0) is None
    assert "no curves" in capsys.readouterr().err


def test_curves_for_tensorboard_hold_every_term(patch_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main(arguments(patch_file, tmp_path / "run", "--stage1-epochs", "1", "--stage2-epochs", "0"))
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"losses/total", "losses/cc_base", "losses/reconstruction_vis", "patches_per_second"} <= names
    assert {"learning_rates/encoder", "gradient_norms/decoder"} <= names
    assert [event.step for event in events.Scalars("losses/total")] == [1, 2, 3, 4, 5, 6]
