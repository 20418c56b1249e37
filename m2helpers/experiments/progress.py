"""How far a plan is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..flops.costs import Cost
from .planning import UNTRAINED, PlannedRun, run_cost

if TYPE_CHECKING:
    from ..flops.architecture import Config


class Progress:
    """How much of a plan's training is behind, in FLOPs, and about how long the rest takes."""

    def __init__(self, config: Config) -> None:
        @cache
        def price(run: PlannedRun) -> int:
            return sum(run_cost(config, run.settings), Cost()).flops

        self.price = price
        self.done = 0  # runs
        self.behind = self.trained = 0  # FLOPs of all of them, and of those trained in this call
        self.started = time.monotonic()

    def line(self, run: PlannedRun, queue: Sequence[PlannedRun], running: Sequence[PlannedRun]) -> str:
        """What is said before a run."""
        running = [other for other in running if other.stage != UNTRAINED]
        ahead, number = sum(map(self.price, [run, *queue, *running])), self.done + len(running) + 1
        place = f"{self.behind / (self.behind + ahead):.0%} of the training behind"
        if self.trained:
            minutes = (time.monotonic() - self.started) * ahead / self.trained / 60
            place += f", about {minutes:,.0f} minutes left"
        return f"[{number}/{number + len(queue)}] {run.name}: {run.settings.max_steps:,} steps; {place}"

    def note(self, run: PlannedRun, *, worked: bool) -> None:
        """Count a run as behind, and as trained in this call if it `worked`."""
        self.done += 1
        self.behind += self.price(run)
        if worked:  # some of it was done before, where a stopped run is resumed: the first guess is low
            self.trained += self.price(run)
