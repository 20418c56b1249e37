"""Distributions that are computed, not counted: of the next step exactly, of later ones as mixtures of exact ones.

The first step's joint distribution is a tree of its numbers (`trees`). For each later number, its exact distributions after each of
some weighted paths are averaged, in place of the points that those paths would draw (Rao-Blackwell; Gelfand and Smith,
"Sampling-based approaches to calculating marginal densities", 1990), and its leaves are thinned to as many paths (`resampling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ..engine.attention import attend_lean
from ..files import UserError
from ..flops.costs import Cost
from ..ledger import Ledger, default_ledger, spender_of
from ..models import Base
from ..settings import LoraSettings
from ..text import Codec, Grammar
from .decoding import Rules, uniform_numbers
from .distribution import Cells, Distribution
from .generation import PATIENCE, adaptation, encode_prompts
from .resampling import resample
from .trees import ROWS, Account, Begun, Forest, Nodes, joined

CUTOFF = 1e-4  # of the mass
THINNING = 10  # times the cutoff: the least mass of a beginning where there are too many to keep all
LOST = 0.01  # of the mass: with more below the cutoff, a first step is thinned, too
PATHS = 20


class NextStep(NamedTuple):
    """What may come next, and how probable it is."""

    values: np.ndarray
    """(n, variables), in the units of the series."""
    probabilities: np.ndarray
    """(n,); they add up to 1 less what was pruned."""
    pruned: float
    """Mass of the beginnings that were left out."""


class Payment(TypedDict, total=False):
    """What the model carries, for the account, and who pays, as in `generate`."""

    lora: LoraSettings | None
    ledger: Ledger | None


class MixtureOptions(Payment, total=False):
    """How later steps are averaged, as in `predictive_distributions`."""

    n_paths: int
    temperature: float | Sequence[float]
    seed: int
    cutoff: float


@torch.inference_mode()
def next_step(
    base: Base,
    codec: Codec,
    context: str,
    n_variables: int,
    *,
    temperature: float = 1.0,
    cutoff: float = CUTOFF,
    lora: LoraSettings | None = None,
    ledger: Ledger | None = None,
) -> NextStep:
    """The joint distribution of the next step's values, as constrained decoding draws them.

    Parameters
    ----------
    context : str
        Encoded text with a step separator in it. It may end inside a step, whose numbers so far are then certain, or inside a number.
    n_variables : int
        Variables a step.
    temperature : float
        Of the softmax of a character's logits / temperature.
    cutoff : float
        Beginnings of the step with less probability are left out, with all that would follow.
    lora, ledger
        As in `generate`.

    Raises
    ------
    UserError
        If nothing in the context says where steps begin, or every beginning has less probability than the cutoff.
    """
    ids, _ = encode_prompts(base, codec, [context], 1, n_variables)
    grove = _Grove(base, codec, n_variables, [context], ids, lora, cutoff)
    ledger = ledger or default_ledger(base)
    with ledger.reserve(spender_of(base), generate=grove.most()) as grove.account.bill, attend_lean(base.model):
        grove.step(temperature, last=True)
    cells, place = np.unique(grove.forest.cells, axis=0, return_inverse=True)  # -0.00 is 0.00
    probabilities = np.bincount(place.ravel(), grove.forest.weight) * (1 - grove.pruned[0])
    return NextStep(cells / 10**codec.precision / codec.scale, probabilities, float(grove.pruned[0]))


@torch.inference_mode()
def predictive_distributions(
    base: Base,
    codec: Codec,
    contexts: Sequence[str],
    n_steps: int,
    n_variables: int,
    *,
    n_paths: int = PATHS,
    temperature: float | Sequence[float] = 1.0,
    seed: int = 0,
    cutoff: float = CUTOFF,
    lora: LoraSettings | None = None,
    ledger: Ledger | None = None,
) -> list[Distribution]:
    """What comes after each text, step by step: the first step exactly, later ones as mixtures over weighted paths.

    Where the first step's later numbers are so uncertain that pruning would lose a hundredth of the mass, they are mixtures, too.

    What is decoded, how finely, and who pays are all arguments, so they are many.

    Parameters
    ----------
    contexts : sequence of str
        As in `next_step`. One that ends inside a step has the rest of it as its first step.
    n_steps : int
        Steps ahead.
    n_variables : int
        Variables a step.
    n_paths : int
        Paths of each context that go on, from the second step's on.
    temperature : float or sequence of float
        Of the softmax, one for all steps or one for each.
    seed : int
        Of which paths go on. What becomes of a context follows from it and the context alone.
    cutoff : float
        Of the first step, beginnings with less probability are left out. Where there are too many, and in later steps, they are
        thinned, with `THINNING` times as much for the least mass: that leaves expectations as they are.
    lora, ledger
        As in `generate`.

    Returns
    -------
    list of Distribution
        In the order of the contexts and the units of the series, each (n_steps, n_variables). `pruned` is the mass that was left out
        of the first step, and of later ones with it.
    """
    temperatures = np.broadcast_to(np.asarray(temperature, dtype=float), n_steps).tolist()
    if n_paths < 1 or min(temperatures) <= 0:
        raise UserError(f"{n_paths} paths at temperature {temperature}: ask for at least 1, and more than 0")
    ids, _ = encode_prompts(base, codec, contexts, n_steps, n_variables)
    ledger, made = ledger or default_ledger(base), dict[int, Distribution]()
    done = [len(Begun.of(context, codec).known) for context in contexts]
    order = sorted(range(len(ids)), key=lambda i: (done[i], len(ids[i])))
    at_once = max(1, ROWS // n_paths)
    groups = [list(some) for _, same in groupby(order, key=lambda i: done[i]) for some in batched(same, at_once)]
    bar = tqdm(total=len(order) * n_steps, desc="distributions", unit="step", delay=PATIENCE, leave=False)
    for group in groups:
        texts = [contexts[i] for i in group]
        grove = _Grove(base, codec, n_variables, texts, [ids[i] for i in group], lora, cutoff)
        draws = uniform_numbers(texts, n_steps * n_variables * (grove.longest + 2), seed, torch.device("cpu")).numpy()
        for step, numbers in enumerate(np.split(draws, n_steps, axis=1)):
            with ledger.reserve(spender_of(base), generate=grove.most()) as grove.account.bill, attend_lean(base.model):
                grove.step(temperatures[step], n_paths, numbers, last=step == n_steps - 1)
            bar.update(len(group))
        made |= zip(group, grove.distributions(), strict=True)
    bar.close()
    return [made[i] for i in range(len(contexts))]


def forecast_distributions(
    base: Base, codec: Codec, series: Sequence[ArrayLike], steps: int, **options: Unpack[MixtureOptions]
) -> list[Distribution]:
    """What comes after each series, as `predictive_distributions`.

    Parameters
    ----------
    series : sequence of array_like, each (n_steps, n_variables)
        In their own units; lengths may differ, variables may not.
    steps : int
        Steps ahead.
    """
    contexts = [codec.encode(values) for values in series]  # refuses a wrong shape
    return predictive_distributions(base, codec, contexts, steps, np.shape(series[0])[1], **options)


class _Grove:
    """The forest of some contexts, and what its leaves say of each step so far."""

    def __init__(
        self,
        base: Base,
        codec: Codec,
        n_variables: int,
        contexts: Sequence[str],
        prompts: Sequence[np.ndarray],
        lora: LoraSettings | None,
        cutoff: float,
    ) -> None:
        if not 0 < cutoff <= 0.01:
            raise UserError(f"cutoff {cutoff}: give a share of the mass above 0 and at most 0.01")
        self.grammar = Grammar(codec, n_variables)
        self.base, self.contexts, self.prompts, self.cutoff = base, contexts, prompts, cutoff
        self.rules = Rules(self.grammar, base)
        self.account = Account(base, max(map(len, prompts)), adaptation(lora, len(self.grammar.alphabet)))
        self.longest = codec.max_integer_digits + codec.precision + 3  # a minus, a point and a separator
        self.marginals: list[list[list[Cells]]] = [[] for _ in contexts]  # by context, step and variable
        self.pruned = np.zeros(len(contexts))

    @cached_property
    def forest(self) -> Forest:
        """Planted when it is first asked for, inside a reservation."""
        return Forest(self.base, self.rules, self.contexts, self.prompts, self.account)

    def most(self) -> Cost:
        """The most that the next step can cost."""
        own, paths = (self.forest.reader.own, len(self.forest.weight)) if self.marginals[0] else (0, len(self.contexts))
        codec, n = self.grammar.codec, self.grammar.n_variables
        numbers = 2 * 10 ** (codec.max_integer_digits + codec.precision)
        most = (1 + 1 / THINNING) / self.cutoff + 2  # of a context: all that are heavy enough, and once more thinned
        beginnings = min(len(self.contexts) * int(most), 2 * paths * numbers**n)
        return self.account.most(len(self.contexts), own, beginnings, self.longest * n)

    def step(
        self, temperature: float, n_paths: int | None = None, uniform: np.ndarray | None = None, last: bool = False
    ) -> None:
        """Grow the numbers of a step: all of the first, and with `n_paths` thinned to so many at its end and from then on.

        `uniform` (contexts, numbers in [0, 1)) says which. After the `last` step nothing is read.
        """
        forest, first, n = self.forest, not self.marginals[0], self.grammar.n_variables
        draws = None if uniform is None else iter(np.split(uniform, n, axis=1))
        for steps, cells in zip(self.marginals, forest.cells, strict=False) if first else ():
            steps.append([(cell[np.newaxis], np.ones(1)) for cell in cells[: forest.done]])
        if not first:
            for steps in self.marginals:
                steps.append([])
        for variable in range(forest.done, n):
            ends, numbers = variable == n - 1, next(draws) if draws else None
            entering = np.bincount(forest.window, forest.weight, len(self.contexts))
            leaves, thinned = self._leaves(temperature, first, entering, None if numbers is None else numbers[:, 1:])
            kept, weights = [], []
            for window, steps in enumerate(self.marginals):
                at = np.flatnonzero(forest.window[leaves.row] == window)
                if not len(at):
                    raise UserError(
                        f"cutoff {self.cutoff}: every next step has less probability; give a smaller one, one variable, or "
                        "take forecast_distributions"
                    )
                mass = leaves.mass[at]
                steps[-1].append((leaves.cell[at], mass))
                if first and not thinned[window]:
                    self.pruned[window] += max(0.0, entering[window] - mass.sum())
                some = np.arange(len(at))
                if n_paths is not None and numbers is not None and (ends or not first):
                    some, mass = resample(mass, n_paths, numbers[window, 0])
                kept.append(at[some])
                weights.append(mass / mass.sum() if ends else mass)
            forest.follow(leaves.take(np.concatenate(kept)), np.concatenate(weights), read=not (ends and last))

    def _leaves(
        self, temperature: float, first: bool, entering: np.ndarray, uniform: np.ndarray | None
    ) -> tuple[Nodes, np.ndarray]:
        """The next number of each path, sorted by context and cell, and which contexts were thinned, (contexts,).

        `entering` (contexts,) is the mass of each context's paths.
        """
        forest, parts = self.forest, list[Nodes]()
        thinned = np.full(len(self.contexts), not first)
        if first:
            leaves = forest.grow(temperature, self.cutoff)
            if uniform is not None:
                kept = np.bincount(forest.window[leaves.row], leaves.mass, len(self.contexts))
                thinned = kept < (1 - LOST) * entering
            parts.append(leaves.take(~thinned[forest.window[leaves.row]]))
        if thinned.any():
            wide = np.flatnonzero(thinned[forest.window])
            parts.append(forest.grow(temperature, self.cutoff * THINNING, uniform, wide))
        leaves = joined(parts)
        return leaves.take(np.lexsort((leaves.cell, forest.window[leaves.row]))), thinned

    def distributions(self) -> list[Distribution]:
        """Of each context, in the units of the series."""
        width = self.grammar.codec.resolution
        return [
            Distribution.from_cells(steps, width, pruned=np.full(len(steps), pruned))
            for steps, pruned in zip(self.marginals, self.pruned, strict=True)
        ]


def batched(items: Iterable[int], n: int) -> Iterator[list[int]]:
    """So many at a time; `itertools.batched` is of Python 3.12."""
    rest = iter(items)
    while some := list(islice(rest, n)):
        yield some
