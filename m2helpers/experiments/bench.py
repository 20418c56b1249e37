"""The benchmarks the site quotes: our way and the alternative, side by side in one process, with medians and their ratio.

The full-size model has Qwen2.5-0.5B's exact architecture and random weights: what it costs does not depend on what it knows.
"""

from __future__ import annotations

import gc
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import psutil
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from ..data import Dataset
from ..evaluation.measure import evaluate
from ..evaluation.protocols import make_cases
from ..files import UserError, read_json, write_json
from ..flops.architecture import QWEN_05B
from ..flops.costs import forward_cost
from ..forecasting import generate
from ..ledger import Ledger
from ..models import Base, add_head_bias, choose_device, embedded_tokenizer, has_bfloat16, load_base
from ..settings import EMBEDDED, TrainSettings
from ..text import Codec, fit_scale, tokenise
from ..training import Training
from .contention import compare_waiting

ROUNDS = 3  # turns of each side
STEPS, STEPS_EMBEDDED = 2, 20  # timed in a turn, after one to warm up
SETTINGS = TrainSettings(lora_r=8, batch_size=4, max_length=512)
ALTERNATIVE, FULL, NUMERIC = "peft + Trainer", "full vocabulary", "numeric head"
PROMPT = 16  # new tokens a row from which on a forward pass reads a prompt; decoding reads one or two
ERROR_SERIES = 400  # whose forecasts say what a precision costs
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
SCORED = {"all logits": {}, "last position": dict(scored_positions=1, vocabulary=16)}


def random_qwen() -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B at its true size, with random weights in bfloat16: about 1 GB."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN_05B)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb = Qwen2RotaryEmbedding(model.config)  # computed, not a weight
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if "norm" in name else p.normal_(0, 0.02)
    return model.eval()


def _full_size() -> Base:
    return Base(add_head_bias(random_qwen()).to(choose_device()), embedded_tokenizer(), "random weights", "")


# ---------------------------------------------------------------- training


def train_full_size(dataset: Dataset, _: Ledger) -> dict:
    """A training step of Qwen2.5-0.5B at its true size: batch 4 × 512, rank 8 on q and v, bfloat16 weights."""
    return _compare_training(_full_size, dataset, STEPS)


def train_embedded(dataset: Dataset, _: Ledger) -> dict:
    """A training step of the embedded base: batch 4 × 512, rank 8 on q and v."""
    return _compare_training(lambda: load_base(EMBEDDED), dataset, STEPS_EMBEDDED)


def _compare_training(make: Callable[[], Base], dataset: Dataset, steps: int) -> dict:
    codec = Codec(fit_scale(dataset.part("train")))
    numeric = TrainSettings(**vars(SETTINGS) | {"numeric_head": 1})

    def ours(settings: TrainSettings) -> Training:
        work = Training(make(), dataset, settings, codec)
        work.train = [w for w in work.train if len(w) == SETTINGS.max_length]  # every step has the same size
        return work

    sides = {
        ALTERNATIVE: lambda: _trainer_steps(make(), codec, dataset, steps),
        FULL: lambda: _our_steps(ours(SETTINGS), steps),
        NUMERIC: lambda: _our_steps(ours(numeric), steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            with _peak_memory(peaks[name]):
                seconds[name] += run()
    return {"rows": _rows(seconds, ALTERNATIVE, peak_gb=peaks), "profile": {NUMERIC: _profile(ours(numeric).step)}}


def _our_steps(work: Training, steps: int) -> list[float]:
    return [_timed(work.step) for _ in range(1 + steps)][1:]


def _trainer_steps(base: Base, codec: Codec, dataset: Dataset, steps: int) -> list[float]:
    """The same windows and precision by `peft` and `transformers.Trainer`; its head has no bias to train."""
    series = tokenise([codec.encode(values) for values in dataset.part("train")], base.tokenizer)
    windows = [ids[: SETTINGS.max_length].tolist() for ids in series]
    windows = [{"input_ids": ids, "labels": ids} for ids in windows if len(ids) == SETTINGS.max_length]
    adapter = LoraConfig(
        r=SETTINGS.lora_r,
        lora_alpha=SETTINGS.lora_alpha,
        lora_dropout=SETTINGS.lora_dropout,
        target_modules=list(SETTINGS.target_modules),
    )
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=SETTINGS.batch_size,
            max_steps=1 + steps,
            use_cpu=base.model.device.type == "cpu",
            bf16=has_bfloat16(base.model.device.type),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = get_peft_model(base.model, adapter)
        Trainer(model, arguments, train_dataset=windows, callbacks=[clock]).train()
    return clock.seconds[1:]


class _StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        _wait()
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.started)


# ---------------------------------------------------------------- decoding


def decode_full_size(dataset: Dataset, ledger: Ledger) -> dict:
    """P5 forecasts of 20 windows at S = 512 with Qwen2.5-0.5B at its true size, bfloat16, one batch."""
    base = _full_size()
    sides = {"transformers.generate": (base, False), "constrained": (base, True)}
    return {"rows": _compare_decoding(sides, dataset, 20, ledger)}


def decode_embedded(dataset: Dataset, ledger: Ledger) -> dict:
    """P5 forecasts of 100 windows at S = 512 with the embedded base, and each precision's error over 400 training series."""
    single, half = (load_base(EMBEDDED, dtype=dtype) for dtype in ("float32", "bfloat16"))
    sides = {"transformers.generate, float32": (single, False), "constrained, float32": (single, True)}
    sides["constrained, bfloat16"] = (half, True)
    rows = _compare_decoding(sides, dataset, 100, ledger)
    codec = Codec(fit_scale(dataset.part("train")))
    # The untrained base has never seen the training split, and only there are enough windows to tell such small changes.
    how = dict(split="train", limit=ERROR_SERIES, contexts=[512], ledger=ledger)
    mae = [evaluate(base, codec, dataset, "P5", **how)[0].mae for base in (single, half)]
    for row, (base, _) in zip(rows, sides.values(), strict=True):
        row |= {"mae": mae[base is half], "mae_change": 100 * (mae[base is half] / mae[0] - 1)}
    return {"rows": rows}


def _compare_decoding(sides: dict[str, tuple[Base, bool]], dataset: Dataset, n: int, ledger: Ledger) -> list[dict]:
    codec = Codec(fit_scale(dataset.part("train")))
    contexts = [case.context for case in make_cases(dataset.part("validation"), codec, "P5", 512)[:n]]
    whole, after = ({name: [] for name in sides} for _ in range(2))
    longest = 0
    for _ in range(ROUNDS + 1):
        for name, (base, ours) in reversed(sides.items()):  # ours first: it says how long the longest forecast is
            with _prefill_clock(base.model) as prompts_read:
                started = time.perf_counter()
                if ours:
                    written = generate(base, codec, contexts, 6, 2, batch_size=n, constrained=True, ledger=ledger)
                else:
                    _generate(base, contexts, longest)
                ended = time.perf_counter()
            longest = max(len(g.text) for g in written)
            whole[name].append(ended - started)
            after[name].append(ended - prompts_read[0])
    first = next(iter(sides))
    rows = _rows({name: s[1:] for name, s in whole.items()}, first)  # the first turn warms up
    for row, late in zip(rows, _rows({name: s[1:] for name, s in after.items()}, first), strict=True):
        row |= {"seconds_after_prefill": late["seconds"], "ratio_after_prefill": late["ratio"]}
    return rows


def _generate(base: Base, contexts: list[str], new_tokens: int) -> None:
    """Greedy decoding by `transformers`, with its own cache, for as many tokens as the longest forecast has."""
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer(contexts, return_tensors="pt", padding=True).to(base.model.device)
    how = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=base.pad_id)
    with torch.inference_mode():
        base.model.generate(**batch, **how)


@contextmanager
def _prefill_clock(model: PreTrainedModel):
    """A list that will hold the time at which the last of the prompts had been read."""
    ends = [0.0]

    def end(_module, _arguments, options, _output) -> None:
        if options["input_ids"].shape[1] >= PROMPT:
            _wait()
            ends[0] = time.perf_counter()

    handle = model.base_model.register_forward_hook(end, with_kwargs=True)
    try:
        yield ends
    finally:
        handle.remove()


def context_length(_: Dataset, __: Ledger) -> dict:
    """One forward pass of the full-size model by context length, scoring every position or the last one's digits alone."""
    base, rows = _full_size(), []
    head = base.model.get_output_embeddings()
    for length in CONTEXTS:
        ids = torch.randint(11, 27, (1, length), device=base.model.device)
        with torch.inference_mode():
            every = lambda: base.model(ids, use_cache=False).logits  # noqa: B023, E731
            last = lambda: base.model.base_model(ids).last_hidden_state[:, -1] @ head.weight[11:27].T  # noqa: B023, E731
            times = {side: [] for side in SCORED}
            for _ in range(ROUNDS):
                times["all logits"].append(_timed(every))
                times["last position"].append(_timed(last))
        for row in _rows(times, "all logits"):
            cost = forward_cost(base.model.config, 1, length, **SCORED[row["side"]])
            rows.append({"context": length, "flops": cost.flops} | row)
    return {"rows": rows}


def waiting_threads(dataset: Dataset, _: Ledger) -> dict:
    """Forecasts of 20 series and the loss of one with the embedded base, by how threads wait for one another."""
    works = compare_waiting(dataset.path, ROUNDS)
    return {"rows": [{"work": work} | row for work, sides in works.items() for row in _rows(sides, next(iter(sides)))]}


# ---------------------------------------------------------------- measuring and keeping

BENCHMARKS: dict[str, Callable[[Dataset, Ledger], dict]] = {
    "train": train_full_size,
    "decode": decode_full_size,
    "context": context_length,
    "train-embedded": train_embedded,
    "decode-embedded": decode_embedded,
    "threads": waiting_threads,
}


def run_benchmark(name: str, dataset: Dataset, record: Path) -> dict:
    """Run one benchmark and put it into the record with the machine's description; return its entry.

    The ledger is left alone: nothing is learned about any model.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench {name!r}: choose from {', '.join(BENCHMARKS)}")
    kept = read_json(record) if record.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        measured = BENCHMARKS[name](dataset, Ledger(Path(folder) / "ledger.sqlite"))
    entry = {"about": BENCHMARKS[name].__doc__.strip(), "machine": _machine(), "date": str(date.today())} | measured
    kept[f"{name}-{choose_device()}".removesuffix("-cpu")] = entry  # a GPU's beside the CPU's, not in its place
    write_json(record, kept)
    return entry


def _rows(
    seconds: dict[str, list[float]], alternative: str, peak_gb: dict[str, list[float]] | None = None
) -> list[dict]:
    """One row a side: median seconds, how many times faster than the alternative, and peak memory against its."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, median in medians.items():
        row = {"side": name, "seconds": median, "ratio": medians[alternative] / median, "times": seconds[name]}
        if peak_gb and all(peak_gb.values()):
            row["peak_gb"] = max(peak_gb[name])
            row["peak_ratio"] = max(peak_gb[name]) / max(peak_gb[alternative])
        rows.append(row)
    return rows


def _timed(run: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _profile(run: Callable[[], object]) -> dict[str, float]:
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


def _wait() -> None:
    if choose_device() == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _peak_memory(peaks: list[float]):
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


def _machine() -> str:
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
