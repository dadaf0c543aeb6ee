"""Writes the manifest of a set: names and hashes of its images, which `evaluate.py --verify-data` compares with.

python -m tools.make_manifest test_img/TNO               # writes results/manifests/TNO.json
python -m tools.make_manifest my_set --out my_set.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from utils.common import InputError, Parser, check_target, in_checkout, run_script, write_json
from utils.data.manifests import make_manifest


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "sets", type=Path, nargs="+", metavar="SET", help="folder with vi/ and ir/, or MRI/ and CT/ ..."
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/manifests/<name of the folder>.json")
    return run_script(run, parser, argv)


def run(args: argparse.Namespace) -> int:
    if args.out and len(args.sets) > 1:
        raise InputError(f"--out names one file, but {len(args.sets)} sets were given; run once for each")
    for folder in args.sets:
        manifest = make_manifest(folder)
        path = check_target(args.out or in_checkout("results", "manifests", f"{manifest['set']}.json"))
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).get("images") != manifest["images"]:
            raise InputError(f"{path} lists other images than {folder}; choose another name with --out, or remove it")
        write_json(path, manifest, indent=1)
        print(f"{path}: {manifest['pairs']} pairs, images {manifest['images']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
