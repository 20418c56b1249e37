"""What became of an expectation: one line beneath a result, decided by the figures and not by hand."""

from __future__ import annotations

_IN_WORDS = {True: "Held", False: "Failed", None: "Unclear"}


def expected(claim: str, held: bool | None, found: str = "") -> str:
    """The verdict on something that a page told its reader to expect, in Markdown.

    Parameters
    ----------
    claim : str
        What was expected, as a clause without a full stop.
    held : bool or None
        What the figures say: it held, it failed, or, None, they do not decide it.
    found : str
        The figures, and of an expectation that did not hold the reason. Numbers come from variables.
    """
    verdict = _IN_WORDS[None if held is None else bool(held)]  # numpy's truth values are no keys
    return f"*Expected:* {claim}. **{verdict}**{f': {found}' if found else ''}{'' if found.endswith('.') else '.'}"


def all_fall(changes: list[tuple[float, float, float]]) -> bool | None:
    """Whether each of several changes, with its interval, is a fall: yes if all are clear, no if one is a clear rise, else unclear."""
    if any(low > 0 for _, low, _ in changes):
        return False
    return True if changes and all(high < 0 for _, _, high in changes) else None
