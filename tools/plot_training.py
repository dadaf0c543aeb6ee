"""Draws the curves of a training from its log.jsonl, prints them as tables, and says what its last hours brought.

    python -m tools.plot_training runs/cddfuse_ivf                     # -> runs/cddfuse_ivf/curves.png
    python -m tools.plot_training runs/first runs/second --out c.png   # the second went on from the first's weights

Several runs are drawn one after the other on one axis of hours, which are those spent in training steps. What the last
hours brought is counted over the same validation pairs alone; a log from before train.py wrote which they were is taken
to have the same.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from utils.common import InputError, Parser, number_in, remember_source, run_script
from utils.evaluation.plots import new_figure, save, title_of
from utils.evaluation.tables import markdown_table
from utils.metrics import PAPER_TABLE

LOG = "log.jsonl"


class Epoch(NamedTuple):
    """What a line of a log says."""

    run: str
    stage: str
    step: int
    seconds: float
    hours: float  # of training up to its end, all runs before included
    loss: float
    validation: dict[str, float] | None  # the total loss ("loss") and the metrics of the validation pairs, if looked at
    pairs: str | None  # hash of the validation pairs, if the log says which they were


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log; in the order of training")
    add("--out", type=Path, metavar="PNG", help="default: curves.png beside the last log")
    add("--last-hours", type=number_in(float, 0), default=2, metavar="H",
        help="to judge by whether it still gains (default: 2)")  # fmt: skip
    return run_script(show, parser, argv)


def show(args: argparse.Namespace) -> int:
    logs = [run / LOG if run.is_dir() else run for run in args.runs]
    epochs = read(logs)
    print(table_of_runs(epochs))
    looks = [epoch for epoch in epochs if epoch.validation]
    if looks:
        print("\n" + table_of_validations(looks))
    alike = [epoch for epoch in looks if None in (looks[-1].pairs, epoch.pairs) or epoch.pairs == looks[-1].pairs]
    if len(alike) > 1:
        print("\n" + gain_of_last_hours(alike, args.last_hours))
    else:
        print("\nfewer than two looks at the same validation pairs; "
              "see --holdout of dataprocessing.py, --validate-every of train.py")  # fmt: skip
    out = args.out or logs[-1].with_name("curves.png")
    save(draw(epochs), out)
    print(f"curves: {out}")
    return 0


def read(logs: Sequence[Path]) -> list[Epoch]:
    """The epochs of runs that followed one another.

    Raises:
        InputError: a file is missing, empty, or has a line that train.py did not write.
    """
    epochs, hours = [], 0.0
    for log in logs:
        if not log.is_file():
            raise InputError(f"no log at {log}; name the folder that train.py --out made")
        remember_source(log)
        name = log.parent.name if log.name == LOG else log.stem
        lines = log.read_text(errors="replace").splitlines()
        if not lines:
            raise InputError(f"{log} is empty: the run has not finished an epoch")
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                hours += line["seconds"] / 3600
                look, found = line.get("validation") or {}, None
                if look:
                    found = {"loss": look["losses"]["total"]} | {key: look["metrics"][key] for key in PAPER_TABLE}
                epochs.append(Epoch(name, line["stage"], line["step"], line["seconds"], hours,
                                    float(line["losses"]["total"]), found, look.get("pairs")))  # fmt: skip
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{log}, line {number}: not a line of a training's log") from None
    return epochs


def by_stage(epochs: Sequence[Epoch]) -> Iterator[tuple[str, str, list[Epoch]]]:
    """Run, stage and epochs of each part of the training that has one loss."""
    for (run, stage), part in groupby(epochs, key=lambda epoch: (epoch.run, epoch.stage)):
        yield run, stage, list(part)


def table_of_runs(epochs: Sequence[Epoch]) -> str:
    lines = [["run", "stage", "steps", "hours", "total loss, first epoch", "last"]]
    ends = dict.fromkeys((epoch.run for epoch in epochs), 0)
    for run, stage, part in by_stage(epochs):
        steps, ends[run] = part[-1].step - ends[run], part[-1].step
        hours = sum(epoch.seconds for epoch in part) / 3600
        lines.append([run, stage, str(steps), f"{hours:.1f}", f"{part[0].loss:.4f}", f"{part[-1].loss:.4f}"])
    return markdown_table(lines)


def table_of_validations(looks: Sequence[Epoch]) -> str:
    lines = [["run", "step", "hours", "total loss", *PAPER_TABLE]]
    for epoch in looks:
        loss, *metrics = epoch.validation.values()
        numbers = (f"{epoch.hours:.2f}", f"{loss:.4f}", *(f"{value:.3f}" for value in metrics))
        lines.append([epoch.run, str(epoch.step), *numbers])
    return markdown_table(lines)


def gain_of_last_hours(looks: Sequence[Epoch], hours: float) -> str:
    """The change of each number of the validation pairs over the last hours, in percent.

    It is counted from the last look that lies as far back, or from the first of all.
    """
    last = looks[-1]
    first = next((epoch for epoch in reversed(looks) if epoch.hours <= last.hours - hours), looks[0])
    changes = {}
    for name, after in last.validation.items():
        before = first.validation[name]
        changes[name] = 100 * (after - before) / abs(before) if before else math.nan
    loss = changes.pop("loss")
    each = ", ".join(f"{name} {change:+.2f} %" for name, change in changes.items())
    return (
        f"validation pairs in the last {last.hours - first.hours:.2f} hours: total loss {loss:+.2f} %; {each}; "
        f"mean gain of the metrics {fmean(changes.values()):+.2f} %"  # higher is better in all of the table
    )


def draw(epochs: Sequence[Epoch]) -> Any:
    """The loss of each stage and of the validation pairs, and a picture a metric, over the hours of training."""
    figure = new_figure(14, 5)
    losses, *others = (figure.add_subplot(2, 5, place) for place in (1, 6, 2, 3, 4, 5, 7, 8, 9, 10))
    runs = list(dict.fromkeys(epoch.run for epoch in epochs))
    stages = list(dict.fromkeys(epoch.stage for epoch in reversed(epochs)))  # the last one is drawn as a line
    for run, stage, part in by_stage(epochs):
        look = {"color": f"C{runs.index(run) % 10}", "linestyle": ("-", ":", "--", "-.")[stages.index(stage) % 4]}
        losses.plot([e.hours for e in part], [e.loss for e in part], label=f"{run}, {stage}", **look)
        looks = [epoch for epoch in part if epoch.validation]
        for axes, name in zip(others, ["loss", *PAPER_TABLE], strict=True):
            axes.plot([e.hours for e in looks], [e.validation[name] for e in looks], marker=".", **look)
    losses.set_yscale("log")
    titles = ["total loss, training patches", "total loss, validation pairs"]
    titles += [f"{title_of(name)}, validation pairs" for name in PAPER_TABLE]
    for axes, title in zip([losses, *others], titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, epochs[-1].hours * 1.02)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("hours of training", fontsize=9)
    figure.legend(fontsize=7, loc="outside upper center", ncols=7)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
