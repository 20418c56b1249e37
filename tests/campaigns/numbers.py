"""Numbers, many of them: sampled forecasts that must all parse, and the account of FLOPs against PyTorch's counter.

python -m tests.campaigns.numbers [SAMPLES] [CONFIGURATIONS] [--record]     (10,000 and 200 by default)

`tests/test_trust.py` draws a few; `tests/flops/test_flops.py` has the first configurations.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from m2helpers.forecasting import forecast
from m2helpers.ledger import Ledger
from m2helpers.models import Base, load_base
from m2helpers.text import Codec

SEPARATORS = [(",", ";"), (";", ","), (" ", "|"), ("|", "\n"), (":", "/"), ("_", "#"), ("\t", " "), ("e", "x")]


def sampled(base: Base, ledger: Ledger, count: int, seed: int = 0, a_round: int = 25) -> dict[str, int]:
    """Sample forecasts at 1 to 12 variables, precision 0 to 4, values of both signs, several separators, temperatures; `a_round` of one setting.

    Returns
    -------
    dict
        `samples`, `settings`, `negative` (samples with a value below 0), `invalid`.

    Raises
    ------
    AssertionError
        If a valid one is not what its text says, to the last digit.
    """
    draw = random.Random(seed)
    found = {"samples": 0, "settings": 0, "negative": 0, "invalid": 0}
    while found["samples"] < count:
        variables, precision = 1 + found["settings"] % 12, draw.randrange(5)
        codec = Codec(
            10 ** draw.uniform(-6, 6), precision, *draw.choice(SEPARATORS), max_integer_digits=draw.choice((1, 2, 3, 6))
        )
        values = (
            np.array([[draw.uniform(-9, 9) for _ in range(variables)] for _ in range(draw.randrange(1, 6))])
            / codec.scale
        )
        n, steps = min(a_round, count - found["samples"]), draw.randrange(1, 4)
        how = dict(
            constrained=True, temperature=draw.choice((0.5, 1.0, 3.0)), seed=draw.randrange(2**31), ledger=ledger
        )
        for one in forecast(base, codec, [values] * n, steps, **how):  # type: ignore[arg-type]
            found["invalid"] += not one.valid
            if one.valid:
                rows = [row.split(codec.variable_separator) for row in one.text.split(codec.step_separator)[:-1]]
                assert (one.values == np.array(rows, np.float64) / codec.scale).all() and one.values.shape == (
                    steps,
                    variables,
                ), one
                assert all(len(number.partition(".")[2]) == precision for row in rows for number in row), one.text
                found["negative"] += bool((one.values < 0).any())
        found["samples"] += n
        found["settings"] += 1
    return found


def counted(configurations: int, first: int = 1_000) -> int:
    """The account of so many random configurations like Qwen2's, forward and backward, module by module; raises where one differs."""
    from tests.flops.test_flops import test_matmuls_equal_the_counter_module_by_module as compare

    for seed in range(first, first + configurations):
        compare(seed)
    return configurations


def main(samples: int, configurations: int, record: bool) -> int:
    """Both, on a tiny model of random weights, which writes what nobody trained it to write."""
    from tests.campaigns.resume import make_inputs

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        found = sampled(load_base(f"{folder}/base"), Ledger(f"{folder}/ledger.sqlite"), samples)
    exact = counted(configurations)
    print(f"{found}; {exact} configurations equal PyTorch's counter, module by module")
    if record:
        from tests.campaigns.record import record as keep

        keep("numbers", {**found, "configurations": exact})
    return 1 if found["invalid"] else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    sys.exit(main(*(numbers + [10_000, 200][len(numbers) :]), "--record" in sys.argv))
