"""Flags that are made from a class of settings."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import tyro

from m2helpers.cli.options import REGISTRY, changed, flags_of, show


@dataclass(frozen=True)
class Parent:
    size: int = 3
    """How large."""


@dataclass(frozen=True)
class Settings(Parent):
    names: tuple[str, ...] = ("a", "b")
    """Which ones."""
    fast: bool = True
    """1: at once; 0: later."""

    def __post_init__(self):
        if self.size < 0:
            raise ValueError("too small")


def _parse(*words):
    @dataclass(frozen=True)
    class Command:
        settings: Annotated[Settings, flags_of(Settings, "What it is about.", lambda f: show(f.default))]

    return tyro.cli(Command, args=words, config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone), registry=REGISTRY)


def test_what_is_not_given_stays():
    assert changed(Settings(size=5), _parse().settings) == Settings(size=5)
    assert changed(Settings(size=5), _parse("--names", "c").settings) == Settings(size=5, names=("c",))


@pytest.mark.parametrize(("word", "value"), [("0", False), ("1", True), ("false", False), ("True", True)])
def test_a_switch_takes_0_1_and_words(word, value):
    assert changed(Settings(fast=not value), _parse("--fast", word).settings).fast is value


def test_a_switch_takes_nothing_else(capsys):
    with pytest.raises(SystemExit):
        _parse("--fast", "maybe")
    assert "--fast" in capsys.readouterr().err


def test_settings_are_checked_when_they_are_whole():
    flags = _parse("--size", "-1").settings
    with pytest.raises(ValueError, match="too small"):
        changed(Settings(), flags)


def test_help_is_the_docstring_under_the_field_with_its_default(capsys):
    with pytest.raises(SystemExit):
        _parse("--help")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "What it is about." in said
    assert "--size INT How large. (default: 3)" in said  # the parent's
    assert "--names NAME,NAME Which ones. (default: a,b)" in said
    assert "--fast {0,1} 1: at once; 0: later. (default: 1)" in said
