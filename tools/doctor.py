"""Checks this machine and this checkout, one line each: ok, what is only worth knowing (note), or what to do (FIX).

    python -m tools.doctor
    python -m tools.doctor --data path/to/test_img --weights path/to/published.pth
    python -m tools.doctor --record        # after new weights: stores their hash and what they answer

Python and the packages of requirements.txt; GPUs; the weights in models/: hash, keys, and a known answer, a bundled
pair fused on each device and compared with what was recorded; benchmark folders against results/manifests/; memory and
disk. Exit code 0 without a FIX, 2 with one.
"""

from __future__ import annotations

# Nothing beyond the standard library here: a package that is missing or broken is to be a line, not a traceback.
import argparse
import importlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils import common
from utils.common import InputError, file_sha256, in_checkout

MODULES = {"opencv-python-headless": "cv2", "scikit-image": "skimage"}  # where a package and its import differ in name
ANSWERS = ("models", "known_answers.json")
PAIR = ("Sample_IVF", "underpass")
GRID = 4  # the fused image is compared by the mean and the spread of so many by so many blocks
# Grey levels. On a CPU 0.0001 was measured with one thread and two, in tiles and whole, without oneDNN, and without
# vector instructions; wrong weights or arithmetic differ by whole levels. On a GPU the difference is not measured.
TOLERANCES = {"cpu": 0.05, "cuda": 1.0}
ENOUGH_GB = {"memory": 2.0, "disk": 1.0}
Finding = tuple[str, str, str]  # "ok", "note" or "FIX"; of what; text


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of benchmark sets (default: as the test scripts look for it)")
    add("--weights", type=Path, nargs="+", default=[], metavar="FILE", help="to check besides models/, or published")
    add("--system", default="cddfuse", metavar="NAME", help="what --weights are weights of (default: cddfuse)")
    add("--record", action="store_true", help=f"write {'/'.join(ANSWERS)} from the weights in models/, and exit")
    return common.run_script(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    if args.record:
        return record()
    print(f"commit {common.git_commit()}, {platform.platform()}, {os.cpu_count()} processors")
    fixes = 0
    for check in (check_packages, check_gpu, check_weights, check_data, check_space):
        try:
            for state, what, text in check(args):
                print(f"{state:<5}{what}: {text}", flush=True)
                fixes += state == "FIX"
        except Exception as error:  # whatever is broken, the other checks go on
            if args.debug:
                raise
            fixes += 1
            kind = "" if isinstance(error, InputError) else f"the check failed: {type(error).__name__}: "
            print(f"FIX  {check.__name__.removeprefix('check_')}: {kind}{common.reason_of(error)}", flush=True)
    print(f"{fixes} to fix" if fixes else "nothing to fix")
    return common.EXIT_BAD_INPUT if fixes else 0


def check_packages(args: argparse.Namespace) -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield "ok" if good else "FIX", "python", f"{platform.python_version()} ({sys.executable}); 3.11 or later is needed"
    requirements = in_checkout("requirements.txt").read_text(encoding="utf-8")
    for package, rule, wanted in re.findall(r"^([\w-]+)(>=|==)([\w.]+)", requirements, re.M):
        try:
            found = importlib.import_module(MODULES.get(package, package)).__version__
        except Exception as error:  # a library of the system that is missing raises what it likes
            reason = f"{type(error).__name__}: {common.reason_of(error)}"
            yield "FIX", package, f"{reason}; run `pip install -r requirements.txt`"
            continue
        fits = found.startswith(wanted) if rule == "==" else numbers(found) >= numbers(wanted)
        advice = "" if fits else f" where requirements.txt has {rule}{wanted}; run `pip install -r requirements.txt`"
        # The exact version of torch is that of the tables; others run, too.
        yield "ok" if fits else "note" if rule == "==" else "FIX", package, found + advice


def numbers(version: str) -> list[int]:
    """The first three numbers of a version: "2.13.0+cpu" -> [2, 13, 0]."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def check_gpu(args: argparse.Namespace) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        advice = "cannot use the NVIDIA GPU; install the build that https://pytorch.org names for this driver"
        yield "FIX", "gpu", f"torch {torch.__version__} (CUDA {torch.version.cuda}) {advice}"
    elif not torch.cuda.is_available():
        yield "ok", "gpu", f"none; the CPU is used, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        free, total = (size / 1e9 for size in torch.cuda.mem_get_info(index))
        yield "ok", f"gpu {index}", f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GB free"


def check_weights(args: argparse.Namespace) -> Iterator[Finding]:
    import torch

    from utils.inference.fusing import find_weights
    from zoo import find_system

    answers = json.loads(in_checkout(*ANSWERS).read_text(encoding="utf-8"))
    known = {in_checkout("models", name): answer for name, answer in answers.items()}
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    bundled = ((path, known[path]["system"]) for path in known)
    system = find_system(args.system)  # below "mif": both published files of CDDFuse are run on medical images
    others = ((path, args.system) for given in args.weights for path in find_weights(system, "mif", given))
    for (path, name), device in ((file, device) for file in itertools.chain(bundled, others) for device in devices):
        what, advice = f"{path} on {device}", "; or run `git checkout -- models`" if path in known else ""
        try:
            blocks, sha256 = answer(path, name, device), file_sha256(path)
        except (InputError, OSError, RuntimeError) as error:  # the last: such as a GPU this torch was not built for
            yield "FIX", what, f"{error}{advice}"
            continue
        wanted, tolerance = known.get(path, {"sha256": sha256, "blocks": blocks}), TOLERANCES[device.partition(":")[0]]
        good = all(abs(a - b) <= tolerance for a, b in zip(blocks, wanted["blocks"], strict=True))  # false for NaN
        text = f"all keys fit {name}, sha256 {sha256[:12]}; {'/'.join(PAIR)} is {'' if good else 'not '}as expected"
        if sha256 != wanted["sha256"]:
            good, text = False, f"is another file than was recorded{advice}, or `python -m tools.doctor --record`"
        elif not good:
            text += ": are there NaN in the file, other versions than requirements.txt has, changes of net.py?"
        yield "ok" if good else "FIX", what, text


def answer(weights: Path, system: str, device: str) -> list[float]:
    """The bundled pair fused: mean and standard deviation of each block of the image, in grey levels."""
    import numpy as np
    import torch

    from utils.data.images import read_grey
    from utils.inference.fusing import load_fuser, pick_device, to_levels, to_network
    from zoo import find_system

    where = pick_device(device)  # as the scripts do, which also decides the precision of a GPU
    fuser = load_fuser(find_system(system), "mif" if "MIF" in weights.stem else "ivf", weights, device=where)
    pair = [read_grey(in_checkout("test_img", PAIR[0], folder, f"{PAIR[1]}.png")) for folder in ("vi", "ir")]
    with torch.inference_mode():
        fused = to_levels(fuser(*(to_network(image, where) for image in pair)))
    blocks = [block for band in np.array_split(fused, GRID) for block in np.array_split(band, GRID, axis=1)]
    return [round(float(value), 4) for block in blocks for value in (block.mean(), block.std())]


def record() -> int:
    from zoo import SYSTEMS, find_system

    answers = {}
    for name in SYSTEMS:
        system = find_system(name)
        for file in sorted({*system.other_weights, *itertools.chain(*system.weights.values())}):
            path = in_checkout("models", file)
            answers[file] = {"system": name, "sha256": file_sha256(path), "blocks": answer(path, name, "cpu")}
    common.write_json(in_checkout(*ANSWERS), answers, indent=1)
    print(f"{in_checkout(*ANSWERS)}: {len(answers)} weight files")
    return 0


def check_data(args: argparse.Namespace) -> Iterator[Finding]:
    from utils.data.manifests import read_manifests, verify

    root = args.data or common.benchmark_root()
    if not root.is_dir():
        yield "FIX", "data", f"no folder at {root}; name one with --data or {common.DATA_VARIABLE}"
        return
    for manifest in read_manifests():
        path = root / manifest["set"]
        if not path.is_dir():
            yield "note", str(path), "is not there; only its tables need it (README, Data)"
        elif (verdict := verify(path, manifest)).is_published():
            yield "ok", str(path), str(verdict)
        else:
            yield "FIX", str(path), f"{verdict}; tables of it are not comparable with published ones"


def check_space(args: argparse.Namespace) -> Iterator[Finding]:
    for what, free in (("memory", common.free_memory()), ("disk", shutil.disk_usage(in_checkout()).free)):
        if free is not None:  # or else this system does not say
            state = "ok" if free >= ENOUGH_GB[what] * 1e9 else "FIX"
            yield state, what, f"{free / 1e9:.1f} GB free; {ENOUGH_GB[what]:g} are needed"


if __name__ == "__main__":
    raise SystemExit(main())
