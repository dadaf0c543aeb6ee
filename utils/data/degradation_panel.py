"""Degraded pairs to look at: what the degradation model of TSDM-Fusion draws, as one image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.common import InputError
from utils.data.degradation import INFRARED, VISIBLE, Degradation, Ranges, to_levels, to_luma
from utils.data.images import one_below_another, read_colour, side_by_side, write_colour
from utils.data.pairs import Pair, check_same_size


def write_examples(
    path: Path,
    pairs: Sequence[Pair],
    seed: int,
    vis_ranges: Ranges = VISIBLE,
    ir_ranges: Ranges = INFRARED,
    most: int = 4,
) -> int:
    """Writes a panel of degraded pairs and prints what was drawn for it.

    Args:
        path: a PNG file.
        pairs: of which `most`, spread evenly, get a row: visible, degraded twice, infrared, degraded twice.
        seed: decides all draws.
        vis_ranges, ir_ranges: what may be drawn.

    Returns:
        How many pairs could not be shown; they are named.

    Raises:
        InputError: not one could be shown, or the name of the file does not end in .png.
    """
    if path.suffix != ".png" or seed < 0:
        raise InputError(f"a panel needs a file name that ends in .png and a seed from 0 up, got {path} and {seed}")
    chosen = [pairs[i * len(pairs) // most] for i in range(most)] if len(pairs) > most else pairs
    rows = []
    for number, pair in enumerate(chosen):
        rng = np.random.default_rng((seed, number))
        draws = [ranges.draw(rng) for ranges in (vis_ranges, vis_ranges, ir_ranges, ir_ranges)]
        try:
            vis = read_colour(pair.vis, pair.vis_reading) / np.float32(255)
            ir = read_colour(pair.ir, pair.ir_reading) / np.float32(255)
            check_same_size(pair, vis[..., 0], ir[..., 0])
        except (InputError, OSError) as error:
            print(f"warning: {error}; left out", file=sys.stderr)
            continue
        rows.append(_example_row(vis, to_luma(ir), draws[:2], draws[2:]))
        for name, draw in zip(("vis", "vis", "ir", "ir"), draws, strict=True):
            print(f"{pair.name} {name}: {draw}")
    if not rows:
        raise InputError("not one pair could be shown; name other folders by --data")
    write_colour(path, one_below_another(rows))
    return len(chosen) - len(rows)


def _example_row(
    vis: np.ndarray, ir: np.ndarray, vis_draws: Sequence[Degradation], ir_draws: Sequence[Degradation], side: int = 256
) -> np.ndarray:
    """The middle of a pair, as it is and as degraded, side by side: RGB uint8 (H, W, 3), at most `side` high."""
    shown = []
    for image, draws in ((vis, vis_draws), (ir, ir_draws)):
        top, left = (max(0, length - side) // 2 for length in image.shape[:2])
        middle = image[top : top + side, left : left + side]
        for part in (middle, *(draw.apply(middle) for draw in draws)):
            shown.append(to_levels(part))
    return side_by_side(shown)
