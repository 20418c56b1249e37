"""Processes that spend on one ledger at once, some killed while they do: run by `test_ledger`, and at length by hand.

python tests/campaigns/ledger.py [ROUNDS]     (eight processes each; prints what happened and fails if the cap was passed)
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from m2helpers.flops.costs import Cost
from m2helpers.ledger import CapReached, Ledger, Spender

CAP = 3_000


def spend(path: str, log: str, number: int, seed: int) -> None:
    """Spend until the cap is reached, and note every settled amount only once it is settled."""
    draw, ledger = random.Random(seed), Ledger(path, CAP)
    with open(log, "a", buffering=1) as settled:
        while True:
            most, share = draw.randint(5, 60), draw.random()
            used = Cost(1, max(1, int(most * share)), most)
            try:
                with ledger.reserve(Spender(str(number), "campaign"), train=Cost(1, most, most)) as bill:
                    time.sleep(draw.random() * 0.01)
                    bill.add("train", used)
            except CapReached:
                return
            settled.write(f"{used.flops}\n")


def campaign(folder: Path, processes: int, kills: int, seed: int) -> dict:
    """One round: start the processes, kill some of them at random moments, and check the ledger while and after.

    Returns
    -------
    dict
        `spent`, `settled` (entries), `lost` (entries of killed processes), `cap`.

    Raises
    ------
    AssertionError
        If the cap was passed at any look, or a settled entry is missing.
    """
    draw, path = random.Random(seed), folder / f"{seed}.sqlite"
    Ledger(path, CAP)
    logs = [folder / f"{seed}-{number}.log" for number in range(processes)]
    command = "from tests.campaigns.ledger import spend; import sys; spend(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    root = Path(__file__).resolve().parent.parent.parent
    running = [
        subprocess.Popen([sys.executable, "-c", command, path, log, str(number), str(seed * 100 + number)], cwd=root)
        for number, log in enumerate(logs)
    ]
    while not any(log.exists() and log.stat().st_size for log in logs):  # until the first of them spends
        time.sleep(0.005)
    for process in draw.sample(running, kills):
        time.sleep(draw.random() * 0.05)
        process.kill()
        assert Ledger(path, CAP).spent() <= CAP
    codes = [process.wait() for process in running]
    assert all(code in (0, -9) for code in codes), codes
    ledger = Ledger(path, CAP)
    entries = ledger.entries()
    assert ledger.spent() == sum(entry["flops"] for entry in entries) <= CAP
    assert all(entry["state"] in ("settled", "lost") for entry in entries), "a dead process still holds a reservation"
    for number, log in enumerate(logs):
        noted = [int(line) for line in log.read_text().split()] if log.exists() else []
        kept = [e["flops"] for e in entries if e["run"] == str(number) and e["state"] == "settled"]
        # a process can be killed after it settled and before it noted so: one more entry than notes
        assert kept[: len(noted)] == noted and len(kept) <= len(noted) + (codes[number] == -9), number
    lost = sum(entry["state"] == "lost" for entry in entries)
    return {"spent": ledger.spent(), "settled": len(entries) - lost, "lost": lost, "cap": CAP}


if __name__ == "__main__":
    rounds, results = int(sys.argv[1]) if len(sys.argv) > 1 else 200, []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(rounds):
            results.append(campaign(Path(name), processes=8, kills=4, seed=seed))
            print(f"\rround {seed + 1} of {rounds}: {results[-1]}", end="", flush=True)
    totals = {key: sum(result[key] for result in results) for key in ("settled", "lost")}
    print(
        f"\n{rounds} rounds of 8 processes, 4 killed in each: {totals}, largest sum {max(r['spent'] for r in results)} of {CAP}"
    )
