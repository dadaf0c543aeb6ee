"""What every script of this project shares: one kind of error for bad input, and whole-or-nothing files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C

DATA_VARIABLE = "FUSION_DATA"
SECONDS_BETWEEN_LINES = 60  # of progress, where it goes to a log file

ROOT = Path(__file__).resolve().parent.parent


def in_checkout(*parts: str) -> Path:
    """A path in this checkout, relative where the script is run from there, so that messages stay short."""
    path = ROOT.joinpath(*parts)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def progress(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal; in a log file with a line a minute, so that it does not seem stuck.

    Args:
        items: what is worked on.
        name: what is shown before the count.
        unit: one of the items, in the singular.
        total: how many there are, where they cannot be asked.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        from tqdm import tqdm  # here, because the doctor says what to do where it is missing

        yield from tqdm(items, desc=name, unit=unit, total=total)
        return
    told = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            print(f"{name}: {number} of {total or 'an unknown number of'} {unit}s", file=sys.stderr, flush=True)
            told = time.monotonic()


class InputError(ValueError):
    """Bad input from the user. The message is one line: what, where, and the next command to run."""


def run_script(body: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a script's body, turning bad input and file errors into one line and exit code 2.

    Args:
        body: takes the parsed arguments and returns the exit code.
        args: parsed arguments; with `debug` set, errors keep their traceback.

    Any other exception is passed on with a note: it is a fault of the program or of what is installed.
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
    except Exception as error:
        error.add_note("not your input's fault: `python -m tools.doctor` checks this machine; report both outputs")
        raise


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within it, what a cluster sends ends a run as Ctrl-C does. Only a main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved over it when the block ends well, removed otherwise.

    So `path` holds either what it held before or all of the new content, also after a crash or a full disk.
    """
    path = Path(os.path.realpath(path))  # through a link, which stays one
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, not one made of the target's, which may be as long as the file system allows.
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder for the length of the block, or until this process is gone, however it went.

    Makes the folder where there is none, and takes that one away again if it is still empty at the end. Where the
    system cannot lock a folder (Windows, some network drives), nobody is kept out.

    Raises:
        InputError: another run has locked it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise InputError(
                        f"another process writes to {folder}: wait until it has ended, or choose another --out"
                    ) from error
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # a folder that is not empty
                folder.rmdir()
        if fcntl:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def benchmark_root() -> Path:
    """The folder that benchmark sets are looked for in: as the environment says, else in this checkout."""
    given = os.environ.get(DATA_VARIABLE)
    return Path(given) / "test_img" if given else in_checkout("test_img")


def free_memory() -> int | None:
    """Bytes that this process may still take without swapping, its container's limit included; None where the
    system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free  # no group, or one without a limit ("max")
    return max(0, min(free, left))


def listed(names: Iterable[object], most: int = 5) -> str:
    """Names for a message, sorted: the first few, and how many more there are.

    >>> listed("dacb", most=3)
    'a, b, c and 1 more'
    """
    names = sorted(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"


def check_writable(folder: Path) -> None:
    """Makes a folder and finds out before the work, not after it, that nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def git_commit() -> str:
    """Short commit of this checkout, with `+` when tracked files differ from it; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
