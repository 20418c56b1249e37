"""Time and memory of the sides of a benchmark: turns, medians, the share of each kind of work, and the machine."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypedDict

import psutil
import torch
import transformers

from ..models import choose_device


class Row(TypedDict, total=False):
    """One side of a benchmark, as the record holds it."""

    rows: int
    """Of a batch."""
    length: int
    """Tokens a row."""
    numeric: bool
    """Whether only the characters of numeric text are scored."""
    utilisation: float
    """FLOPs a second of the matrix products that the work needs, over those of one large product (`matmul_peak`)."""
    first_seconds: float
    """The longest repetition of those that warm up: it compiles, if anything is compiled."""

    work: str
    context: int
    flops: int
    side: str
    seconds: float
    """Median of `times`."""
    ratio: float
    """How many times faster than the first side."""
    times: list[float]
    peak_gb: float
    peak_ratio: float
    seconds_after_prefill: float
    ratio_after_prefill: float
    mae: float
    mae_change: float
    """In per cent of the first side's."""


Run = Callable[[], list[float]]
"""One turn of a side: how long each repetition took, in seconds."""


def take_turns(
    sides: Mapping[str, Run], rounds: int, peaks: Mapping[str, list[float]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each side, one after the other, so many rounds; the most memory of each turn is added to `peaks`."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            with peak_memory(peaks[name]) if peaks else nullcontext():
                seconds[name] += run()
    return seconds


def rows_of(seconds: Mapping[str, list[float]]) -> list[Row]:
    """One row a side: median seconds, and how many times faster than the first."""
    medians = [statistics.median(times) for times in seconds.values()]
    return [
        {"side": name, "seconds": median, "ratio": medians[0] / median, "times": times}
        for (name, times), median in zip(seconds.items(), medians, strict=True)
    ]


def timed(run: Callable[[], object]) -> float:
    """Seconds that a piece of work takes, a GPU's part of it too."""
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Shares of the time that a piece of work spends in matrix products, in attention, and elsewhere."""
    run()
    with torch.profiler.profile() as profiler:
        run()
    key = "device_time_total" if choose_device() == "cuda" else "cpu_time_total"
    spent = {"matrix products": 0.0, "attention": 0.0, "everything else": 0.0}
    for event in profiler.key_averages():
        name, own = event.key.removeprefix("aten::"), getattr(event, f"self_{key}")
        if name.startswith("_BlockwiseAttention"):  # with the products inside, which nothing else takes by batches
            spent["attention"] += getattr(event, key)
            spent["everything else"] -= getattr(event, key) - own
        elif name.startswith("_scaled_dot_product"):
            spent["attention"] += own
        else:
            spent["matrix products" if name in ("mm", "addmm") else "everything else"] += own
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}


def wait() -> None:
    """Until a GPU has done what it was given."""
    if choose_device() == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory(peaks: list[float]) -> Iterator[None]:
    """Append the most memory held inside, in GB: the GPU's, or the process's where Linux tells it."""
    gc.collect()
    status = Path("/proc/self/status")
    if choose_device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    yield
    if choose_device() == "cuda":
        peaks.append(torch.cuda.max_memory_allocated() / 1e9)
    elif status.exists():
        mark = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peaks.append(int(mark.split()[1]) * 1024 / 1e9)


def matmul_peak() -> float:
    """FLOPs a second of one large product of matrices in bfloat16: what the machine can do, measured."""
    device = choose_device()
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(5))


def other_load() -> str:
    """What a record says of programs beside the benchmark, from the load before it begins; nothing where it is alone."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f", beside other load ({load:.1f} running on average)" if load > 1 else ""


def machine() -> str:
    """What the figures were measured on."""
    if choose_device() == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"
    capabilities = torch.cpu.get_capabilities()
    model = capabilities.get("cpu_name") or platform.machine()
    features = [name for name, there in capabilities.items() if there is True and "bf16" in name]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{torch.get_num_threads()} threads of {model} ({', '.join(features) or 'no bfloat16'}), {memory:.0f} GiB, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
