"""Draws docs/samples.png: the bundled sample pairs, their base and detail features, and what the weights make of them.

python -m tools.make_panel
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from utils.common import Parser, in_checkout, run_script, whole_file
from utils.data.images import in_colour, one_below_another, read_colour, side_by_side, to_uint8, with_colour_of
from utils.data.pairs import find_modalities, list_pairs
from utils.data.registration import resize
from utils.inference.fusing import feature_maps, load_fuser, to_levels, to_network
from zoo.cddfuse import CDDFuseSystem

SETS = {"ivf": ("Sample_IVF",), "mif": ("Sample_MRI_CT", "Sample_MRI_PET")}
COLUMNS = ("visible, MRI", "infrared, CT, PET", "base of 1st", "base of 2nd", "detail of 1st", "detail of 2nd", "fused")
WIDTH, GAP, HEADING = 140, 4, 18  # pixels


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=in_checkout("docs", "samples.png"))
    return run_script(draw, parser, argv)


def draw(args: argparse.Namespace) -> int:
    rows = [heading()]
    for task, sets in SETS.items():
        fuser = load_fuser(CDDFuseSystem, task)
        for name in sets:
            for pair in list_pairs(*find_modalities(in_checkout("test_img", name))).pairs:
                vis, ir = pair.read()
                colours = [read_colour(path) for path in (pair.vis, pair.ir)]
                with torch.inference_mode():
                    fused = to_levels(fuser(to_network(vis), to_network(ir)))
                maps = feature_maps(fuser.system, vis, ir)
                features = [maps[key] for key in ("base vis", "base ir", "detail vis", "detail ir")]
                rows.append(row([*colours, *features, with_colour_of(fused, *colours)]))
    with whole_file(args.out) as temporary:
        cv2.imwrite(str(temporary), one_below_another(rows)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(args.out)
    return 0


def heading() -> np.ndarray:
    canvas = np.full((HEADING, len(COLUMNS) * (WIDTH + GAP) - GAP, 3), 255, np.uint8)
    for i, text in enumerate(COLUMNS):
        cv2.putText(canvas, text, (i * (WIDTH + GAP) + 2, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return canvas


def row(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of one size, grey or in colour, beside each other in equal widths: uint8 (H, W, 3)."""
    size = (round(images[0].shape[0] * WIDTH / images[0].shape[1]), WIDTH)
    return side_by_side([resize(in_colour(to_uint8(image)), size) for image in images])


if __name__ == "__main__":
    raise SystemExit(main())
