"""Fuses and scores infrared and visible pairs: the table of the CDDFuse paper.

python test_IVF.py                       # TNO and RoadScene, or the bundled samples where those are absent
python test_IVF.py --data my_images      # my_images/vi/*.png and my_images/ir/*.png
python test_IVF.py --vi RGB --ir thermal --pair-by number --limit 5
python test_IVF.py --weights runs/cddfuse_ivf/CDDFuse_IVF.pth --baselines
python test_IVF.py --system mlfuse --weights model_fuse.pth
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.common import Parser, run_script
from utils.evaluation.benchmark import Benchmark, add_arguments, run_benchmark
from zoo import SYSTEMS, find_system

IVF = Benchmark(
    task="ivf",
    sets=("TNO", "RoadScene"),
    samples=("Sample_IVF",),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_arguments(parser, IVF, SYSTEMS)
    return run_script(lambda args: run_benchmark(args, IVF, [*map(find_system, args.system)]), parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
