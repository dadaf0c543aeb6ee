"""Stores weights in half precision, in half the bytes, and says how far the largest change of a weight is.

python -m tools.halve runs/fsidfusion_ivf/FSIDFusion_IVF.pth models/FSIDFusion.pth --system fsidfusion

The file loads like any other, into float32 networks too. Whether a printed digit of a table moves is for the test
scripts to say: run them on both files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.common import InputError, check_writable, run_script
from zoo import SYSTEMS, find_system


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a file in the system's published format")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--system", choices=SYSTEMS, default="cddfuse", help="default: cddfuse")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return run_script(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        raise InputError(f"{args.out} exists; remove it first, or name another file")
    check_writable(args.out.parent)
    system = find_system(args.system)()
    about = system.load_published(args.weights)
    before = {key: value.clone() for key, value in system.state_dict().items()}
    system.save(args.out, about, half=True)
    system.load_published(args.out)
    change = max(
        float((value.double() - before[key].double()).abs().max()) for key, value in system.state_dict().items()
    )
    sizes = [path.stat().st_size / 1e6 for path in (args.weights, args.out)]
    print(f"{args.out}: {sizes[1]:.2f} MB instead of {sizes[0]:.2f}; no weight has changed by more than {change:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
