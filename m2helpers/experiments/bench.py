"""The benchmarks the site quotes: our way and the alternative, side by side in one process, with medians and their ratio.

The full-size model has Qwen2.5-0.5B's exact architecture and random weights: what it costs does not depend on what it knows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from ..data import Dataset
from ..evaluation.measure import evaluate
from ..evaluation.protocols import make_cases
from ..files import UserError, read_json, write_json
from ..flops.architecture import QWEN_05B
from ..flops.costs import UNADAPTED, Adaptation, forward_cost
from ..forecasting import generate
from ..ledger import Ledger
from ..models import Base, add_head_bias, choose_device, embedded_tokenizer, load_base
from ..settings import EMBEDDED, TrainSettings
from ..text import Codec, fit_scale
from ..training import Training
from .contention import compare_waiting
from .sampling import compare_sampling
from .timing import Row, Run, machine, other_load, profile, rows_of, take_turns, timed, wait

ROUNDS = 3  # turns of each side
STEPS, STEPS_EMBEDDED = 2, 20  # timed in a turn, after one to warm up
STEPS_GPU, WARM_GPU = 20, 4  # there one step compiles, one is recorded as CUDA graphs, and two more may be
SETTINGS = TrainSettings(lora_r=8, batch_size=4, max_length=512)
ALTERNATIVE, FULL, NUMERIC = "peft + Trainer", "full vocabulary", "numeric head"
PROMPT = 16  # new tokens a row from which on a forward pass reads a prompt; decoding reads one or two
ERROR_SERIES = 400  # whose forecasts say what a precision costs
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
DIGITS = slice(11, 27)  # tokens of numeric text


class Measured(TypedDict):
    """What a benchmark measures."""

    rows: list[Row]
    profile: NotRequired[dict[str, dict[str, float]]]
    """Side → kind of work → share of its time."""


class Entry(Measured):
    """What the record holds of a benchmark."""

    about: str
    machine: str
    date: str


def random_qwen() -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B at its true size, with random weights in bfloat16: about 1 GB."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN_05B)).bfloat16()
    model.to_empty(device=choose_device())
    model.tie_weights()
    model.model.rotary_emb = Qwen2RotaryEmbedding(model.config).to(model.device)  # computed, not a weight
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if "norm" in name else p.normal_(0, 0.02)
    return model.eval()


def _full_size() -> Base:
    return Base(add_head_bias(random_qwen()), embedded_tokenizer(), "random weights", "")


# ---------------------------------------------------------------- training


def train_full_size(dataset: Dataset, _: Ledger) -> Measured:
    """A training step of Qwen2.5-0.5B at its true size: batch 4 × 512, rank 8 on q and v, bfloat16 weights."""
    return _compare_training(_full_size, dataset, STEPS)


def train_embedded(dataset: Dataset, _: Ledger) -> Measured:
    """A training step of the embedded base: batch 4 × 512, rank 8 on q and v."""
    return _compare_training(lambda: load_base(EMBEDDED), dataset, STEPS_EMBEDDED)


def _compare_training(make: Callable[[], Base], dataset: Dataset, steps: int) -> Measured:
    from .rivals import trainer_steps  # and with it the libraries that are compared

    codec = Codec(fit_scale(dataset.part("train")))
    numeric = replace(SETTINGS, numeric_head=True)

    def ours(settings: TrainSettings) -> Training:
        work = Training(make(), dataset, settings, codec)
        work.train = [w for w in work.train if len(w) == SETTINGS.max_length]  # every step has the same size
        return work

    sides: dict[str, Run] = {
        ALTERNATIVE: lambda: trainer_steps(make(), codec, dataset, replace(SETTINGS, max_steps=1 + steps))[1:],
        FULL: lambda: _our_steps(ours(SETTINGS), steps),
        NUMERIC: lambda: _our_steps(ours(numeric), steps),
    }
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    rows = rows_of(take_turns(sides, ROUNDS, peaks))
    if all(peaks.values()):
        first = max(peaks[ALTERNATIVE])
        for row, gb in zip(rows, map(max, peaks.values()), strict=True):
            row |= {"peak_gb": gb, "peak_ratio": gb / first}
    return {"rows": rows, "profile": {NUMERIC: profile(ours(numeric).step)}}


def _our_steps(work: Training, steps: int) -> list[float]:
    warm = WARM_GPU if work.fixed else 1
    return [timed(work.step) for _ in range(warm + steps)][warm:]


def train_rivals(dataset: Dataset, _: Ledger) -> Measured:
    """A training step of Qwen2.5-0.5B at its true size, rank 8 on q and v, bfloat16 weights, beside other packages."""
    from .rivals import compare_training  # and with it the libraries that are compared

    gpu, rows = choose_device() == "cuda", list[Row]()
    how = dict(rounds=ROUNDS, steps=STEPS_GPU, warm=WARM_GPU) if gpu else dict(rounds=1, steps=STEPS, warm=1)
    for batch_size in (4, 32) if gpu else (4,):
        rows += compare_training(_full_size, dataset, replace(SETTINGS, batch_size=batch_size), **how)
    return {"rows": rows}


# ---------------------------------------------------------------- decoding


def decode_full_size(dataset: Dataset, ledger: Ledger) -> Measured:
    """P5 forecasts of 20 windows at S = 512 with Qwen2.5-0.5B at its true size, bfloat16, one batch."""
    base = _full_size()
    sides = {"transformers.generate": (base, False), "constrained": (base, True)}
    return {"rows": _compare_decoding(sides, dataset, 20, ledger)}


def decode_embedded(dataset: Dataset, ledger: Ledger) -> Measured:
    """P5 forecasts of 100 windows at S = 512 with the embedded base, and each precision's error over 400 training series."""
    single, half = (load_base(EMBEDDED, dtype=dtype) for dtype in ("float32", "bfloat16"))
    sides = {"transformers.generate, float32": (single, False), "constrained, float32": (single, True)}
    sides["constrained, bfloat16"] = (half, True)
    rows = _compare_decoding(sides, dataset, 100, ledger)
    codec = Codec(fit_scale(dataset.part("train")))
    single_error, half_error = (_p5_error(base, codec, dataset, ledger) for base in (single, half))
    for row, (base, _) in zip(rows, sides.values(), strict=True):
        error = half_error if base is half else single_error
        row |= {"mae": error, "mae_change": 100 * (error / single_error - 1)}
    return {"rows": rows}


def _p5_error(base: Base, codec: Codec, dataset: Dataset, ledger: Ledger) -> float:
    # The untrained base has never seen the training split, and only there are enough windows to tell such small changes.
    (result,) = evaluate(base, codec, dataset, "P5", split="train", limit=ERROR_SERIES, contexts=[512], ledger=ledger)
    if result.mae is None:
        raise UserError(f"{base.short_name}: no forecast parsed, which leaves nothing to compare; use a trained base")
    return result.mae


def _compare_decoding(sides: dict[str, tuple[Base, bool]], dataset: Dataset, n: int, ledger: Ledger) -> list[Row]:
    from .rivals import generate_greedily  # and with it the libraries that are compared

    codec = Codec(fit_scale(dataset.part("train")))
    contexts = [case.context for case in make_cases(dataset.part("validation"), codec, "P5", 512)[:n]]
    whole: dict[str, list[float]] = {name: [] for name in sides}
    after: dict[str, list[float]] = {name: [] for name in sides}
    longest = 0
    for _ in range(ROUNDS + 1):
        for name, (base, ours) in reversed(sides.items()):  # ours first: it says how long the longest forecast is
            with _prefill_clock(base.model) as prompts_read:
                started = time.perf_counter()
                if ours:
                    written = generate(base, codec, contexts, 6, 2, batch_size=n, constrained=True, ledger=ledger)
                else:
                    generate_greedily(base, contexts, longest)
                ended = time.perf_counter()
            longest = max(len(g.text) for g in written)
            whole[name].append(ended - started)
            after[name].append(ended - prompts_read[0])
    rows = rows_of({name: times[1:] for name, times in whole.items()})  # the first turn warms up
    for row, late in zip(rows, rows_of({name: times[1:] for name, times in after.items()}), strict=True):
        row |= {"seconds_after_prefill": late["seconds"], "ratio_after_prefill": late["ratio"]}
    return rows


def decode_rivals(dataset: Dataset, ledger: Ledger) -> Measured:
    """P5 forecasts at S = 512 in one batch, bfloat16, beside `generate` with a static cache and compiled on a GPU."""
    from .rivals import compare_decoding  # and with it the libraries that are compared

    how = dict(rounds=ROUNDS, warm=WARM_GPU if choose_device() == "cuda" else 1)
    full, embedded = _full_size(), load_base(EMBEDDED, dtype="bfloat16")
    rows = compare_decoding(full, dataset, ledger, 20, work="Qwen2.5-0.5B's size, 20 windows", **how)
    return {"rows": rows + compare_decoding(embedded, dataset, ledger, 100, work="embedded base, 100 windows", **how)}


@contextmanager
def _prefill_clock(model: PreTrainedModel) -> Iterator[list[float]]:
    """A list that will hold the time at which the last of the prompts had been read."""
    ends = [0.0]

    def end(_module: torch.nn.Module, _arguments: tuple, options: dict[str, torch.Tensor], _output: object) -> None:
        if options["input_ids"].shape[1] >= PROMPT:
            wait()
            ends[0] = time.perf_counter()

    handle = model.base_model.register_forward_hook(end, with_kwargs=True)
    try:
        yield ends
    finally:
        handle.remove()


def sample_full_size(dataset: Dataset, ledger: Ledger) -> Measured:
    """Twenty samples of twenty steps after 400 tokens with Qwen2.5-0.5B at its true size, bfloat16."""
    return {"rows": compare_sampling(_full_size(), dataset, ledger, ROUNDS)}


def sample_embedded(dataset: Dataset, ledger: Ledger) -> Measured:
    """Twenty samples of twenty steps after 400 tokens with the embedded base."""
    return {"rows": compare_sampling(load_base(EMBEDDED), dataset, ledger, ROUNDS + 1)}


# ---------------------------------------------------------------- context


@dataclass(frozen=True)
class _Scoring:
    """A way to score what a forward pass has read."""

    run: Callable[[Base, torch.Tensor], torch.Tensor]
    """A base and token ids (1, length) → logits."""
    adapted: Adaptation
    scored_positions: int | None


def _every_logit(base: Base, ids: torch.Tensor) -> torch.Tensor:
    return base.model(ids, use_cache=False).logits


def _last_digits(base: Base, ids: torch.Tensor) -> torch.Tensor:
    return base.model.base_model(ids).last_hidden_state[:, -1] @ base.model.get_output_embeddings().weight[DIGITS].T


SCORINGS = {
    "all logits": _Scoring(_every_logit, UNADAPTED, None),
    "last position": _Scoring(_last_digits, Adaptation(vocabulary=DIGITS.stop - DIGITS.start), 1),
}


def context_length(_: Dataset, __: Ledger) -> Measured:
    """One forward pass of the full-size model by context length, scoring every position or the last one's digits alone."""
    base, rows = _full_size(), list[Row]()
    for length in CONTEXTS:
        ids = torch.randint(DIGITS.start, DIGITS.stop, (1, length), device=base.model.device)
        sides = {name: partial(_time_pass, scoring, base, ids) for name, scoring in SCORINGS.items()}
        for row, scoring in zip(rows_of(take_turns(sides, ROUNDS)), SCORINGS.values(), strict=True):
            positions = scoring.scored_positions
            cost = forward_cost(base.model.config, 1, length, scoring.adapted, scored_positions=positions)
            rows.append({"context": length, "flops": cost.flops, **row})
    return {"rows": rows}


@torch.inference_mode()
def _time_pass(scoring: _Scoring, base: Base, ids: torch.Tensor) -> list[float]:
    return [timed(lambda: scoring.run(base, ids))]


def waiting_threads(dataset: Dataset, _: Ledger) -> Measured:
    """Forecasts of 20 series and the loss of one with the embedded base, by how threads wait for one another."""
    works = compare_waiting(dataset.path, ROUNDS)
    rows = [(work, row) for work, sides in works.items() for row in rows_of(sides)]
    return {"rows": [{"work": work, **row} for work, row in rows]}


# ---------------------------------------------------------------- measuring and keeping

BENCHMARKS: dict[str, Callable[[Dataset, Ledger], Measured]] = {
    "train": train_full_size,
    "decode": decode_full_size,
    "context": context_length,
    "train-embedded": train_embedded,
    "decode-embedded": decode_embedded,
    "samples": sample_full_size,
    "samples-embedded": sample_embedded,
    "threads": waiting_threads,
    "rivals": train_rivals,
    "rivals-decode": decode_rivals,
}


def run_benchmark(name: str, dataset: Dataset, record: Path) -> Entry:
    """Run one benchmark and put it into the record with the machine's description; return its entry.

    The ledger is left alone: nothing is learned about any model.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench {name!r}: choose from {', '.join(BENCHMARKS)}")
    kept = read_json(record) if record.is_file() else {}
    beside = other_load()
    with tempfile.TemporaryDirectory() as folder:
        measured = BENCHMARKS[name](dataset, Ledger(Path(folder) / "ledger.sqlite"))
    about = (BENCHMARKS[name].__doc__ or "").strip()
    entry: Entry = {"about": about, "machine": machine() + beside, "date": str(date.today()), **measured}
    kept[f"{name}-{choose_device()}".removesuffix("-cpu")] = entry  # a GPU's beside the CPU's, not in its place
    write_json(record, kept)
    return entry
