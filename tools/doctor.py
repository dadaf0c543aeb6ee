"""Checks this machine and this checkout, one line each: ok, what is only worth knowing (note), or what to do (FIX).

    python -m tools.doctor
    python -m tools.doctor --data path/to/test_img --weights path/to/published.pth
    python -m tools.doctor --record        # after new weights: stores their hash and what they answer

Python and the packages of requirements.txt; the GPU against the torch build; the weights in models/, their hash and
keys; a known answer, a bundled pair fused and compared with what was recorded; benchmark folders against
results/manifests/;
memory and disk. Exit code 0 without a FIX, 2 with one.
"""

from __future__ import annotations

# Nothing beyond the standard library here: a package that is missing or broken is to be a line, not a traceback.
import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.common import (
    DATA_VARIABLE,
    EXIT_BAD_INPUT,
    InputError,
    benchmark_root,
    file_sha256,
    free_memory,
    git_commit,
    in_checkout,
    run_script,
    whole_file,
)

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = "2.11"
MODULES = {"opencv-python-headless": "cv2"}  # where a package and what is imported differ in name
ANSWERS = "known_answers.json"
PAIR = ("Sample_IVF", "underpass")
GRID = 4  # the fused image is compared by the mean and the spread of so many by so many blocks
# Grey levels. On a CPU 0.0001 was measured with one thread and two, in strips and whole, without oneDNN, and without
# vector instructions; wrong weights or arithmetic differ by whole levels. CUDA convolves in TF32 by default, with 10
# bits after the point; how far that moves the answer has not been measured.
TOLERANCES = {"cpu": 0.05, "cuda": 1.0}
ENOUGH_MEMORY_GB = 2.0
ENOUGH_DISK_GB = 1.0


class Finding(NamedTuple):
    state: str  # "ok", "note" or "FIX"
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5}{self.what}: {self.text}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of benchmark sets (default: as the test scripts look for it)")
    add(
        "--weights",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="weights to check besides models/, or published",
    )
    add("--system", default="cddfuse", metavar="NAME", help="what --weights are weights of (default: cddfuse)")
    add("--record", action="store_true", help=f"write models/{ANSWERS} from the weights in models/, and exit")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(run, build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> int:
    if args.record:
        return record()
    print(f"commit {git_commit()}, {platform.platform()}, {os.cpu_count()} processors")
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("gpu", check_gpu),
        ("weights", lambda: check_weights(args.weights, args.system)),
        ("known answer", check_answers),
        ("data", lambda: check_data(args.data)),
        ("memory", check_memory),
        ("disk", check_disk),
    ]
    fixes = 0
    for what, check in checks:
        try:
            for finding in check():
                print(finding, flush=True)
                fixes += finding.state == "FIX"
        except Exception as error:  # whatever is broken, the other checks go on
            if args.debug:
                raise
            fixes += 1
            first = (str(error).splitlines() or [""])[0]
            print(Finding("FIX", what, f"the check failed: {type(error).__name__}: {first}"), flush=True)
    print(f"{fixes} to fix" if fixes else "nothing to fix")
    return EXIT_BAD_INPUT if fixes else 0


def check_python() -> Iterator[Finding]:
    found, wanted = platform.python_version(), ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info >= OLDEST_PYTHON:
        yield Finding("ok", "python", f"{found} ({sys.executable})")
    else:
        yield Finding("FIX", "python", f"{found} is older than {wanted}; make an environment with Python {wanted}")


def check_packages() -> Iterator[Finding]:
    for line in in_checkout("requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if not requirement:
            continue
        package, rule, wanted = re.fullmatch(r"([\w-]+)\s*(>=|==)\s*([\w.]+)", requirement).groups()
        try:
            found = importlib.import_module(MODULES.get(package, package)).__version__
        except Exception as error:  # a library of the system that is missing raises what it likes
            first = (str(error).splitlines() or [""])[0]
            yield Finding("FIX", package, f"cannot be imported ({first}); run `pip install -r requirements.txt`")
            continue
        if package == "torch" and numbers(found) != numbers(wanted) and numbers(found) >= numbers(OLDEST_TORCH):
            yield Finding("note", package, f"{found}; runs, but the tables were made with {wanted}")
        elif numbers(found) < numbers(wanted):
            yield Finding("FIX", package, f"{found} is older than {wanted}; run `pip install -r requirements.txt`")
        else:
            yield Finding("ok", package, found)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with, three of them, to compare.

    >>> numbers("2.13.0+cpu") == numbers("2.13") > numbers("2.9.1")
    True
    """
    found = [int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number][:3]
    return tuple(found + [0] * (3 - len(found)))


def check_gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            yield Finding("ok", "gpu", f"none; the CPU is used, {torch.get_num_threads()} threads")
        elif torch.version.cuda is None:
            yield Finding("FIX", "gpu", f"torch {torch.__version__} is a CPU build beside an NVIDIA GPU; install the "
                          "CUDA build that https://pytorch.org names for this driver")  # fmt: skip
        else:
            yield Finding("FIX", "gpu", f"torch is built for CUDA {torch.version.cuda} but finds no GPU; does "
                          "`nvidia-smi` show one, and is CUDA_VISIBLE_DEVICES empty?")  # fmt: skip
        return
    built_for = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        what = f"gpu {index}"
        name = f"{properties.name}, sm_{properties.major}{properties.minor}"
        if not fits((properties.major, properties.minor), built_for):
            yield Finding("FIX", what, f"{name} is not among what torch {torch.__version__} is built for "
                          f"({' '.join(built_for)}); install a build that has it, or use --device cpu")  # fmt: skip
            continue
        free, total = torch.cuda.mem_get_info(index)
        # Whole numbers, so that the sums are exact in any order and any of the precisions a GPU may take.
        x = torch.arange(4096.0).remainder(7).reshape(64, 64)
        wrong = not torch.equal((x.to(index) @ x.to(index)).cpu(), x @ x)
        if wrong:
            yield Finding("FIX", what, f"{name} multiplies two matrices wrongly; renew its driver, or use --device cpu")
        else:
            yield Finding("ok", what, f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def fits(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether code for one of these architectures runs on a GPU: the same generation, or to be compiled there.

    >>> fits((8, 9), ["sm_80", "sm_90"]), fits((12, 0), ["sm_90"]), fits((12, 0), ["sm_90", "compute_90"])
    (True, False, True)
    """
    for architecture in built_for:
        kind, _, number = architecture.partition("_")
        digits = re.match(r"\d+", number)[0]
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def check_weights(others: Sequence[Path], system_of_others: str = "cddfuse") -> Iterator[Finding]:
    answers = read_answers()
    for name in sorted(answers):
        path, system = in_checkout("models", name), answers[name]["system"]
        if not path.is_file():
            yield Finding("FIX", str(path), "is missing; run `git checkout -- models`")
            continue
        sha256 = file_sha256(path)
        if sha256 == answers[name]["sha256"]:
            yield Finding("ok", str(path), f"{describe(path, system)}, sha256 {sha256[:12]} as recorded")
        else:
            try:
                described = describe(path, system)
            except InputError as error:
                yield Finding("FIX", str(path), f"{error}; or run `git checkout -- models`")
                continue
            yield Finding("FIX", str(path), f"{described}, but sha256 {sha256[:12]} is not the recorded "
                          f"{answers[name]['sha256'][:12]}; run `git checkout -- models`, or `python -m tools.doctor "
                          "--record` if you have trained them")  # fmt: skip
    for path in others:
        try:
            for file in published_or(path, system_of_others):
                yield Finding("ok", str(file), f"{describe(file, system_of_others)}, sha256 {file_sha256(file)[:12]}")
        except (InputError, OSError) as error:
            yield Finding("FIX", str(path), str(error).removeprefix(f"{path} "))


def published_or(path: Path, system: str) -> list[Path]:
    """The file itself; for the word "published", the files that tools/download.py fetches.

    Raises:
        InputError: they have not been fetched, or are other files.
    """
    from tools.download import BLOBS, git_blob_id
    from utils.inference.fusing import PUBLISHED, find_weights
    from zoo import find_system

    files = find_weights(find_system(system), "mif", path)  # for medical images both files are run
    for file in files if str(path) == PUBLISHED else []:
        if git_blob_id(file) != BLOBS[file.name]:
            raise InputError(f"{file} is not the published file; remove it and run `python -m tools.download weights`")
    return files


def describe(path: Path, system: str) -> str:
    """Loads a file of a system's weights, key for key, and says what it is.

    Raises:
        FileNotFoundError, InputError: as `utils.inference.checkpoint.load_checkpoint`; or a weight is not finite.
    """
    import torch

    from utils.inference.checkpoint import read_file
    from utils.inference.fusing import load_fuser
    from zoo import find_system

    fuser = load_fuser(find_system(system), weights=path)
    state = fuser.state_dict()
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise InputError(f"{path} holds NaN or infinite weights ({bad[0]}); copy or train it again")
    parts = (part for part in read_file(path).values() if isinstance(part, dict))
    keys = sum(isinstance(value, torch.Tensor) for part in parts for value in part.values())
    return f"{keys} keys fit {fuser.system.label}, all finite"


def check_answers() -> Iterator[Finding]:
    import torch

    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        for name, known in read_answers().items():
            path = in_checkout("models", name)
            if not path.is_file() or file_sha256(path) != known["sha256"]:
                continue  # named by check_weights
            what = f"known answer of {name}, {device}"
            blocks = answer(path, known["system"], device)
            difference = max(abs(a - b) for a, b in zip(blocks, known["blocks"], strict=True))
            if difference <= TOLERANCES[device.partition(":")[0]]:  # also false for NaN
                yield Finding("ok", what, f"{'/'.join(PAIR)} within {difference:.4f} grey levels of the record")
            else:
                yield Finding("FIX", what, f"{'/'.join(PAIR)} is {difference:.3g} grey levels from the record; install "
                              f"torch as requirements.txt names it, {'try --device cpu, ' if device != 'cpu' else ''}"
                              "and undo changes of net.py (`git diff`)")  # fmt: skip


def answer(weights: Path, system: str, device: str) -> list[float]:
    """The bundled pair fused: mean and standard deviation of each block of the image, in grey levels."""
    import numpy as np

    from utils.data.pairs import list_pairs
    from utils.inference.fusing import fuse_arrays, load_fuser
    from zoo import find_system

    folder = in_checkout("test_img", PAIR[0])
    pair = next(pair for pair in list_pairs(folder / "vi", folder / "ir").pairs if pair.name == PAIR[1])
    fuser = load_fuser(find_system(system), weights=weights, device=device)
    fused = fuse_arrays(fuser.system, *pair.read(), fuser.skip, normalise=fuser.stretched)
    blocks = [block for band in np.array_split(fused, GRID) for block in np.array_split(band, GRID, axis=1)]
    return [round(float(value), 4) for block in blocks for value in (block.mean(), block.std())]


def read_answers() -> dict[str, Any]:
    path = in_checkout("models", ANSWERS)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); run `git checkout -- {path}`") from error


def record() -> int:
    from zoo import SYSTEMS, find_system

    path = in_checkout("models", ANSWERS)
    answers = {}
    for name in SYSTEMS:
        system = find_system(name)
        bundled = {*system.other_weights, *(file for files in system.weights.values() for file in files)}
        for weights in filter(Path.is_file, (in_checkout("models", file) for file in sorted(bundled))):
            blocks = answer(weights, name, "cpu")
            answers[weights.name] = {"system": name, "sha256": file_sha256(weights), "blocks": blocks}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(answers)} weight files")
    return 0


def check_data(folder: Path | None) -> Iterator[Finding]:
    from utils.data.manifests import read_manifests, verify

    root = folder or benchmark_root()
    if not root.is_dir():
        yield Finding("FIX", "data", f"no folder at {root}; name one with --data or {DATA_VARIABLE}")
        return
    absent = []
    for manifest in read_manifests():
        path = root / manifest["set"]
        if not path.is_dir():
            absent.append(manifest["set"])
            continue
        verdict = verify(path, manifest)
        if verdict.is_published():
            yield Finding("ok", str(path), str(verdict))
        else:
            yield Finding("FIX", str(path), f"{verdict}; tables of it are not comparable with published ones")
    if absent:
        yield Finding("note", "data", f"not in {root}: {', '.join(absent)} (README, Data); only their tables "
                      "need them, and `python -m tools.download` can fetch them")  # fmt: skip


def check_memory() -> Iterator[Finding]:
    free = free_memory()
    if free is None:
        yield Finding("note", "memory", "this system does not say how much is free")
    elif free < ENOUGH_MEMORY_GB * 1e9:
        yield Finding("FIX", "memory", f"{free / 1e9:.1f} GB free, less than {ENOUGH_MEMORY_GB:g}; end other programs, "
                      "or give the container more")  # fmt: skip
    else:
        yield Finding("ok", "memory", f"{free / 1e9:.1f} GB free")


def check_disk() -> Iterator[Finding]:
    free = shutil.disk_usage(in_checkout()).free / 1e9
    if free < ENOUGH_DISK_GB:
        yield Finding("FIX", "disk", f"{free:.1f} GB free here, less than {ENOUGH_DISK_GB:g}; remove old runs/")
    else:
        yield Finding("ok", "disk", f"{free:.1f} GB free here")


if __name__ == "__main__":
    raise SystemExit(main())
