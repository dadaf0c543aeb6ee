"""Speed and memory, never quality: `python -m benchmarks.NAME`. Here is what they share."""

from __future__ import annotations

import json
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import utils  # noqa: F401  before torch, see there

# isort: split
import torch

from utils.common import Parser, git_commit, resident_memory


def parser_of(doc: str) -> Parser:
    """A parser with the options that every benchmark has."""
    parser = Parser(doc)
    parser.add_argument("--load", default="", help="what else the machine was doing, for the record")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    return parser


def about(load: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine, the versions and the commit: for the start of a run, since a checkout may change during it."""
    known = ("torch", "numpy", "onnxruntime", "openvino")
    installed = {package.name for package in metadata.distributions()}
    return {
        "commit": git_commit(), "processor": processor(), "system": platform.platform(), "load": load,
        "device": torch.cuda.get_device_name(device) if str(device) != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in known if name in installed},
    }  # fmt: skip


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n")


def made_pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two images with smooth regions, edges, flat patches and noise: float32 (H, W), whole grey levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    images = []
    for _ in range(2):
        image = np.full((height, width), 90.0)
        for _ in range(6):
            phase = 2 * np.pi * (y / rng.uniform(20, 200) + x / rng.uniform(20, 200)) + rng.uniform(0, 6)
            image += rng.uniform(5, 20) * np.sin(phase)
        image += rng.normal(0, 3, size=image.shape)
        for _ in range(40):
            top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
            tall, wide = rng.integers(8, max(9, height // 4)), rng.integers(8, max(9, width // 4))
            patch = image[top : top + tall, left : left + wide]
            patch[:] = rng.uniform(0, 255) if rng.random() < 0.3 else patch + rng.uniform(-60, 60)
        images.append(np.round(image.clip(0, 255)).astype(np.float32))
    return images[0], images[1]


def time_in_turns(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, warm_up: int = 0, device: torch.device | str = "cpu"
) -> tuple[dict[Any, dict[str, list[float]]], dict[Any, Any]]:
    """Seconds of each call in each round, {"wall": [...], "cpu": [...]}, and what it gave last.

    Calls take turns, so that whatever else the machine does falls on all. Processor times leave out the moments when
    another program has the processor.
    """
    times: dict[Any, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in calls}
    results = {}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            results[name] = call()
            synchronise(device)
            if number >= warm_up:
                times[name]["wall"].append(time.perf_counter() - wall)
                times[name]["cpu"].append(time.process_time() - cpu)
    return times, results


def synchronise(device: torch.device | str) -> None:
    if str(device) != "cpu":
        torch.cuda.synchronize(device)


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of a module in a process of its own, as a process never gives back the memory it once had."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {"median": float(median), "q25": float(low), "q75": float(high), "calls": len(seconds)}


def peak_memory(reset: bool = False) -> int:
    """Most bytes that this process had resident, since the last reset. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    peak_memory(reset=True)
    before = resident_memory()
    call()
    return peak_memory() - before
