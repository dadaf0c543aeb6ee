"""Fuses and scores medical pairs, MRI with CT, PET or SPECT: the table of the CDDFuse paper.

    python test_MIF.py                       # MRI_CT, MRI_PET and MRI_SPECT, or the bundled samples
    python test_MIF.py --data my_images      # my_images/MRI/*.png and my_images/PET/*.png
    python test_MIF.py --weights models/CDDFuse_MIF.pth --skip none
    python test_MIF.py --system mlfuse --weights model_fuse.pth --data ct_mri_set --stems mrict ct

By default both of CDDFuse's weights are run, the infrared-visible ones (the decoder sees the sum of both images) and
the medical ones (it sees none), as published.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.common import Parser, run_script
from utils.evaluation.benchmark import Benchmark, add_arguments, run_benchmark
from zoo import SYSTEMS, find_system

MIF = Benchmark(
    task="mif",
    sets=("MRI_CT", "MRI_PET", "MRI_SPECT"),
    samples=("Sample_MRI_CT", "Sample_MRI_PET"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_arguments(parser, MIF, SYSTEMS)
    return run_script(lambda args: run_benchmark(args, MIF, [*map(find_system, args.system)]), parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
