"""Draws docs/samples.png: bundled sample pairs, their base and detail features, and what the weights make of them.

python -m tools.make_panel
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from utils.common import in_checkout, run_script
from utils.data.images import one_below_another, to_uint8, write_grey
from utils.data.pairs import find_modalities, list_pairs
from utils.data.patches import HeldOut
from utils.training.monitor import draw_panel
from zoo.cddfuse import CDDFuseSystem

SETS = {"ivf": ("Sample_IVF",), "mif": ("Sample_MRI_CT", "Sample_MRI_PET")}
PAIRS = 3  # of each task
WIDTH = 1200  # pixels of the drawing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=in_checkout("docs", "samples.png"))
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_script(draw, parser.parse_args(argv))


def draw(args: argparse.Namespace) -> int:
    panels = []
    for task, sets in SETS.items():
        model = CDDFuseSystem().eval()
        model.load_published(in_checkout("models", f"CDDFuse_{task.upper()}.pth"))
        pairs = [pair for name in sets for pair in list_pairs(*find_modalities(in_checkout("test_img", name))).pairs]
        held_out = [HeldOut(pair.name, *map(to_uint8, pair.read())) for pair in pairs[:PAIRS]]
        panels.append(draw_panel(model, task, held_out))
    drawn = one_below_another(panels)
    size = (WIDTH, round(drawn.shape[0] * WIDTH / drawn.shape[1]))
    write_grey(args.out, cv2.resize(drawn, size, interpolation=cv2.INTER_AREA))
    print(f"{args.out}: columns are visible or MRI, infrared or CT/PET, base and detail features of each, fused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
