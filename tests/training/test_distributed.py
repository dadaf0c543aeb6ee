"""Two processes train like one: the same losses, the same weights, one set of files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from utils.common import ROOT
from utils.data.patches import PatchWriter
from utils.inference.checkpoint import read_file
from utils.training.optimizers import OPTIMIZERS


@pytest.fixture
def patch_file(tmp_path):
    rng = np.random.default_rng(0)
    with PatchWriter(tmp_path / "patches.h5", 16) as writer:
        writer.add(rng.uniform(0, 255, (9, 16, 16)), rng.uniform(0, 255, (9, 16, 16)))
        writer.add_validation("one", rng.uniform(0, 255, (48, 48)), rng.uniform(0, 255, (48, 48)))
    return tmp_path / "patches.h5"


def train(patch_file, out, *options, processes=1, port=0):
    argv = [sys.executable, str(ROOT / "train.py"), "--data", str(patch_file), "--out", str(out), "--device", "cpu"]
    argv += ["--recipe", "published", "--batch-size", "4", "--stage1-epochs", "2", "--stage2-epochs", "2"]
    argv += ["--learning-rate", "1e-4", "--ema", "0.9", *options]
    # What torchrun would set; started by hand, so that each process's output and exit code can be seen.
    common = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    runs = [
        subprocess.Popen(
            argv,
            env={**os.environ, "OMP_NUM_THREADS": "1", **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for rank in range(processes)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    return [run.returncode for run in runs], outputs


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(out):
    return [json.loads(line)["losses"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(optimizer, patch_file, tmp_path, port):
    # The first process validates while the other waits, in the middle and after the last epoch.
    common = ("--epoch-batches", "2", "--flips", "--validate-every", "2", "--optimizer", optimizer)
    assert train(patch_file, tmp_path / "one", *common)[0] == [0]
    codes, outputs = train(patch_file, tmp_path / "two", *common, processes=2, port=port)
    assert codes == [0, 0], outputs
    assert outputs[1][0] == ""  # one process speaks
    for out in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        assert ["validation" in line for line in lines] == [False, True, False, True]
    for first, second in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    one, two = (read_file(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    # Either optimiser moves a weight by about the learning rate a step, whatever its gradient, Muon by three times as
    # much: 8 steps of 1e-4 here. So a gradient that is nearly zero may make a difference of its sign.
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=3e-4)


@pytest.mark.slow
def test_stopped_run_of_two_processes_is_gone_on_with_by_one(patch_file, tmp_path, port):
    options = ("--max-minutes", "1e-6")
    codes, outputs = train(patch_file, tmp_path / "run", *options, processes=2, port=port)
    assert codes == [75, 75], outputs
    assert train(patch_file, tmp_path / "run", "--resume", "auto")[0] == [0]
    assert len(losses(tmp_path / "run")) == 4


def test_batch_that_processes_cannot_share_is_an_error_in_each(patch_file, tmp_path, port):
    codes, outputs = train(patch_file, tmp_path / "run", "--batch-size", "3", processes=2, port=port)
    assert codes == [2, 2]
    assert "multiple of the 2 processes" in outputs[0][1]
