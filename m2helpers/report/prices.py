"""What the plans would cost on GPUs, on paper: the account of every step over a measured utilisation, times a price an hour.

What is assumed and what was measured stands in ``docs/cost.json``, to be edited; a benchmark that has run on a GPU
(``bench rivals --device cuda``) takes the place of the figures there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import Dataset
from ..experiments.planning import PLANS, Plan, plan_table, run_cost
from ..files import read_json
from ..flops.account import forward_account
from ..flops.architecture import QWEN_05B, QWEN_7B
from ..flops.backward import lora_step_flops
from ..flops.costs import Adaptation, training_cost
from ..paths import SHIPPED_BENCHMARKS, SHIPPED_COSTS
from ..settings import TrainSettings
from ..text import Codec
from .findings import figure, markdown_header

if TYPE_CHECKING:
    from ..flops.architecture import Config

MODELS: dict[str, Config] = {"Qwen2.5-0.5B": QWEN_05B, "Qwen2.5-7B": QWEN_7B}
PLAN = "qwen2.5-0.5b"
GPUS = (1, 8, 64)
CHARACTERS = len(Codec(1.0).alphabet)
HOUR = 3600


@dataclass(frozen=True)
class Step:
    """A training step of Qwen2.5-0.5B at its true size that was timed on a GPU."""

    side: str
    rows: int
    length: int
    numeric: bool
    """Whether only the characters of numeric text are scored."""
    seconds: float
    peak_gb: float | None

    @property
    def account(self) -> int:
        """FLOPs of the step in the account, which takes a backward pass for two forward passes."""
        adapted = Adaptation(8, ("q_proj", "v_proj"), CHARACTERS if self.numeric else None)
        return training_cost(QWEN_05B, self.rows, self.length, adapted).flops

    @property
    def needed(self) -> int:
        """FLOPs of the matrix products that LoRA needs: of frozen weights there is no gradient."""
        vocabulary = CHARACTERS if self.numeric else None
        return lora_step_flops(QWEN_05B, self.rows, self.length, lora_r=8, vocabulary=vocabulary)


def measured_steps() -> tuple[list[Step], str]:
    """Steps timed on a GPU, and where: of the recorded benchmarks if they have run on one, else those in ``docs/cost.json``."""
    record = read_json(SHIPPED_BENCHMARKS) if SHIPPED_BENCHMARKS.is_file() else {}
    if "rivals-cuda" not in record:
        costs = read_json(SHIPPED_COSTS)
        return [Step(**step) for step in costs["measured"]], costs["measured_on"]
    entry, names = record["rivals-cuda"], ("side", "rows", "length", "numeric", "seconds", "peak_gb")
    return [Step(*(row.get(name) for name in names)) for row in entry["rows"]], f"{entry['machine']}; {entry['date']}"


def utilisation_table() -> str:
    """The measured steps in Markdown, and what share of the GPU's peak each is."""
    gpu = read_json(SHIPPED_COSTS)["gpu"]
    lines = markdown_header(
        "step", "batch", "ms", "memory (GB)", "utilisation, account", "utilisation, products that LoRA needs"
    )
    for step in measured_steps()[0]:
        shares = (work / step.seconds / gpu["peak_flops"] for work in (step.account, step.needed))
        memory = "–" if step.peak_gb is None else f"{step.peak_gb:.3g}"
        cells = [f"{step.rows} × {step.length}", f"{1e3 * step.seconds:.0f}", memory, *(f"{x:.1%}" for x in shares)]
        lines.append(f"| {step.side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def assumptions_table() -> str:
    """What the prices rest on, in Markdown."""
    costs = read_json(SHIPPED_COSTS)
    gpu, (slow, fast) = costs["gpu"], _utilisations()
    rows = {
        "GPU": gpu["name"],
        "price of a GPU-hour": f"${gpu['dollars_per_hour']:.2f}",
        "its peak, bfloat16 without sparsity": f"{gpu['peak_flops'] / 1e12:,.0f} TFLOP/s",
        "GPUs in a server": f"{gpu['gpus_a_server']}",
        "utilisation in training and validation": f"{slow:.1%} (the slowest step below) or {fast:.1%} (the fastest), in the account's FLOPs",
        "utilisation in forecasting": f"{costs['decoding_utilisation']:.1%}: assumed, not measured; decoding reads every weight for a few tokens",
        **{name: f"{rate / 1e9:,.3g} GB/s a GPU, each way" for name, rate in costs["links"].items()},
    }
    return "\n".join([*markdown_header("assumed", ""), *(f"| {name} | {value} |" for name, value in rows.items())])


def _utilisations() -> tuple[float, float]:
    """The least and the most of the measured steps, in the account's FLOPs."""
    peak = read_json(SHIPPED_COSTS)["gpu"]["peak_flops"]
    shares = [step.account / step.seconds / peak for step in measured_steps()[0]]
    return min(shares), max(shares)


def makespan(jobs: Iterable[float], machines: int) -> float:
    """How long it takes to do jobs on so many machines, the longest first and each on the first machine that is free.

    At most 4/3 of the least possible (Graham, *Bounds on multiprocessing timing anomalies*, 1969).
    """
    free = [0.0] * machines
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def _waves(config: Config, plan: Plan, dataset: Dataset, rates: Mapping[str, float]) -> list[list[float]]:
    """Seconds of every run of a plan on one GPU, its forecasts too, in waves that wait for the one before.

    `rates` are FLOPs a second by kind of work. The sweeps start from the initial run's settings and do not wait for it; the long runs take
    their learning rate from the sweeps.
    """
    table = plan_table(config, plan, dataset)
    forecasts = {str(stage): row["generate"] / max(1, row["runs"]) for stage, row in table.iterrows()}
    first, last = [forecasts["untrained"] / rates["generate"]], list[float]()
    for run in plan.runs:
        work = sum(cost.flops for cost in run_cost(config, run.settings)) / rates["train"]
        seconds = work + forecasts[run.stage] / rates["generate"]
        (last if run.stage in ("final", "extended") else first).append(seconds)
    return [first, last]


def plan_prices(dataset: Dataset) -> str:
    """The published plan on two models in Markdown: FLOPs, and hours and dollars on 1, 8 and 64 GPUs."""
    costs, plan = read_json(SHIPPED_COSTS), PLANS[PLAN]
    gpu = costs["gpu"]
    lines = markdown_header(
        "base", "FLOPs", "utilisation", *(f"{n} GPU{'s' * (n > 1)}: hours; dollars rented" for n in GPUS)
    )
    for name, config in MODELS.items():
        flops = plan_table(config, plan, dataset)["exact"].sum()
        for share in _utilisations():
            rates = {"train": share * gpu["peak_flops"], "generate": costs["decoding_utilisation"] * gpu["peak_flops"]}
            waves = _waves(config, plan, dataset, rates)
            hours = [sum(makespan(wave, n) for wave in waves) / HOUR for n in GPUS]
            cells = [
                f"{_short(time)}; ${time * n * gpu['dollars_per_hour']:,.2f}"
                for n, time in zip(GPUS, hours, strict=True)
            ]
            lines.append(f"| {name} | {figure(flops, 2)} | {share:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(hours: float) -> str:
    return f"{hours:.2g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def gradient_bytes(config: Config, settings: TrainSettings, *, full: bool) -> int:
    """Bytes that a GPU has to exchange a step: of the updates and the head bias in float32, or of all weights in bfloat16."""
    account = forward_account(config, 1, 1, lora_r=settings.lora_r, target_modules=settings.target_modules)
    return 2 * account.parameters if full else 4 * account.trainable


def exchange_seconds(size: int, gpus: int, rate: float) -> float:
    """Seconds to add up gradients of so many bytes over a ring of GPUs: 2·(n − 1)/n of them go each way over every link.

    Source: Patarasuk and Yuan, *Bandwidth optimal all-reduce algorithms for clusters of workstations*, 2009. Latency is left out.
    """
    return 2 * (gpus - 1) / gpus * size / rate


def communication_table() -> str:
    """LoRA's gradients beside all weights' in Markdown: time to exchange them, its share of a step, and the batch from which it is small."""
    costs, settings = read_json(SHIPPED_COSTS), PLANS[PLAN].final
    peak, (_, fast) = costs["gpu"]["peak_flops"], _utilisations()
    lines = markdown_header(
        "base", "trained", "a step exchanges", "GPUs", "link", "ms", "share of a step", "small from"
    )
    for name, config in MODELS.items():
        for full in (False, True):
            size = gradient_bytes(config, settings, full=full)
            flops = training_cost(config, settings.batch_size, settings.max_length, settings.adaptation).flops
            computing = flops / (fast * peak)
            for gpus, link in _rings(costs["links"], costs["gpu"]["gpus_a_server"]):
                exchange = exchange_seconds(size, gpus, costs["links"][link])
                share, tolerated = exchange / (exchange + computing), costs["tolerated_share"]
                tokens = settings.batch_size * settings.max_length / computing * exchange * (1 - tolerated) / tolerated
                cells = [_bytes(size), gpus, link, _milliseconds(exchange), f"{share:.1%}", f"{tokens:,.0f} tokens"]
                lines.append(f"| {name} | {'all weights' if full else 'LoRA'} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _rings(links: Mapping[str, float], server: int) -> Sequence[tuple[int, str]]:
    """How many GPUs meet over which link: the first within a server, the others between servers."""
    inside, *between = links
    return [(server, inside), *((GPUS[-1], link) for link in between)]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.2g}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def cost_blocks(dataset: Dataset) -> dict[str, str]:
    """The marked blocks of the page of costs, by name."""
    costs: dict[str, Any] = read_json(SHIPPED_COSTS)
    _, where = measured_steps()
    settings = PLANS[PLAN].final
    return {
        "cost-assumptions": assumptions_table(),
        "cost-utilisation": f"{utilisation_table()}\n\nMeasured on {where}.",
        "cost-plans": plan_prices(dataset),
        "cost-communication": f"{communication_table()}\n\nThe step is that of the final run: rank {settings.lora_r}, "
        f"{settings.batch_size} × {settings.max_length} on every GPU. *Small from*: tokens a GPU and step from which the exchange is at most "
        f"{costs['tolerated_share']:.0%} of a step.",
    }
