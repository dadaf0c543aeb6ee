"""Files are written whole or not at all, never over a source, and what killed runs leave is swept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dataprocessing
import downstream
import evaluate
import fuse
import test_IVF
import train
from tests.conftest import write_pair
from tests.test_fuse import write_video
from tools import make_manifest, plot_training
from utils import common
from utils.common import ROOT, InputError, check_target, lock_run_dir, remember_source, whole_file
from utils.evaluation import benchmark


@pytest.mark.parametrize(
    "main", [fuse.main, test_IVF.main, train.main, evaluate.main, downstream.main, plot_training.main]
)
def test_unknown_option_is_one_line(main, capsys):
    assert main(["--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("--help lists the options\n")


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (MemoryError(), "there is not enough memory"),
    ],
)
def test_reason_of_an_error_is_one_line(error, line):
    assert common.reason_of(error) == line


@pytest.mark.parametrize("place", [0, 1])
def test_debug_stands_before_or_after_a_sub_command(place):
    argv = ["shrink", "--data", "none", "--out", "none"]
    assert downstream.main(argv) == 2
    with pytest.raises(FileNotFoundError):
        downstream.main([*argv[:place], "--debug", *argv[place:]])


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(["a.png", "f_panel.png", *(f"{i}.png" for i in range(6))]):
        write_pair(tmp_path / "data", ("vi", "ir"), name, seed, size=(43, 51))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.xml").write_text("<annotation/>")
    (tmp_path / "labels/h.json").write_text("[[1, 0, 0], [0, 1, 0], [0, 0, 1]]")
    epoch = {"stage": "fusion", "step": 1, "seconds": 1, "losses": {"total": 1}}
    (tmp_path / "labels/log.jsonl").write_text(json.dumps(epoch))
    (tmp_path / "out/CDDFuse_IVF/data").mkdir(parents=True)
    for place in ("out", "out/CDDFuse_IVF/data", "out/panels"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "a.png").symlink_to(tmp_path / "data/vi/a.png")
    (tmp_path / "linked").symlink_to(tmp_path / "data/ir")
    return tmp_path


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (fuse.main, "--vi data/vi --ir data/ir --out out"),  # through a link in the output folder
        (fuse.main, "--vi data/vi --ir data/ir --out linked"),  # which is a link
        (fuse.main, "--vi data/vi --ir data/ir --out data/vi/../ir"),
        (fuse.main, "--vi data/vi --ir data/ir --out new --list data/vi/3.png"),
        (
            fuse.main,
            "--vi data/vi --ir data/ir --out new --list p.json --annotations labels --suffix /../../data/vi/a.png",
        ),
        (fuse.main, "--vi data/vi --ir data/ir --out new --annotations labels --list labels/a.xml"),
        (fuse.main, "--vi data/vi --ir data/ir --out new --list data"),
        (fuse.main, "--vi data/vi --ir data/ir --out new --list /dev/null"),
        (fuse.main, "--vi data/vi --ir data/ir --out out --sequence"),
        (fuse.main, "--vi data/vi/a.png --ir data/ir/a.png --out out/a.png"),
        (fuse.main, "--vi data/vi/f_panel.png --ir data/ir/f_panel.png --out data/vi/f.png --panel"),
        (fuse.main, "--vi vi.mkv --ir ir.mkv --out vi.mkv"),
        (fuse.main, "--vi v.partial.mkv --ir ir.mkv --out v.mkv"),
        (test_IVF.main, "--data data --out out"),
        (dataprocessing.main, "--data data --degrade --out data/vi/a.png"),
        (dataprocessing.main, "--data data --degrade --out data/ir/1.png"),  # not one of those that are shown
        (dataprocessing.main, "--data data --degrade --out out/a.png"),
        (dataprocessing.main, "--data data --degrade --out pipe.png"),
        (fuse.main, "--vi data/vi --ir data/ir --out new --homography labels/h.json --list labels/h.json"),
        (evaluate.main, "--data data --baselines --jobs 1 --per-image linked/a.png"),
        (evaluate.main, "--data data --baselines --jobs 1 --results data/vi/a.png"),
        (make_manifest.main, "data --out out/a.png"),
        (plot_training.main, "labels --out labels/log.jsonl"),
        (downstream.main, "shrink --data data --out labels/../data"),
    ],
)
def test_no_source_is_written_over_and_nothing_but_a_file_is_written(data, main, options, capsys, monkeypatch):
    monkeypatch.chdir(data)
    for name in ("vi", "ir", "v.partial") if ".mkv" in options else ():
        write_video(data / f"{name}.mkv", 2)
        common._written.clear()  # they are those of another run
    os.mkfifo("pipe.png")
    kept = [path for folder in ("data", "labels") for path in Path(folder).rglob("*.*")] + list(Path().glob("*.mkv"))
    before = {path: path.read_bytes() for path in kept}
    device = ("--device", "cpu") if main in (fuse.main, test_IVF.main) else ()
    assert main([*device, *options.split()]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert any(text in said for text in ("written over", "write over", "pipe or a device", "is a folder", "--suffix",
                                         "not a file of results", "the data set itself"))  # fmt: skip
    assert {path: path.read_bytes() for path in kept} == before
    assert {*Path("data").rglob("*.*"), *Path().glob("*.mkv")} <= set(kept)


def test_a_file_of_ones_own_may_be_read_and_written_again(tmp_path):
    for text in ("one", "two"):
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text(text)
        remember_source(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "two"
    (tmp_path / "b.txt").write_text("theirs")
    remember_source(tmp_path / "b.txt")
    with pytest.raises(InputError, match="b.txt is one of the sources"):
        check_target(tmp_path / "b.txt")


def test_what_a_killed_run_leaves_is_swept_by_the_next_and_what_others_write_is_not(tmp_path):
    code = """
import os, sys, signal
from utils.common import whole_file
with whole_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    others = [tmp_path / f"{common._TEMPORARY}.{os.getppid()}.1.tmp.txt", tmp_path / ".0.1.1.tmp"]
    for path in others:  # of a process that runs, and of another machine
        path.write_text("")
    with whole_file(tmp_path / "b.txt") as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "b.txt"])


def test_results_of_two_runs_do_not_mix(data, capsys, monkeypatch):
    folder = data / "out2/CDDFuse_IVF/data"
    options = ["--device", "cpu", "--data", str(data / "data"), "--out", str(data / "out2")]
    with lock_run_dir(folder):
        (folder / "metrics.json").write_text(json.dumps({"old": True}))
        assert test_IVF.main(options) == 2
    said = capsys.readouterr().err
    assert f"another process writes to {folder}" in said and (folder / "metrics.json").exists()

    def interrupted(*_: object, **__: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "fuse_arrays", interrupted)
    assert test_IVF.main(options) == 130
    assert not (folder / "metrics.json").exists()  # which would be of other images than those that are there now
