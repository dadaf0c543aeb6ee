"""Every option that takes a number, in every script, with numbers that are none or too large: taken for a reason, or
refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest

import app
import dataprocessing
import downstream
import evaluate
import fuse
import test_IVF
import test_MIF
import train
from tests.conftest import write_pair
from tests.test_fuse import write_video
from tools import plot_training
from utils.evaluation import benchmark
from zoo import SYSTEMS

NEVER = ("nan", "inf", "1e400", "", "word")
VALUES = (*NEVER, "-1", "0", "1e-400", "9" * 400, str(2**31), str(2**63))
TEXTS = ("--slice", "--vi-range", "--ir-range")  # options of numbers which are checked after they are parsed

# Script, and a command that would run to its end.
COMMANDS = {
    fuse.main: ["--vi v.mkv --ir i.mkv --out o.mkv", "--vi data/vi --ir data/ir --out o"],
    test_IVF.main: ["--data data --out o"],
    test_MIF.main: ["--data data --out o"],
    evaluate.main: ["--fused x=data/vi --data data"],
    dataprocessing.main: [
        "--data data --patch-size 24 --stride 12 --out x.h5", "--data data --degrade 0 --out x.png",
    ],
    downstream.main: [
        "segment --data data --labels masks --block 1 --test-every 2 --out d", "shrink --data data --out s",
    ],
    app.main: [""],
    plot_training.main: ["run"],
    train.main: [f"--system {name} --data p.h5 --out t" for name in SYSTEMS],
}  # fmt: skip


class Accepted(BaseException):
    """All options have been checked."""


def accepts(*_, **__):
    raise Accepted


def options_of(main, argv, monkeypatch):
    """Name and number of values of each option of a script's parser that takes numbers."""
    found = []

    def look(parser, argv, _):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = action.choices[argv[0]]
        found.extend((action.option_strings[-1], 2 if action.nargs in (2, "+") else 1) for action in parser._actions
                     if action.option_strings and (action.type not in (None, str, Path)
                                                   or action.option_strings[-1] in TEXTS))  # fmt: skip
        raise Accepted

    with monkeypatch.context() as patched, pytest.raises(Accepted):
        patched.setattr(argparse.ArgumentParser, "parse_args", look)
        main(argv)
    return found


def is_accepted(main, argv, capsys):
    try:
        code = main(argv)
    except Accepted:
        return True
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 0 or (code == 2 and "error: " in said[-1] and len(said[-1]) < 600), argv
    return code == 0


@pytest.mark.slow
def test_every_number_is_taken_or_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        write_pair(tmp_path / "data", ("vi", "ir"), f"{name}.png", seed, size=(43, 51))
        (tmp_path / "masks").mkdir(exist_ok=True)
        cv2.imwrite(f"masks/{name}.png", np.zeros((43, 51), np.uint8))
        write_video(tmp_path / f"{'vi'[seed]}.mkv", 2, seed=seed)
    monkeypatch.setattr(fuse, "load_fuser", lambda *_, **__: argparse.Namespace(weights="w"))
    monkeypatch.setattr(fuse, "Session", lambda fuser, args, homography: argparse.Namespace(args=args))
    for module, name in ((fuse, "fuse_frames"), (fuse, "fuse_folder"), (benchmark, "load_fuser"), (app, "serve"),
                         (evaluate, "evaluate"), (downstream, "train"), (plot_training, "read"),
                         (train, "PatchDataset")):  # fmt: skip
        monkeypatch.setattr(module, name, accepts)
    monkeypatch.setattr(downstream, "check_libraries", lambda task: None)
    taken = refused = 0
    for main, commands in COMMANDS.items():
        for command in commands:
            argv = command.split()
            for option, many in options_of(main, argv, monkeypatch):
                for value in VALUES:
                    given = [[f"{option}={value}"]] if many == 1 else [[option, value, "5"], [option, "5", value]]
                    for more in given:
                        if is_accepted(main, [*argv, *more], capsys):
                            assert value not in NEVER, more
                            taken += 1
                        else:
                            refused += 1
    print(f"{taken} taken, {refused} refused")
    assert taken + refused >= 300
