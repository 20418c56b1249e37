"""Decoding on a GPU: one step for all rows, always of the same shapes, captured once and launched again as a whole.

Beside `decoding.continue_prompts`, which is right for a CPU: there every token is looked at in Python, rows leave at once, and tensors are as
small as they can be. A GPU spends such a pass waiting: for some hundred kernels to be launched, and for Python to have seen what
they gave. Here the grammar is a pair of tables beside the model, every row writes into a room of its own in the cache, and a CUDA graph
launches a step at one stroke; only now and then does the host ask whether any row is left. What is written, and what it is billed for, is
the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Cache

from ..engine.kvcache import filled, make_cache, placed_cache
from ..engine.prefix import can_share
from ..models import Base
from ..text import right_pad
from .decoding import Chooser, End, Progress, Rules, draw, finite, refuse_damaged

CHECK = 4  # passes between two looks at which rows are done
COMPACT = (
    32  # rows from which on those that are done are taken out, once they are half of them: a graph is captured anew
)
PREFILL_TOKENS = 2**15  # of prompts, read in one pass
Room = tuple[torch.Tensor, torch.Tensor]
ROOM = 64  # the cache's length is a multiple of this many tokens, which suits attention with a mask


def can_capture(base: Base) -> bool:
    """Whether a base decodes here, inside `attend_lean`: on a GPU, if its layers keep all tokens and take the masks they are given."""
    config = base.model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    still = rope not in ("dynamic", "longrope")  # those ask the host how far it has come
    return base.model.device.type == "cuda" and still and can_share(base.model, make_cache(config))


@dataclass
class _Rows:
    """The rows that are left: the same tensors in every pass, changed in place."""

    hidden: torch.Tensor
    """(rows, hidden): the last hidden state of each."""
    state: torch.Tensor
    """int64 (rows,): of the grammar."""
    left: torch.Tensor
    """int64 (rows,): separators still to write."""
    count: torch.Tensor
    """int64 (rows,): tokens written."""
    length: torch.Tensor
    """int64 (rows,): tokens in the cache."""
    origin: torch.Tensor
    """int64 (rows,): its number in the batch."""

    def select(self, keep: torch.Tensor) -> _Rows:
        return _Rows(*(getattr(self, field.name)[keep] for field in fields(self)))


class _Writing:
    """A batch while it is continued; `step` is what is captured."""

    def __init__(
        self, base: Base, prompts: list[np.ndarray], end: End, chooser: Chooser, rules: Rules | None, states: list[int]
    ) -> None:
        self.model, self.end, self.chooser, self.rules = base.model, end, chooser, rules
        device, n = base.model.device, len(prompts)
        if rules:
            self.tokens, self.next, self.forced = (
                torch.from_numpy(table).to(device)
                for table in (np.array(rules.tokens), rules.grammar.next, rules.grammar.forced)
            )
        self.width = 1 + _longest_chain(rules.grammar.forced, rules.grammar.next) if rules else 1  # tokens a pass
        lengths = np.array([len(prompt) for prompt in prompts])
        room = -(-(lengths.max() + end.max_new_tokens + 2 * self.width) // ROOM) * ROOM
        self.room, self.ahead = torch.arange(room, device=device), torch.arange(self.width, device=device)
        hidden, self.rooms = self._prefill(prompts, base.pad_id)
        self.rows = _Rows(
            hidden,
            torch.tensor(states if rules else [0] * n, device=device),
            torch.full((n,), end.n_separators, device=device),
            torch.zeros(n, dtype=torch.int64, device=device),
            torch.from_numpy(lengths).to(device),
            torch.arange(n, device=device),
        )
        self.written = torch.full((n, end.max_new_tokens + 2 * self.width), base.pad_id, device=device)
        self.counts = torch.zeros(
            end.max_new_tokens + CHECK + 2, n, dtype=torch.int64, device=device
        )  # by pass and row
        self.passes = torch.zeros(1, dtype=torch.int64, device=device)
        self.separators = torch.zeros((), dtype=torch.int64, device=device)  # written so far
        self.damaged = torch.zeros((), dtype=torch.bool, device=device)
        self.cache, self.places = self._cache()

    def _prefill(self, prompts: list[np.ndarray], pad_id: int) -> tuple[torch.Tensor, list[Room]]:
        """Read each distinct prompt once; of every row the last hidden state, (rows, hidden), and of every layer the room
        for keys and for values, (rows, heads, room, dimension), with those of its prompt at the beginning."""
        device = self.model.device
        distinct = list({prompt.tobytes(): prompt for prompt in prompts}.values())
        number = {prompt.tobytes(): i for i, prompt in enumerate(distinct)}
        ids = torch.from_numpy(right_pad(distinct, pad_id)[0]).to(device)  # (distinct, longest)
        last = torch.tensor([len(prompt) - 1 for prompt in distinct], device=device)
        row = torch.tensor([number[prompt.tobytes()] for prompt in prompts], device=device)
        parts, hidden = [], []
        for some in torch.arange(len(ids), device=device).split(max(1, PREFILL_TOKENS // ids.shape[1])):
            cache = make_cache(self.model.config)
            # Padding stands after each prompt, where no token of it looks, and is overwritten: no mask.
            states = self.model.base_model(ids[some], past_key_values=cache, use_cache=True).last_hidden_state
            hidden.append(states[torch.arange(len(some), device=device), last[some]])
            parts.append(filled(cache))
        rooms: list[Room] = []
        for layer in zip(*parts, strict=True):  # of each part of the prompts, its keys and its values
            keys, values = (self._made_room(torch.cat(tensors)[row]) for tensors in zip(*layer, strict=True))
            rooms.append((keys, values))
        return torch.cat(hidden)[row], rooms

    def _made_room(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, heads, tokens, dimension) → (rows, heads, room, dimension)."""
        return F.pad(x, (0, 0, 0, len(self.room) - x.shape[2]))

    def _cache(self) -> tuple[Cache, torch.Tensor]:
        """The cache over the rooms, and where the next tokens of each row go in it, (rows, width)."""
        places = self.rows.length[:, None] + self.ahead
        return placed_cache(self.model.config, self.rooms, places), places

    def alive(self) -> torch.Tensor:
        """Which rows are not done, bool (rows,)."""
        return (self.rows.left > 0) & (self.rows.count < self.end.max_new_tokens)

    def step(self) -> None:
        """Choose for each row, write what follows from that, and read it; nothing changes of a row that is done."""
        rows, alive = self.rows, self.alive()
        new, n = self._write(self._choose(alive), alive)
        self.written[rows.origin[:, None], rows.count[:, None] + self.ahead] = new
        self.counts[self.passes.expand_as(n), rows.origin] = n
        rows.count += n
        self.places.copy_(rows.length[:, None] + self.ahead)
        seen = (self.room <= self.places[..., None])[:, None]  # (rows, 1, width, room)
        read = self.model.base_model(
            input_ids=new,
            attention_mask=seen,
            position_ids=self.places,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state  # (rows, width, hidden)
        rows.hidden.copy_(read[torch.arange(len(n), device=n.device), (n - 1).clamp(min=0)])
        rows.length += n
        self.passes += 1

    def _choose(self, alive: torch.Tensor) -> torch.Tensor:
        """A choice for each row, (rows,)."""
        rows, temperature, uniform = self.rows, self.chooser.temperature, self.chooser.uniform
        if self.rules:
            logits = self.rules.score(rows.hidden, rows.state)
        else:
            logits = self.model.get_output_embeddings()(rows.hidden)
        self.damaged |= (alive & ~finite(logits)).any()
        if temperature == 0:
            return logits.argmax(-1)
        drawn = self.passes.clamp(max=uniform.shape[1] - 1).expand_as(rows.origin)
        return draw((logits.float() / temperature).softmax(-1), uniform[rows.origin, drawn])

    def _write(self, choice: torch.Tensor, going: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a choice and of what the grammar forces after it: (rows, width), and how many they are, (rows,)."""
        rows, shape = self.rows, (len(choice), self.width)
        new, n = (torch.zeros(some, dtype=torch.int64, device=choice.device) for some in (shape, len(choice)))
        for place in range(self.width):
            token = self.tokens[choice] if self.rules else choice
            ended = going & (token == self.end.separator)
            new[:, place] = token
            n += going
            rows.left -= ended.long()
            self.separators += ended.sum()
            if self.rules:
                rows.state.copy_(torch.where(going, self.next[rows.state, choice], rows.state))
                choice = self.forced[rows.state]
                going = going & (choice >= 0) & (rows.left > 0)
                choice = choice.clamp(min=0)
        return new, n

    def compact(self) -> None:
        """Keep only the rows that are not done."""
        keep = self.alive().nonzero()[:, 0]
        self.rows, self.rooms = self.rows.select(keep), [(keys[keep], values[keep]) for keys, values in self.rooms]
        self.cache, self.places = self._cache()


def _longest_chain(forced: np.ndarray, after: np.ndarray) -> int:
    """How many characters at most are forced one after the other, by the tables of a grammar."""
    state, n = np.flatnonzero(forced >= 0), 0
    while len(state):
        state, n = after[state, forced[state]], n + 1
        state = state[forced[state] >= 0]
    return n


def _launcher(step: Callable[[], None]) -> Callable[[], None]:
    """A step, captured once it has been taken as it is, so that libraries have made what they need."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def continue_captured(
    base: Base,
    prompts: list[np.ndarray],
    end: End,
    chooser: Chooser,
    rules: Rules | None,
    states: list[int],
    progress: Progress = lambda n: None,
) -> tuple[list[list[int]], list[int]]:
    """As `decoding.continue_prompts`, whose arguments and results these are; `states` stay as they are."""
    writing = _Writing(base, prompts, end, chooser, rules, states)
    launch, told, alive = None, 0, len(prompts)
    while alive:
        launch = launch or _launcher(writing.step)
        for _ in range(CHECK):
            launch()
        alive, separators, damaged = torch.stack([writing.alive().sum(), writing.separators, writing.damaged]).tolist()
        if damaged:
            refuse_damaged()
        progress(separators - told)
        told = separators
        if len(writing.rows.left) >= max(COMPACT, 2 * alive) and alive:
            writing.compact()
            launch = None
    counts, written = writing.counts.cpu().numpy(), writing.written.cpu().numpy()
    return [row[:n].tolist() for row, n in zip(written, counts.sum(0), strict=True)], _read(counts)


def _read(counts: np.ndarray) -> list[int]:
    """How many tokens the rows read, padding too, as `decoding` reads them: in a pass all rows that are not done read as
    many as the one with most of them. Counts are those of what was written, (passes, rows)."""
    going = counts[1:] > 0  # whoever writes in the next pass has read in this one
    most = np.where(going, counts[:-1], 0).max(1)  # (passes,)
    return (going * most[:, None]).sum(0).tolist()
