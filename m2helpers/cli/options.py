"""What several commands share: the kinds of values that flags take, flags made from a class of settings, the model to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args, get_origin, get_type_hints

from tyro.conf import FlagConversionOff, Positional, arg, create_mutex_group
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..engine.tracking import TRACKERS
from ..files import UserError
from ..settings import InstructSettings, PretrainSettings, TrainSettings

if TYPE_CHECKING:
    from ..models import Base
    from ..runs import Run


def one_of(choices: tuple[str, ...]) -> PrimitiveConstructorSpec[str | None]:
    """A flag whose values stand in a list elsewhere."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str | None),
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


Flag = Annotated[bool, arg(help_behavior_hint="")]
"""Without a value: given or not."""
_MODEL_OR_RUN = create_mutex_group(required=False, title="one of")
_MODEL = arg(metavar="NAME_OR_DIR", help="'embedded', a hub name or a folder.")

File = Annotated[Path, arg(metavar="FILE")]
InputFile = Annotated[Positional[Path], arg(metavar="FILE")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")]
Folder = Annotated[Path, arg(metavar="DIR")]
DataFile = Annotated[
    Path, arg(metavar="FILE", help="HDF5 with the data.", help_behavior_hint="(default: the shipped data)")
]
BaseName = Annotated[str, _MODEL]
BaseOrRun = Annotated[str, _MODEL, _MODEL_OR_RUN]
RunOrBase = Annotated[
    Path | None,
    arg(metavar="DIR", help="Folder of a finished run.", help_behavior_hint="(default: the base, untrained)"),
    _MODEL_OR_RUN,
]
Adapter = Annotated[
    Path | None, arg(metavar="DIR", help="Folder of a LoRA that peft trained on --model.", help_behavior_hint="")
]
Track = Annotated[
    str | None, one_of(TRACKERS), arg(help="Log losses there too.", help_behavior_hint="(default: nowhere)")
]

REGISTRY = ConstructorRegistry()
"""How values of some types are read, wherever they stand."""


@REGISTRY.primitive_rule
def _names(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[str, ...]] | None:
    """Names with commas between them."""
    if (get_origin(info.type), get_args(info.type)) != (tuple, (str, ...)):  # it may come as typing.Tuple
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME,NAME",
        instance_from_str=lambda words: tuple(words[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda names: [",".join(names)],
    )


@REGISTRY.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """A setting that is on or off, and not a flag without a value."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{0,1}",
        instance_from_str=lambda words: words[0].lower() in ("1", "true"),
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(int(value))],
        choices=("0", "1", "false", "true", "False", "True"),
    )


Settings = TypeVar("Settings", PretrainSettings, TrainSettings, InstructSettings)


def flags_of(settings: type[Settings], about: str, default: Callable[[Field], str]) -> object:
    """One flag for each field of a class of settings, none of them required, for ``Annotated``.

    The value is None where a flag is not given: `changed` leaves it out. A subclass carries the flags because it has its
    parent's docstrings, from which tyro takes the help.

    Parameters
    ----------
    about
        Stands above the flags.
    default
        What the help shows as a field's default.
    """
    kinds = get_type_hints(settings)
    flags = [
        (
            f.name,
            Annotated[kinds[f.name] | None, FlagConversionOff, arg(help_behavior_hint=f"(default: {default(f)})")],
            None,
        )
        for f in fields(settings)
    ]
    unchecked = {"__doc__": about, "__post_init__": lambda self: None}
    return arg(constructor=make_dataclass("Given", flags, bases=(settings,), namespace=unchecked, frozen=True))


def show(value: object) -> str:
    """A setting's value as its flag takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def changed(settings: Settings, flags: Settings) -> Settings:
    """The settings, with those in their place that were given as flags."""
    values = {f.name: getattr(flags, f.name) for f in fields(flags)}
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def load_target(model: str, run: Path | None, adapter: Path | None, constrained: bool) -> tuple[Base, Run | None, bool]:
    """The base of a run, the run, and whether to constrain it; or a base, as it is or with an adapter, and None."""
    from ..models import load_base
    from ..runs import load_adapted, load_run

    if adapter and run:
        raise UserError("--adapter goes with --model; a run has an adapter of its own")
    if adapter:
        return load_adapted(model, adapter), None, constrained
    if run is None:
        return load_base(model), None, constrained
    loaded = load_run(run)
    return loaded.base, loaded, constrained or loaded.constrained
