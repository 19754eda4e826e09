"""Timing for the speed benchmarks: forward passes to compare with, hardware and versions."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from art_pixeldefend import PixelCNNpp, __version__

CHUNKS = (1, 4, 8, 16, 32, 64, 256, 1024)
SHORTEST = 0.3  # seconds; shorter calls are repeated


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Mean wall time of a call, which is repeated for at least :data:`SHORTEST` seconds."""
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < SHORTEST:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls += 1
    return (time.perf_counter() - start) / calls


@torch.inference_mode()
def forward(model: PixelCNNpp, x: Tensor, chunk: int, channels_last: bool) -> None:
    """Run plain forward passes over ``x`` in chunks, in the precision of decoding and scoring: no TF32."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with model.evaluating():
        for piece in x.split(chunk):
            model(piece.contiguous(memory_format=layout))


def fastest_forward(model: PixelCNNpp, x: Tensor) -> dict[str, Any]:
    """The chunk size and memory layout that take the least time, as arguments of :func:`forward`."""
    times = {}
    sizes = {min(chunk, len(x)) for chunk in CHUNKS if chunk >= len(x) // 64}  # smaller ones are never the fastest
    for chunk, last in product(sorted(sizes), (False, True)):
        some = x[: max(chunk, 64)]
        attempt = partial(forward, model, some, chunk, last)
        attempt()
        times[chunk, last] = min(seconds(attempt, model.device) for _ in range(2)) / len(some)
    chunk, last = min(times, key=times.__getitem__)
    return {"chunk": chunk, "channels_last": last}


def conditions(device: torch.device) -> dict[str, Any]:
    """Date, hardware and versions, for the JSON files of the speed benchmarks."""
    return {"date": date.today().isoformat(), "hardware": hardware(device), "versions": versions()}


def hardware(device: torch.device) -> dict[str, Any]:
    """The processor, its vector instructions, torch's number of threads, and the device."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return {
        "cpu": name, "vectors": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the packages that speed depends on."""
    found = {"python": platform.python_version(), "art-pixeldefend": __version__, "torch": torch.__version__}
    for package in ("numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
