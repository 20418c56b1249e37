"""The texts that pre-training reads: of every step, functions of the seed and the step alone, and those held out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from ..engine.processes import local_count
from ..models import embedded_tokenizer
from ..settings import PretrainSettings
from ..text import right_pad, tokenise
from .families import FAMILIES
from .synthetic import draw_texts

BLOCK = 2048  # texts drawn together: the integrators work on many systems at once
VALIDATION_SEED = 999_983  # a stream of its own, apart from every training seed


class _Blocks(Dataset):
    """Blocks of texts by number, each as token ids (texts, at most max_length): functions of the seed and the number."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.steps = max(1, BLOCK // settings.batch_size)  # that one block is enough for

    def __getitem__(self, index: int) -> np.ndarray:
        settings = self.settings
        return _ids([settings.seed, index], self.steps * settings.batch_size, settings.max_length)


def step_texts(settings: PretrainSettings, first: int, device: str) -> Iterator[torch.Tensor]:
    """Token ids of the texts of every step from `first` on, each (batch, length).

    Beside a GPU, all cores but one draw texts ahead of it; a CPU that trains too is better left at that. Of several processes
    each draws them all: those of one step are drawn together.
    """
    blocks = _Blocks(settings)
    loader = DataLoader(
        blocks,
        batch_size=None,  # a block is one already
        sampler=range(first // blocks.steps, -(-settings.max_steps // blocks.steps)),
        num_workers=max(0, (os.cpu_count() or 1) // local_count() - 1) if device == "cuda" else 0,
        worker_init_fn=_settle,
    )
    skipped = first % blocks.steps * settings.batch_size
    for block in loader:
        yield from block[skipped:].split(settings.batch_size)
        skipped = 0


def _settle(worker: int) -> None:
    """A worker has one core, and leaves signals to the run, which saves first and ends its workers then."""
    threadpool_limits(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _ids(seed: list[int], n: int, length: int, family: str | None = None, precision: int | None = None) -> np.ndarray:
    """Texts as token ids, short ones padded: int16 (n, length), for they wait in memory."""
    tokenizer = embedded_tokenizer()
    texts = draw_texts(seed, n, length, family=family, precision=precision)
    ids, _ = right_pad(tokenise(texts, tokenizer), tokenizer.pad_token_id)
    return ids.astype(np.int16)


@lru_cache(maxsize=2 * len(FAMILIES))
def held_out(number: int, n: int, length: int) -> torch.Tensor:
    """Held-out texts of a family by its number: ids (n, length)."""
    return torch.from_numpy(_ids([VALIDATION_SEED, number], n, length, family=list(FAMILIES)[number], precision=2))
