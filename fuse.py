"""Fuses any pair of images, two folders, two videos or two image sequences: in colour, under the visible names.

python fuse.py --ir ir.png --vi vi.png --out fused.png
python fuse.py --ir data/ir --vi data/vi --out data/fused --list data/pairs.json      # names and sizes are kept
python fuse.py --ir ir.mp4 --vi vi.mp4 --out fused.mkv                                # .mkv lossless, .avi, .mp4
python fuse.py --ir frames/ir --vi frames/vi --out fused.avi --fps 25                 # image sequences
python fuse.py --task mif --vi mri.png --ir pet.png --out fused.png                   # MRI and CT, PET or SPECT
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.common import (
    BAD_PAIR,
    EXIT_BAD_INPUT,
    LARGEST,
    InputError,
    Parser,
    check_target,
    check_writable,
    left_out,
    listed,
    number_in,
    progress,
    remember_source,
    run_script,
    sigterm_as_ctrl_c,
    write_json,
)
from utils.data.images import SUFFIXES, WRITABLE, check_format, luma_of, side_by_side, to_uint8, write_image
from utils.data.pairs import Pair, PairList, add_pair_option, open_pairs, read_as, refuse_one_source, task_of
from utils.data.readers import add_reading_options, readings_of, stem_of, suffix_of
from utils.data.registration import TOLERANCE, coverage, edge_shift, read_homography, register
from utils.data.sources import Source, read_sources
from utils.data.video import FrameFolder, RunningRange, SequencePair, VideoFile, VideoPair, check_video_name, is_video
from utils.inference.fusing import (
    COLOURS,
    SKIP_HELP,
    Fuser,
    add_inference_options,
    feature_maps,
    fuse_sources,
    keep_freed_memory,
    load_fuser,
    memory_for_files,
    pick_device,
    pick_precision,
)
from zoo import SYSTEMS, TASKS, find_system


@dataclass
class Session:
    """What one run does with every pair, and what it has found out on the way."""

    fuser: Fuser
    args: argparse.Namespace
    homography: np.ndarray | None
    fused: int = 0
    misaligned: dict[str, str] = field(default_factory=dict)

    def register(self, vis: Source, raw: Source, name: str, check: bool = True) -> Source:
        """The infrared source on the pixels of the visible one; a pair that looks misaligned is remembered."""
        advice = (
            "where both show the same view add --resize-ir, else --homography FILE, a 3x3 matrix from infrared to "
            "visible pixels"
        )
        ir = register(vis, raw, resize_ir=self.args.resize_ir, homography=self.homography, advice=advice)
        if self.homography is not None and not self.fused:
            covered = coverage(raw.size, self.homography, vis.size)
            if covered < 0.995:
                text = f"note: {raw.name} covers {covered:.0%} of the visible image; beyond it, its border is repeated"
                tqdm.write(text)
        # MRI and CT, PET or SPECT have too few edges in common for the check to mean anything.
        if check and self.args.task == "ivf" and not self.args.no_check:
            shift = edge_shift(vis.grey, ir.grey)
            if shift and shift.misaligned:
                self.misaligned[name] = str(shift)
        return ir

    def fuse(self, vis: Source, ir: Source, steady: RunningRange | None = None) -> np.ndarray:
        """Fuses a pair; `steady` takes the place of min-max normalisation, where the result is normalised at all."""
        args = self.args
        normalise = self.fuser.normalised and (steady or True)
        how = {"precision": args.precision, "max_memory": args.max_memory, "scratch": args.scratch}
        return fuse_sources(self.fuser.system, vis, ir, self.fuser.skip, args.colour, normalise=normalise, **how)

    def fuse_files(self, pair: Pair, target: Path, panel: Path) -> np.ndarray:
        """Fuses two files into one, draws the panel if it was asked for, and returns the fused image."""
        vis, raw = read_sources(pair)
        ir = self.register(vis, raw, pair.name)
        fused = self.fuse(vis, ir)
        write_image(target, fused, bits=self.args.bits)
        self.fused += 1
        if self.args.panel:
            self.write_panel(panel, vis, ir, fused)
        return fused

    def write_panel(self, path: Path, vis: Source, ir: Source, fused: np.ndarray) -> None:
        """Visible, infrared, the system's features where it shows some, fused."""
        maps = feature_maps(self.fuser.system, vis.grey, ir.grey)
        write_image(path, side_by_side([to_uint8(vis.shown), to_uint8(ir.shown), *maps.values(), to_uint8(fused)]))

    def warn_of_misaligned(self) -> None:
        if self.misaligned:
            off = listed(f"{name} by {shift}" for name, shift in self.misaligned.items())
            print(
                f"warning: by their edges, these infrared images look more than {TOLERANCE:g} pixels off: {off}. "
                f"Edges will be double; --homography FILE aligns, --no-check skips this check",
                file=sys.stderr,
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ir", type=Path, metavar="PATH", help="infrared (CT, PET, SPECT): image, folder or video")
    add("--vi", type=Path, required=True, metavar="PATH", help="visible (MRI): image, folder or video")
    add("--out", type=Path, required=True, metavar="PATH",
        help="image, video (.mkv lossless, .avi, .mp4), or folder, where files have their visible names")  # fmt: skip
    add_pair_option(parser)
    add("--colour", choices=COLOURS, default="both",
        help="sources that give the result the colour they have; none: a grey result (default: both)")  # fmt: skip
    add("--bits", type=int, choices=(8, 16), default=8, help="depth of the images written (default: 8)")
    add("--suffix", help="format in a folder, such as .png (default: that of the visible file)")
    add("--resize-ir", action="store_true", help="resize the infrared image to the size of the visible one")
    add("--homography", type=Path, metavar="FILE",
        help="3x3 matrix from infrared to visible pixels (x, y, 1): text, .json or .npy")  # fmt: skip
    add("--no-check", action="store_true", help="do not look whether the pair is aligned")
    add("--panel", action="store_true",
        help="also write inputs, features, where the system shows them, and result in a row")  # fmt: skip
    add("--list", type=Path, metavar="FILE", help="folders: write the pairing list, JSON")
    add("--annotations", type=Path, metavar="DIR", help="folder of annotation files to name in --list, by file name")
    add("--sequence", action="store_true",
        help="the folders hold frames of one scene: steady brightness, in the order of their numbers")  # fmt: skip
    add("--fps", type=number_in(float, 0.01, 999),
        help="frames a second of the video (default: those of the visible video, else 25)")  # fmt: skip
    add("--offset", type=number_in(float, -LARGEST), default=0.0, metavar="SECONDS",
        help="two videos: how much later the infrared one began; may be negative (default: 0)")  # fmt: skip
    add("--smooth", type=number_in(float, 0), default=1.0, metavar="SECONDS",
        help="videos: how slowly the range that is normalised follows the frames; 0: at once (default: 1)")  # fmt: skip
    add("--normalise", action=argparse.BooleanOptionalAction,
        help="min-max normalise the fused image (default: as the system's published test does)")  # fmt: skip
    add("--task", choices=TASKS, default="ivf", help="ivf: infrared and visible, mif: medical (default: ivf)")
    add("--system", choices=list(SYSTEMS), default="cddfuse", help="default: cddfuse")
    add("--weights", type=Path, metavar="FILE",
        help="or published (default: that in models/ for the system and the task)")  # fmt: skip
    add("--skip", help=SKIP_HELP)
    add_reading_options(parser)
    add_inference_options(parser)
    return run_script(fuse, parser, argv)


def fuse(args: argparse.Namespace) -> int:
    """Chooses among pair, folders and videos; all that can be wrong with the options is said before a network runs."""
    if not (args.ir or args.ir_from_alpha):
        raise InputError("--ir PATH is missing: the infrared image, folder or video")
    args.ir = args.ir or args.vi
    for path in (args.ir, args.vi):
        if not path.exists():
            raise FileNotFoundError(f"nothing at {path}; --ir and --vi each name an image, a folder or a video")
        if os.path.realpath(args.out) == os.path.realpath(path):
            raise InputError(f"--out {args.out} would write over the source; name another place")
    if not args.ir_from_alpha:
        refuse_one_source(args.vi, args.ir)
    kind, other = kind_of(args.ir), kind_of(args.vi)
    if kind != other:
        raise InputError(f"{args.ir} is {kind} but {args.vi} is {other}; --ir and --vi must be of one kind")
    check_options(args, kind)
    homography = read_homography(args.homography) if args.homography else None
    device = pick_device(args.device)
    keep_freed_memory()
    found, target = None, args.out
    if kind != "a video":
        found = find_pairs(args, kind, memory_for_files(args.max_memory, device))
    if kind == "an image":
        target = target_of(args, found)
    args.precision = pick_precision(args.precision, device)
    system = find_system(args.system)
    fuser = load_fuser(system, args.task, args.weights, args.skip, normalised=args.normalise, device=device)
    remember_source(fuser.weights)
    session = Session(fuser, args, homography)
    named = task_of(args.vi, args.ir)
    if named and named != args.task:
        print(f"warning: {args.vi} and {args.ir} look like a case for --task {named}", file=sys.stderr)
    with sigterm_as_ctrl_c():  # videos are closed so that they play, lists are written
        if kind == "a video" or args.sequence or is_video(args.out):
            return fuse_moving(session, found)
        if kind == "an image" and len(found.pairs) == 1:
            return fuse_pair(session, found.pairs[0], target)
        return fuse_folder(session, found)


def kind_of(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a video" if is_video(path) else "an image"


def check_options(args: argparse.Namespace, kind: str) -> None:
    to_video = is_video(args.out)
    if to_video and kind == "an image":
        raise InputError(f"{args.out} is a video but {args.vi} is an image; name an image")
    if to_video or (kind == "a video" and args.out.suffix and not args.out.is_dir()):
        check_video_name(args.out)
    if to_video and args.bits == 16:
        raise InputError("videos have 8 bits; for 16 name a folder with --out, and images are written there")
    if kind != "an image" and suffix_of(args.out) in SUFFIXES and not args.out.is_dir():
        raise InputError(f"{args.out} is one image but {args.vi} is {kind}; name a folder with --out")
    if (args.list or args.annotations or args.sequence) and kind != "a folder":
        raise InputError("--list, --annotations and --sequence are for folders")
    if args.list and (args.sequence or to_video):
        raise InputError("--list is for folders of single pairs, not for the frames of one scene")
    if args.annotations and not args.list:
        raise InputError("--annotations is for --list FILE, which names the annotation of every pair")
    if args.resize_ir and args.homography:
        raise InputError("--resize-ir and --homography exclude each other: a homography sees to the size, too")
    if args.offset and kind != "a video":
        raise InputError("--offset is for two videos")
    if args.suffix:
        check_format(Path("image" + args.suffix), args.bits)
        if Path("image" + args.suffix).name != "image" + args.suffix:
            raise InputError(f"--suffix {args.suffix} must be a format such as .png; --out names the folder")


def name_in_folder(pair: Pair, args: argparse.Namespace) -> str:
    """Annotations name images with their suffix, so that is kept, too, unless it is asked for another one."""
    suffix = args.suffix or (pair.vis.suffix if suffix_of(pair.vis) in WRITABLE else ".png")
    name = (pair.name if args.slice == "all" else stem_of(pair.vis)) + suffix
    check_format(Path(name), args.bits)
    return name


def find_pairs(args: argparse.Namespace, kind: str, memory: int | None) -> PairList:
    """The pairs of two folders, or the one of two images (one a slice with --slice all)."""
    if kind == "an image":
        remember_source(args.vi)
        remember_source(args.ir)
        return read_as(PairList((Pair(stem_of(args.vi), args.vi, args.ir),), (), ()), args, memory)
    found = open_pairs(args.vi, args.ir, args, memory)
    if found.unmatched():
        print(f"warning: {found.unmatched()}; left out", file=sys.stderr)
    if args.list:
        check_target(args.list)
    if not (args.resize_ir or args.homography):
        found.check_usable("; add --resize-ir where both show the same view, else --homography FILE")
    for pair in found.pairs if not is_video(args.out) else ():
        name_in_folder(pair, args)  # says what cannot be written
    return found


def target_of(args: argparse.Namespace, found: PairList) -> Path:
    """The file of a single pair, which may be written, and its panel too."""
    names_file = args.out.suffix and not args.out.is_dir()
    if names_file and len(found.pairs) > 1:
        raise InputError(f"{args.out} is one image but {args.vi} holds {len(found.pairs)} slices; name a folder")
    target = args.out if names_file else args.out / name_in_folder(found.pairs[0], args)
    check_format(target, args.bits)
    for path in (target, panel_beside(target))[: 1 + args.panel]:
        check_target(path)
    return target


def fuse_pair(session: Session, pair: Pair, target: Path) -> int:
    started = time.perf_counter()
    fused = session.fuse_files(pair, target, panel_beside(target))
    elapsed_s = time.perf_counter() - started
    kind, bits = "grey" if fused.ndim == 2 else "colour", session.args.bits
    print(f"{target}: {fused.shape[1]}x{fused.shape[0]}, {kind}, {bits} bits, fused in {elapsed_s:.2f} s")
    if session.args.panel:
        print(f"{panel_beside(target)}: visible, infrared, features (where the system shows them), fused")
    session.warn_of_misaligned()
    return 0


def fuse_folder(session: Session, found: PairList) -> int:
    """Fuses each pair on its own into a folder. A bad pair is named and left out; returns 2 if there was one."""
    args = session.args
    check_writable(args.out)
    annotations = annotations_in(args.annotations) if args.annotations else {}
    done: list[dict[str, str | None]] = []
    started = time.perf_counter()
    try:
        for pair in progress(found.pairs, str(args.out), "pair"):
            target = args.out / name_in_folder(pair, args)
            try:
                session.fuse_files(pair, target, args.out / "panels" / f"{pair.name}.png")
            except BAD_PAIR as error:
                left_out(f"{args.out.name}/{pair.name}", error, args)
                continue
            entry = {"name": pair.name, "ir": str(pair.ir), "vi": str(pair.vis), "fused": str(target)}
            done.append(entry | ({"annotation": annotations.get(pair.name)} if args.annotations else {}))
    finally:
        if args.list and done:
            write_json(args.list, session.fuser.about() | {"weights": str(session.fuser.weights), "pairs": done})
            print(f"{args.list}: the pairing list")
    elapsed_s = time.perf_counter() - started
    each = f", in {elapsed_s:.1f} s ({elapsed_s / len(done):.2f} s a pair)" if done else ""
    print(f"{args.out}: {len(done)} of {len(found.pairs)} pairs fused{each}")
    without = [entry["name"] for entry in done if args.annotations and not entry["annotation"]]
    if without:
        print(f"warning: no annotation in {args.annotations} for {listed(without)}", file=sys.stderr)
    session.warn_of_misaligned()
    return 0 if len(done) == len(found.pairs) else EXIT_BAD_INPUT


def annotations_in(folder: Path) -> dict[str, str]:
    """File name without suffix -> path of every file of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of annotations at {folder}")
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."]
    for path in paths:
        remember_source(path)
    return {path.stem: str(path) for path in paths}


def fuse_moving(session: Session, found: PairList | None) -> int:
    """Fuses videos or sequences frame by frame, to a video or to a folder. Returns 2 if frames had to be left out."""
    args = session.args
    frames = SequencePair(found) if found else VideoPair(args.vi, args.ir, args.offset, readings_of(args))
    rate = args.fps or frames.rate
    names = {pair.name: name_in_folder(pair, args) for pair in found.pairs} if found else {}
    started = time.perf_counter()
    to_video = is_video(args.out)
    if to_video:
        target = VideoFile(args.out, rate)
    else:
        target = contextlib.nullcontext(FrameFolder(args.out, names, args.suffix, args.bits))
    with target as sink:
        bad = fuse_frames(session, frames, rate, sink)
    elapsed_s = time.perf_counter() - started
    print(f"{args.out}: {sink.written} {sink.what}, in {elapsed_s:.1f} s ({sink.written / elapsed_s:.2f} a second)")
    if to_video and sink.padded:
        print("note: videos have even sides; the last column or row is there twice", file=sys.stderr)
    session.warn_of_misaligned()
    if frames.rest:
        print(f"warning: {frames.rest}", file=sys.stderr)
    return EXIT_BAD_INPUT if bad or frames.rest else 0


def fuse_frames(session: Session, frames: VideoPair | SequencePair, rate: float, sink: VideoFile | FrameFolder) -> int:
    """Fuses and writes every frame, prints the flicker, and returns how many frames were bad."""
    args, bad = session.args, 0
    steady, means = RunningRange(args.smooth * rate), []
    for name, load in progress(frames, str(args.out), "frame", frames.count):
        try:
            vis, ir = load()
            ir = session.register(vis, ir, name, check=not session.fused)
            fused = session.fuse(vis, ir, steady)
            sink.write(fused, name)
        except BAD_PAIR as error:
            if not session.fused:  # what is wrong with the first frame is wrong with all of them
                raise
            left_out(name, error, args, sink.stand_in())
            bad += 1
            continue
        if args.panel and not session.fused:
            session.write_panel(panel_beside(args.out), vis, ir, fused)
        session.fused += 1
        means.append((luma_of(fused).mean(), vis.grey.mean(), ir.grey.mean(), steady.mean_alone))
    if not session.fused:
        raise InputError(f"{args.vi} and {args.ir} have no frame that can be read")
    if len(means) > 1:
        *flicker, alone = np.abs(np.diff(means, axis=0)).mean(axis=0)
        parts = [f"{name} {mean:.2f}" for name, mean in zip(("fused", "visible", "infrared"), flicker, strict=True)]
        each = f"; {alone:.2f} if each frame were normalised alone" if session.fuser.normalised else ""
        print(f"flicker (mean change of the mean grey level between frames): {', '.join(parts)}{each}")
    return bad


def panel_beside(target: Path) -> Path:
    return target.with_name(f"{target.stem}_panel.png")


if __name__ == "__main__":
    sys.exit(main())
