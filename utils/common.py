"""What every script of this project shares: one kind of error for bad input, and whole-or-nothing files."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")

BAD_PAIR = (ValueError, OSError, RuntimeError, MemoryError)  # what costs a pair only; RuntimeError: torch's memory
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what befalls one file will befall all
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C

DATA_VARIABLE = "FUSION_DATA"
LARGEST = 10**6  # number that an option takes, where nothing else is said
SECONDS_BETWEEN_LINES = 60  # of progress, where it goes to a log file

ROOT = Path(__file__).resolve().parent.parent

# Hidden temporary files say which machine and which process writes them, so that those of killed runs can be told.
_TEMPORARY = f".{zlib.crc32(socket.gethostname().encode()):08x}"

_sources: set[str] = set()  # real paths of files that this process has read and not written itself
_written: set[str] = set()
_unfinished: set[Path] = set()  # temporary files of this process
_swept: set[Path] = set()


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


def number_in(kind: type, least: float, most: float = LARGEST) -> Callable[[str], Any]:
    """A type for argparse: int or float from `least` to `most`; never NaN."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {least} to {most}, got {text[:20]!r}")

    return parse


class InputError(ValueError):
    """Bad input from the user. The message is one line: what, where, and the next command to run."""


class Parser(argparse.ArgumentParser):
    """What all scripts share: help that keeps its lines, --debug, and a wrong option is bad input like any other."""

    def __init__(self, description: str | None = None, **more: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        # Without a default, so that it may stand before the name of a sub-command as well as after it.
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the options")


def run_script(body: Callable[[argparse.Namespace], int], parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Runs a script, turning bad options, bad input and file errors into one line and exit code 2.

    Args:
        body: takes the parsed arguments and returns the exit code.
        parser: of the script's options; with --debug, errors keep their traceback.
        argv: the options; None for those of the command line.

    Any other exception is passed on with a note: it is a fault of the program or of what is installed.
    """
    args = argparse.Namespace(debug=False)
    try:
        parser.parse_args(argv, args)
        return body(args)
    except (InputError, OSError, MemoryError) as error:
        if args.debug:
            raise
        print(f"error: {reason_of(error)}", file=sys.stderr)
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


def remember_source(path: Path | str) -> None:
    """Notes that a file is read, or will be: from then on this process does not write over it."""
    real = os.path.realpath(path)
    if real not in _written:
        _sources.add(real)


def check_target(path: Path | str) -> Path:
    """The file that writing to `path` would write, through links.

    Raises:
        InputError: it is a source, a folder, or something else that is not a file, such as a device.
    """
    real = Path(os.path.realpath(path))
    if str(real) in _sources:
        raise InputError(f"{path} is one of the sources, and would be written over; name another place")
    if real.exists() and not real.is_file():
        raise InputError(f"{path} is a {'folder' if real.is_dir() else 'pipe or a device'}; name a file")
    return real


@contextlib.contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved over it when the block ends well, removed otherwise.

    So `path` holds either what it held before or all of the new content, also after a crash or a full disk. What a
    killed run has left unfinished in that folder is removed.

    Raises:
        InputError: as `check_target`.
    """
    path = check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    # A name of its own, not one made of the target's, which may be as long as the file system allows.
    temporary = path.with_name(f"{_TEMPORARY}.{os.getpid()}.{threading.get_ident()}.tmp{path.suffix}")
    _unfinished.add(temporary)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _written.add(str(path))
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file, whole or not at all; names of files in it may be any that a system allows."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def write_json(path: Path | str, content: Any, indent: int = 2) -> None:
    """As `write_text`, JSON in ASCII. Raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def write_csv(path: Path | str, rows: Iterable[Iterable[object]]) -> None:
    """As `write_text`, rows of values separated by commas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def _sweep(folder: Path) -> None:
    """Removes what killed runs have left, once for each folder."""
    if folder in _swept or os.name != "posix":  # elsewhere asking for a process could end it
        return
    _swept.add(folder)
    for path in set(folder.glob(f"{_TEMPORARY}.*.tmp*")) - _unfinished:
        owner = int(path.name.split(".")[2])
        try:
            if owner != os.getpid():  # a container gives the number of a killed process again
                os.kill(owner, 0)
                continue
        except ProcessLookupError:
            pass
        except PermissionError:  # it runs, for somebody else
            continue
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run_dir(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other runs out of a folder for the length of the block, or until this process is gone, however it went.

    Makes the folder where there is none, and takes that one away again if it is still empty at the end. Where the
    system cannot lock a folder (Windows, some network drives), nobody is kept out.

    Args:
        folder: what is locked.
        wait: until the others have ended, for work of an instant.

    Raises:
        InputError: another run has locked it, and nobody waits.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks, a folder that may not be read
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError as error:
                    raise InputError(
                        f"another process writes to {folder}: wait until it has ended, or choose another --out"
                    ) from error
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # a folder that is not empty
                folder.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def benchmark_root() -> Path:
    """The folder that benchmark sets are looked for in: as the environment says, else in this checkout."""
    given = os.environ.get(DATA_VARIABLE)
    return Path(given) / "test_img" if given else in_checkout("test_img")


def reason_of(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    silent = "there is not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    return (str(error).strip() or silent).splitlines()[0]


def left_out(name: str, error: Exception, args: argparse.Namespace, fate: str = "left out") -> None:
    """Names a bad pair, with what becomes of it; raises the error where the run cannot go on, or for --debug."""
    if args.debug or getattr(error, "errno", None) in HOPELESS:
        raise error
    from tqdm import tqdm  # here, as in `progress`

    tqdm.write(f"warning: {name}: {reason_of(error)}; {fate}", file=sys.stderr)


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


def resident_memory() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


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
