"""Processes that spend on one ledger at once, some killed while they do: run by `test_ledger`, and at length by hand.

python -m tests.campaigns.ledger [ROUNDS] [--postgres]
(eight processes each, on SQLite or a PostgreSQL server of its own; prints what happened and fails if the cap was passed)
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from m2helpers.flops.costs import Cost
from m2helpers.ledger import CapReached, Ledger, Spender
from tests.postgres import Server, find_postgres

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


def campaign(folder: Path, processes: int, kills: int, seed: int, where: str | None = None) -> dict:
    """One round: start the processes, kill some of them at random moments, and check the ledger while and after.

    The ledger is a new SQLite file, or an empty database by URL.

    Returns
    -------
    dict
        `spent`, `settled` (entries), `lost` (entries of killed processes), `cap`.

    Raises
    ------
    AssertionError
        If the cap was passed at any look, or a settled entry is missing.
    """
    draw, path = random.Random(seed), where or str(folder / f"{seed}.sqlite")
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


def main(rounds: int, on_postgres: bool) -> None:
    """Run the rounds and print what came of them."""
    results = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="m2-")))
        server = None
        if on_postgres:
            programs = find_postgres() or sys.exit("no PostgreSQL server here; apt-get install postgresql")
            (folder / "pg").mkdir()
            server = stack.enter_context(Server(programs, folder / "pg"))
        for seed in range(rounds):
            if server:
                server.empty()
            results.append(campaign(folder, processes=8, kills=4, seed=seed, where=server.url if server else None))
            print(f"\rround {seed + 1} of {rounds}: {results[-1]}", end="", flush=True)
    totals = {key: sum(result[key] for result in results) for key in ("settled", "lost")}
    most = max(result["spent"] for result in results)
    print(f"\n{rounds} rounds of 8 processes, 4 killed in each: {totals}, largest sum {most} of {CAP}")


if __name__ == "__main__":
    words = sys.argv[1:]
    numbers = [int(word) for word in words if word.isdigit()]
    main(numbers[0] if numbers else 200, "--postgres" in words)
