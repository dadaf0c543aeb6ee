"""Which recipe of train.py makes the better weights in the same time: each trains from scratch, on the same patches.

    python -m benchmarks.recipes --data data/MSRS.h5 --minutes 20       # a patch file with validation pairs (--holdout)
    python -m benchmarks.recipes --data data/MSRS.h5 --recipes ours "ours --seed 1" "ours --batch-size 16" --json r.json

A recipe may be followed by options of train.py. The same recipe with another seed shows how much of a difference is
chance.

Every recipe keeps its stages, schedules and the proportion of its epochs, and gets as many steps as fit into the
minutes: the steps of an epoch are scaled, by the time of a few steps measured first. `--steps 300` gives each that many
instead (the nearest multiple of its epochs), for options that have nothing to do with speed. What is compared is what
train.py says of the validation pairs after the last epoch: losses of the last stage and the metrics of the table. A
short run says which recipe learns faster, not where either would end.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train
from benchmarks import about, parser_of, write_json
from utils.common import InputError, number_in, run_script
from utils.data.patches import PatchDataset
from utils.metrics import PAPER_TABLE
from zoo import SYSTEMS, TASKS, find_system

PROBE_STEPS = 4  # a stage, after as many that warm up


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="patch file with validation pairs")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--minutes", type=number_in(float, 0.01), default=20, help="of training steps for each recipe (default: 20)"
    )
    budget.add_argument("--steps", type=number_in(int, 1), help="for each recipe, instead of minutes")
    add("--system", choices=SYSTEMS, default="cddfuse")
    add("--task", choices=TASKS, default="ivf")
    add("--recipes", nargs="+", default=["ours", "published"], help="each with options of train.py after it, if any")
    add("--device", default="auto")
    add("--out", type=Path, help="folder to keep the runs in (default: a temporary one)")
    return run_script(compare, parser, argv)


def compare(args: argparse.Namespace) -> int:
    if not PatchDataset(args.data).validation:
        raise InputError(f"{args.data} has no validation pairs; make it with `python dataprocessing.py --holdout 20`")
    budget = {"steps": args.steps} if args.steps else {"minutes": args.minutes}
    setting = {"data": args.data.name, "system": args.system, "task": args.task, **budget, "trained_on": args.device}
    setting |= about(args.load)
    with tempfile.TemporaryDirectory(prefix="recipes_") as temporary:
        folders = {row: (args.out or Path(temporary)) / str(number) for number, row in enumerate(args.recipes, 1)}
        # All are planned before the first is trained: what is wrong with the last should not show after hours.
        plans = {row: plan(row, args, at) for row, at in folders.items()}
        for call, _ in plans.values():
            run(call)
        rows = {row: result(at, plans[row][1]) for row, at in folders.items()}
    print("| recipe | steps | patches | minutes | validation total | " + " | ".join(PAPER_TABLE) + " |")
    print("|" + "---|" * (5 + len(PAPER_TABLE)))
    for name, row in rows.items():
        metrics = " | ".join(f"{row['metrics'][name]:.3f}" for name in PAPER_TABLE)
        total = f"{row['losses']['total']:.4f}"
        print(f"| {name} | {row['steps']} | {row['patches']} | {row['minutes']:.1f} | {total} | {metrics} |")
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    write_json(args.json, {"about": setting, "recipes": rows})
    return 0


def plan(row: str, args: argparse.Namespace, folder: Path) -> tuple[list[str], int]:
    """The call of train.py that trains a recipe from scratch for about what was asked for, and its batch size."""
    recipe, *extra = shlex.split(row) or [""]
    options = ["--system", args.system, "--task", args.task, "--data", str(args.data), "--device", args.device,
               "--recipe", recipe, *extra]  # fmt: skip
    system = find_system(args.system)
    given = train.build_parser(system, recipe).parse_args(options)
    epochs = {name: getattr(given, name) for name in vars(system.Options()) if name.endswith("epochs")}
    step_seconds = probe(epochs, options, folder / "probe")  # with --steps too: it shows whether the row trains
    if args.steps:
        epoch_batches = args.steps / sum(epochs.values())
    else:
        # Over all epochs of a stage, so many seconds for each step that an epoch has.
        epoch_batches = 60 * args.minutes / sum(step_seconds[name] * count for name, count in epochs.items())
    # Validated at the end alone: epochs are short, and validation takes no part in the minutes.
    steps = ["--epoch-batches", str(max(1, round(epoch_batches))), "--validate-every", str(max(epochs.values()))]
    return [*options, *steps, "--out", str(folder / "run")], given.batch_size


def result(folder: Path, batch_size: int) -> dict[str, Any]:
    """What the log of a finished run says."""
    log = read_log(folder / "run")
    steps = log[-1]["step"]
    minutes = sum(line["seconds"] for line in log) / 60
    return {"steps": steps, "patches": steps * batch_size, "minutes": minutes, **log[-1]["validation"]}


def probe(epochs: dict[str, int], options: list[str], out: Path) -> dict[str, float]:
    """Seconds a step of each stage that has epochs."""
    short = [word for name, count in epochs.items()
             for word in (f"--{name.replace('_', '-')}", str(2 * min(count, 1)))]  # fmt: skip
    run([*options, *short, "--epoch-batches", str(PROBE_STEPS), "--validate-every", "0", "--out", str(out)])
    seconds = [line["seconds"] / PROBE_STEPS for line in read_log(out)[1::2]]  # the first epoch of each warms up
    stages = [name for name, count in epochs.items() if count]
    return dict.fromkeys(epochs, 0.0) | dict(zip(stages, seconds, strict=True))


def run(call: list[str]) -> None:
    # In a process of its own, so that memory which one recipe has kept is not missing to the next.
    if subprocess.run([sys.executable, train.__file__, *call], check=False).returncode:
        raise InputError("train.py has said above why it did not train")


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    raise SystemExit(main())
