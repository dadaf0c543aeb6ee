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
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from utils.common import InputError, run_script, whole_file
from utils.evaluation.plots import new_figure, title_of
from utils.metrics import PAPER_TABLE

LOG = "log.jsonl"


@dataclass(frozen=True)
class Epoch:
    """A line of a log, and the run's name and the hours of training up to its end, all runs before included."""

    run: str
    hours: float
    line: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.line["stage"]

    @property
    def loss(self) -> float:
        return self.line["losses"]["total"]

    @property
    def validation(self) -> dict[str, float] | None:
        """The total loss ("loss") and the metrics of the validation pairs; None where they were not looked at."""
        found = self.line.get("validation")
        return found and {"loss": found["losses"]["total"]} | {name: found["metrics"][name] for name in PAPER_TABLE}

    @property
    def pairs(self) -> str | None:
        """Hash of the validation pairs; None where they were not looked at, or the log does not say which they were."""
        return self.line.get("validation", {}).get("pairs")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log; in the order of training")
    add("--out", type=Path, metavar="PNG", help="default: curves.png beside the last log")
    add("--last-hours", type=float, default=2, metavar="H", help="to judge by whether it still gains (default: 2)")
    add("--debug", action="store_true", help="show tracebacks")
    return run_script(show, parser.parse_args(argv))


def show(args: argparse.Namespace) -> int:
    logs = [run / LOG if run.is_dir() else run for run in args.runs]
    epochs = read(logs)
    print("\n".join(table_of_runs(epochs)))
    validations = [epoch for epoch in epochs if epoch.validation]
    if validations:
        print("\n" + "\n".join(table_of_validations(validations)))
    alike = [epoch for epoch in validations if validations[-1].pairs in (None, epoch.pairs) or epoch.pairs is None]
    if len(alike) > 1:
        print("\n" + what_came(alike, args.last_hours))
    else:
        print(
            "\nfewer than two looks at the same validation pairs; "
            "see --holdout of dataprocessing.py, --validate-every of train.py"
        )
    out = args.out or logs[-1].with_name("curves.png")
    with whole_file(out) as temporary:
        draw(epochs).savefig(temporary, dpi=150, format="png")
    print(f"curves: {out}")
    return 0


def read(logs: Sequence[Path]) -> list[Epoch]:
    """The epochs of runs that followed one another.

    Raises:
        InputError: a file is missing, empty, or has a line that train.py did not write.
    """
    epochs, seconds = [], 0.0
    for log in logs:
        if not log.is_file():
            raise InputError(f"no log at {log}; name the folder that train.py --out made")
        name = log.parent.name if log.name == LOG else log.stem
        for number, text in enumerate(log.read_text(errors="replace").splitlines(), 1):
            try:
                line = json.loads(text)
                seconds += line["seconds"]
                epoch = Epoch(name, seconds / 3600, line)
                _ = epoch.stage, line["step"], epoch.loss + 0.0, epoch.validation
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{log}, line {number}: not a line of a training's log") from None
            epochs.append(epoch)
        if not epochs or epochs[-1].run != name:
            raise InputError(f"{log} is empty: the run has not finished an epoch")
    return epochs


def by_stage(epochs: Sequence[Epoch]) -> Iterator[tuple[str, str, list[Epoch]]]:
    """Run, stage and epochs of each part of the training that has one loss."""
    for (run, stage), part in groupby(epochs, key=lambda epoch: (epoch.run, epoch.stage)):
        yield run, stage, list(part)


def table_of_runs(epochs: Sequence[Epoch]) -> list[str]:
    lines = ["| run | stage | steps | hours | total loss, first epoch | last |", "|---|---|---|---|---|---|"]
    ends = {run: 0 for run, _, _ in by_stage(epochs)}
    for run, stage, part in by_stage(epochs):
        steps, ends[run] = part[-1].line["step"] - ends[run], part[-1].line["step"]
        hours = sum(epoch.line["seconds"] for epoch in part) / 3600
        lines.append(f"| {run} | {stage} | {steps} | {hours:.1f} | {part[0].loss:.4f} | {part[-1].loss:.4f} |")
    return lines


def table_of_validations(validations: Sequence[Epoch]) -> list[str]:
    lines = [
        f"| run | step | hours | total loss | {' | '.join(PAPER_TABLE)} |",
        "|" + "---|" * (4 + len(PAPER_TABLE)),
    ]
    for epoch in validations:
        loss, *metrics = epoch.validation.values()
        shown = " | ".join(f"{value:.3f}" for value in metrics)
        lines.append(f"| {epoch.run} | {epoch.line['step']} | {epoch.hours:.2f} | {loss:.4f} | {shown} |")
    return lines


def what_came(validations: Sequence[Epoch], hours: float) -> str:
    """The change of each number of the validation pairs over the last hours, in percent.

    It is counted from the last look that lies as far back, or from the first of all.
    """
    last = validations[-1]
    as_far_back = [epoch for epoch in validations if epoch.hours <= last.hours - hours]
    first = as_far_back[-1] if as_far_back else validations[0]
    changes = {name: _percent(first.validation[name], value) for name, value in last.validation.items()}
    loss = changes.pop("loss")
    mean = fmean(changes.values())  # higher is better in all of the table
    each = ", ".join(f"{name} {change:+.2f} %" for name, change in changes.items())
    return (
        f"validation pairs in the last {last.hours - first.hours:.2f} hours: total loss {loss:+.2f} %; {each}; "
        f"mean gain of the metrics {mean:+.2f} %"
    )


def _percent(before: float, after: float) -> float:
    return 100 * (after - before) / abs(before) if before else math.nan


def draw(epochs: Sequence[Epoch]) -> Any:
    """The loss of each stage and of the validation pairs, and a picture a metric, over the hours of training."""
    figure = new_figure(14, 5)
    losses, validation_axes = figure.add_subplot(2, 5, 1), figure.add_subplot(2, 5, 6)
    others = [figure.add_subplot(2, 5, place) for place in (2, 3, 4, 5, 7, 8, 9, 10)]
    runs = list(dict.fromkeys(epoch.run for epoch in epochs))
    colours = {run: f"C{number % 10}" for number, run in enumerate(runs)}
    stages = list(dict.fromkeys(epoch.stage for epoch in epochs))
    styles = {stage: ("-", ":", "--", "-.")[number % 4] for number, stage in enumerate(reversed(stages))}
    for run, stage, part in by_stage(epochs):
        hours = [epoch.hours for epoch in part]
        losses.plot(hours, [epoch.loss for epoch in part], styles[stage], color=colours[run], label=f"{run}, {stage}")
        looks = [epoch for epoch in part if epoch.validation]
        hours = [epoch.hours for epoch in looks]
        for axes, name in zip([validation_axes, *others], ["loss", *PAPER_TABLE], strict=True):
            if looks:
                axes.plot(hours, [e.validation[name] for e in looks], styles[stage], marker=".", color=colours[run])
    losses.set_yscale("log")
    losses.set_title("total loss, training patches", fontsize=9)
    validation_axes.set_title("total loss, validation pairs", fontsize=9)
    for axes, name in zip(others, PAPER_TABLE, strict=True):
        axes.set_title(f"{title_of(name)}, validation pairs", fontsize=9)
    for axes in [losses, validation_axes, *others]:
        axes.set_xlim(0, epochs[-1].hours * 1.02)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("hours of training", fontsize=9)
    figure.legend(fontsize=7, loc="outside upper center", ncols=7)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
