"""What the text of a context says of its numbers: bounds, also where it begins or ends inside one. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..files import UserError
from ..text import Codec


@dataclass(frozen=True)
class Reading:
    """What the text of a window says, in units of the last decimal of scaled values."""

    begins: bool
    """Whether the series begins with it; else nothing is known of the state that it begins in."""
    low: np.ndarray
    """Bounds of the values by step and variable, (steps, 2): infinite where nothing is known."""
    high: np.ndarray
    lattice: tuple[int, int]
    """Of the first number the last digits alone may be seen: its value modulo the first is the second; (1, 0) if not."""
    first: tuple[int, int]
    """Step and variable of that number."""
    pieces: np.ndarray
    """Of the last number the first digits alone may be seen: it lies in one of these intervals, (n, 2); none if not."""
    last: tuple[int, int]
    """Step and variable of that number."""
    unit: float
    """Units per unit of the series."""


def read_window(text: str, codec: Codec, *, begins: bool) -> Reading:
    """What the text of a window of a two-variable series says of its values.

    Parameters
    ----------
    text : str
        Encoded, cut anywhere.
    begins : bool
        Whether its series begins with it; else its first number may be cut.

    Raises
    ------
    UserError
        If it is no text of a series of two non-negative variables.
    """
    separators = codec.variable_separator + codec.step_separator
    if set(text) - set("0123456789." + separators):
        raise UserError(f"{text[:24]!r}…: no text of a series of two non-negative variables; give one that is")
    pieces = re.split(f"([{re.escape(separators)}])", text)  # number, separator, number, … number
    numbers, after = pieces[::2], pieces[1::2]
    place = 1 if after and after[0] == codec.step_separator else 0
    steps = (place + len(numbers) - 1) // 2 + 1
    low, high = np.full((steps, 2), -np.inf), np.full((steps, 2), np.inf)
    for index, number in enumerate(numbers[:-1]):
        if index == 0 and not begins:
            continue
        units = int(number.replace(".", ""))
        low[divmod(place + index, 2)], high[divmod(place + index, 2)] = units - 0.5, units + 0.5
    lattice = (1, 0)
    if after and not begins and (digits := numbers[0].replace(".", "")):
        lattice = (10 ** len(digits), int(digits))
    return Reading(
        begins,
        low,
        high,
        lattice,
        divmod(place, 2),
        _begun(numbers[-1], codec) if after else np.empty((0, 2)),
        divmod(place + len(numbers) - 1, 2),
        codec.scale * 10**codec.precision,
    )


def _begun(number: str, codec: Codec) -> np.ndarray:
    """The intervals, (n, 2), that a number lies in which begins like this."""
    if not number:
        return np.empty((0, 2))
    whole, point, decimals = number.partition(".")
    more = codec.precision - len(decimals)  # digits to come
    if point or number == "0":
        lengths = [more]
    else:  # of the digits before the point some may be missing
        lengths = [more + extra for extra in range(codec.max_integer_digits - len(whole) + 1)]
    first = int(whole + decimals)
    return np.array([(first * 10.0**n - 0.5, (first + 1) * 10.0**n - 0.5) for n in lengths])
