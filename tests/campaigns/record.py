"""What the campaigns found, kept in docs/trust.json with its day and machine; docs/trust.md reads its figures from there."""

from __future__ import annotations

from datetime import date
from typing import Any

from m2helpers.experiments.timing import machine
from m2helpers.files import read_json, write_json
from m2helpers.paths import ROOT

RECORD = ROOT / "docs" / "trust.json"


def known(campaign: str) -> dict[str, Any]:
    """What the record says of a campaign; nothing before the first."""
    return (read_json(RECORD) if RECORD.exists() else {}).get(campaign, {})


def record(campaign: str, entry: dict[str, Any]) -> None:
    """Put a campaign's outcome in the place of the one before."""
    before = read_json(RECORD) if RECORD.exists() else {}
    write_json(
        RECORD,
        dict(sorted({**before, campaign: {"date": date.today().isoformat(), "machine": machine(), **entry}}.items())),
    )
