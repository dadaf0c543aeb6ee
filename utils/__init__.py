"""What every script of this project shares: one kind of error for bad input, and whole-or-nothing files."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C

ROOT = Path(__file__).resolve().parent.parent


class InputError(ValueError):
    """Bad input from the user. The message is one line: what, where, and the next command to run."""


def run_script(body: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a script's body, turning bad input and file errors into one line and exit code 2.

    Args:
        body: takes the parsed arguments and returns the exit code.
        args: parsed arguments; with `debug` set, errors keep their traceback.
    """
    try:
        return body(args)
    except (InputError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; files already written are whole", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved over it when the block ends well, removed otherwise.

    So `path` holds either what it held before or all of the new content, also after a crash or a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last because image writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def git_commit() -> str:
    """Short commit of this checkout, with `+` when tracked files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
