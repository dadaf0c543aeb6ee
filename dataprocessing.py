"""Aligned image folders -> one HDF5 file of training patches.

python dataprocessing.py                                    # MSRS_train/{ir,vi}, as published
python dataprocessing.py --data MSRS_train RoadScene_train  # several data sets into one file
python dataprocessing.py --holdout 20                       # and every 20th pair kept apart for validation
python dataprocessing.py --degrade --data SET               # no patches: a panel of what TSDM-Fusion trains on
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from utils.common import (
    BAD_PAIR,
    EXIT_BAD_INPUT,
    InputError,
    Parser,
    check_writable,
    in_checkout,
    left_out,
    number_in,
    progress,
    run_script,
)
from utils.data.degradation import INFRARED, VISIBLE, to_8_bits
from utils.data.images import luma_of, one_below_another, read_colour, read_luma, side_by_side, write_image
from utils.data.pairs import Pair, add_pair_option, find_modalities, open_pairs, set_name
from utils.data.patches import LAYOUTS, PatchWriter, is_low_contrast
from utils.data.readers import add_reading_options
from utils.data.saliency import visual_saliency
from utils.inference.memory import parse_size
from utils.metrics import SMALLEST_SCORED


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[], metavar="DIR",
        help="data sets: folders that hold ir/ and vi/, or MRI/ and one of CT/, PET/, SPECT/; one that is named twice "
        "counts twice (default: MSRS_train)")  # fmt: skip
    add("--vi", type=Path, nargs="+", default=[], metavar="DIR",
        help="visible (or MRI) folders, besides --data or instead")  # fmt: skip
    add("--ir", type=Path, nargs="+", default=[], metavar="DIR", help="infrared (or CT...) folders, one for each --vi")
    add_pair_option(parser)
    add("--patch-size", type=number_in(int, 2), default=128, help="side of a patch in pixels (default: 128)")
    add("--stride", type=number_in(int, 1), default=200,
        help="step between patches; 200 is published and leaves gaps (default: 200)")  # fmt: skip
    add("--out", type=Path, help="file to write (default: data/<names>_imgsize_<patch size>_stride_<stride>.h5)")
    add("--layout", choices=LAYOUTS, default="compact",
        help="compact: two compressed uint8 arrays, grey rounded; published: one float32 data set a patch")  # fmt: skip
    add("--holdout", type=number_in(int, 0), default=0, metavar="N",
        help="keep one pair in N of each data set out of the patches, in blocks of up to 8 neighbouring names, for "
        "train.py to validate on (default: 0, none)")  # fmt: skip
    add("--holdout-size", type=number_in(int, SMALLEST_SCORED), default=256,
        help="the middle of a validation pair, in pixels (default: 256)")  # fmt: skip
    add("--saliency", action="store_true", help="store saliency maps of the infrared images, which MLFuse trains on")
    add("--colour", action="store_true", help="keep the colours of visible images, for systems that train on them")
    add("--legacy-filter", action="store_true", help="keep black patches, as the published low-contrast filter does")
    text = "only write a panel of degraded pairs (default: data/degraded_<SEED>.png) and print what was drawn"
    add("--degrade", type=number_in(int, 0, 2**63 - 1), nargs="?", const=0, metavar="SEED", help=text)
    for name in ("vis", "ir"):
        text = "ranges for --degrade that differ, such as 'contrast=0.5:0.9 legacy=1' (utils/data/degradation.py)"
        add(f"--degrade-{name}", default="", metavar="RANGES", help=text)
    add_reading_options(parser)
    add("--max-memory", type=parse_size, metavar="SIZE",
        help="such as 2GB; a pair that takes more is left out (default: what is free)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(prepare, build_parser(), argv)


def prepare(args: argparse.Namespace) -> int:
    if args.holdout == 1:
        raise InputError("--holdout 1 would leave nothing to train on; keep one pair in 2 or more")
    if args.degrade is None and (args.degrade_vis or args.degrade_ir):
        raise InputError("--degrade-vis and --degrade-ir are for --degrade; training takes them as options of train.py")
    folders = source_folders(args)
    lists = [open_pairs(*both, args, args.max_memory) for both in folders]
    pairs = [pair for found in lists for pair in found.pairs]
    if args.degrade is not None:
        return show_degraded(args, pairs)
    names = "+".join(dict.fromkeys(set_name(vis) for vis, _ in folders))
    out = args.out or Path("data") / f"{names}_imgsize_{args.patch_size}_stride_{args.stride}.h5"
    if out.suffix not in (".h5", ".hdf5") or out.is_dir():
        raise InputError(f"--out {out} must be a file whose name ends in .h5")
    check_writable(out.parent)
    for (vis_folder, _), found in zip(folders, lists, strict=True):
        found.check_usable()
        if found.unmatched():
            print(f"warning: {vis_folder.parent}: {found.unmatched()}; left out", file=sys.stderr)
    validation = {pair for found in lists if args.holdout for pair in in_blocks(found.pairs, args.holdout)}
    if args.holdout and not validation:
        print(
            f"warning: --holdout {args.holdout} keeps none of {len(pairs)} pairs for validation; "
            "choose a smaller number",
            file=sys.stderr,
        )
    about = {
        "sources": ", ".join(f"{vis} + {ir}" for vis, ir in folders),
        "patch_size": args.patch_size,
        "stride": args.stride,
        "holdout": f"one in {args.holdout}, in blocks" if args.holdout else "none",
        "vi_range": "; ".join(dict.fromkeys(str(pair.vis_reading.range or "as stored") for pair in pairs)),
        "ir_range": "; ".join(dict.fromkeys(str(pair.ir_reading.range or "as stored") for pair in pairs)),
        "low_contrast_filter": "legacy" if args.legacy_filter else "published, black dropped",
    }
    return write_patches(args, out, about, pairs, validation)


def write_patches(
    args: argparse.Namespace, out: Path, about: dict[str, Any], pairs: list[Pair], validation: set[Pair]
) -> int:
    """Writes the patch file; a pair that cannot be used is named and left out, and then it returns 2."""
    seen_for_validation = set()  # each once, where a folder is named twice to have its patches twice
    kept = dropped = bad = 0
    with PatchWriter(out, args.patch_size, args.layout, about, saliency=args.saliency, colour=args.colour) as writer:
        for pair in progress(pairs, "images", "pair"):
            try:
                if pair in seen_for_validation:
                    continue
                if pair in validation:
                    seen_for_validation.add(pair)
                vis, ir = pair.read(read_colour if args.colour else read_luma, read_luma)
                if pair in validation:
                    if min(ir.shape) < SMALLEST_SCORED:
                        raise InputError(
                            f"{pair.vis} is {ir.shape[1]}x{ir.shape[0]}; a pair to validate on needs {SMALLEST_SCORED}"
                        )
                    writer.add_validation(str(pair.vis), *middle_of(vis, ir, args.holdout_size))
                    continue
                patches = cut_patches(pair, vis, ir, args.patch_size, args.stride, saliency=args.saliency)
            except BAD_PAIR as error:
                bad += 1
                left_out(pair.name, error, args)
                continue
            grey = (luma_of(patches[0]) if args.colour else patches[0], patches[1])
            good = [not any(is_low_contrast(p, args.legacy_filter) for p in both) for both in zip(*grey, strict=True)]
            writer.add(*(each[good] for each in patches))
            kept += sum(good)
            dropped += len(good) - sum(good)
        if not kept:
            advice = f"try a --patch-size below {args.patch_size}"
            if dropped:
                advice = (
                    "nearly constant sources are named above; --ir-range auto or --vi-range auto spreads their values"
                )
            raise InputError(
                f"not one patch was kept of {len(pairs)} pairs ({dropped} of low contrast, {bad} pairs left out); "
                f"{advice}. {out} was not written"
            )
    print(
        f"{out}: {kept} patches kept, {dropped} dropped for low contrast, {len(pairs)} pairs, "
        f"{len(validation)} for validation, {bad} left out"
    )
    return EXIT_BAD_INPUT if bad else 0


def in_blocks(pairs: Sequence[Pair], one_in: int) -> list[Pair]:
    """One pair in `one_in`, in blocks of up to 8 neighbours, which are often neighbouring frames of a video.

    Validation on a frame whose neighbours were trained on would measure memory.

    >>> in_blocks(range(60), 5)
    [16, 17, 18, 19, 20, 21, 22, 23, 56, 57, 58, 59]
    """
    length = max(1, min(8, len(pairs) // one_in))
    blocks = [pairs[start : start + length] for start in range(0, len(pairs), length)]
    # The middle one of every `one_in` blocks: the first and the last of a folder are often of one scene.
    return [pair for block in blocks[one_in // 2 :: one_in] for pair in block]


def show_degraded(args: argparse.Namespace, pairs: list[Pair]) -> int:
    """Writes a panel of pairs, spread evenly, the middle of each: visible, degraded twice, infrared, degraded twice."""
    most, side = 4, 256  # pairs, and pixels of each
    out = args.out or Path("data") / f"degraded_{args.degrade}.png"
    if out.suffix != ".png":
        raise InputError(f"--out {out} must end in .png")
    ranges = {"vis": VISIBLE.changed(args.degrade_vis), "ir": INFRARED.changed(args.degrade_ir)}
    chosen = [pairs[i * len(pairs) // most] for i in range(most)] if len(pairs) > most else pairs
    rows = []
    for number, pair in enumerate(chosen):
        rng = np.random.default_rng((args.degrade, number))
        draws = [(name, each.draw(rng)) for name, each in ranges.items() for _ in range(2)]
        try:
            both = [image / np.float32(255) for image in middle_of(*pair.read(read_colour, read_luma), side)]
        except BAD_PAIR as error:
            left_out(pair.name, error, args)
            continue
        shown = [[image, *(draw.apply(image) for name, draw in draws if name == role)]
                 for role, image in zip(ranges, both, strict=True)]  # fmt: skip
        rows.append(side_by_side([to_8_bits(image) for images in shown for image in images]))
        for name, draw in draws:
            print(f"{pair.name} {name}: {draw}")
    if not rows:
        raise InputError("not one pair could be shown; name other folders by --data")
    write_image(out, one_below_another(rows))
    print(f"{out}: each row visible, degraded twice, infrared, degraded twice")
    return EXIT_BAD_INPUT if len(rows) < len(chosen) else 0


def source_folders(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    if len(args.vi) != len(args.ir):
        raise InputError(
            f"--vi names {len(args.vi)} folders and --ir {len(args.ir)}; give as many of one as of the other"
        )
    named = list(zip(args.vi, args.ir, strict=True))
    data = args.data or ([] if named else [Path("MSRS_train")])
    if args.degrade is not None and not (args.data or named or data[0].exists()):
        data = [in_checkout("test_img", "Sample_IVF")]
    return [find_modalities(folder) for folder in data] + named


def middle_of(vis: np.ndarray, ir: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    top, left = (max(0, side - size) // 2 for side in ir.shape)
    middle = np.s_[top : top + size, left : left + size]
    return vis[middle], ir[middle]


def cut_patches(
    pair: Pair, vis: np.ndarray, ir: np.ndarray, size: int, stride: int, *, saliency: bool
) -> list[np.ndarray]:
    """All patches of a pair, row by row, (N, size, size) float32 in [0, 255]: vis, ir, and on request the saliency
    of ir. Of vis in colour, (N, size, size, 3).

    Raises:
        InputError: it is smaller than a patch.
    """
    if min(ir.shape) < size:
        raise InputError(f"{pair.vis} is {ir.shape[1]}x{ir.shape[0]}, smaller than a patch of {size}x{size}")
    images = [vis, ir]
    if saliency:
        # Of the whole image: what stands out in a patch is another question.
        images.append(visual_saliency(ir).astype(np.float32))
    shapes = [(size, size, *image.shape[2:]) for image in images]
    return [sliding_window_view(image, shape)[::stride, ::stride].reshape(-1, *shape)
            for image, shape in zip(images, shapes, strict=True)]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
