"""Commands that account: what a step or a plan costs, and what has been spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagConversionOff, arg, create_mutex_group

from ..files import UserError, check_writable, write_json, write_text
from ..settings import LoraSettings, TrainSettings, default_model
from .options import BaseName, Flag, OptionalFile

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..flops.account import Account

_PURPOSE = create_mutex_group(required=False, title="one of")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """The account of one step, by component; or of a plan of experiments."""

    batch_size: int = 4
    """Rows."""
    length: int = 512
    """Tokens a row."""
    lora_r: int = LoraSettings.lora_r
    """Rank of the updates; 0: none, or merged."""
    target_modules: tuple[str, ...] = LoraSettings.target_modules
    """Names of the linear layers that have one, in every block."""
    numeric_head: FlagConversionOff[bool] = False
    """1: only the characters of numeric text are scored; 0: the whole vocabulary."""
    gradient_checkpointing: FlagConversionOff[bool] = False
    """1: the layers run forward once more in the backward pass; with --train."""
    train: Annotated[Flag, _PURPOSE] = False
    """A training step: forward and backward, with the loss."""
    infer: Annotated[Flag, _PURPOSE] = False
    """A forward pass, which is the default."""
    plan: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: one step)")] = None
    """A plan of experiments instead: embedded or qwen2.5-0.5b."""
    convention: Literal["exact", "course"] = "exact"
    """Grouped-query attention as it runs, or counted as full multi-head attention."""
    json: OptionalFile = None
    """Write what is printed there, as a record."""
    model: BaseName = field(default_factory=default_model)

    def __call__(self) -> None:
        if self.plan:
            self._price_plan(self.plan)
        else:
            self._price_step()

    def _price_plan(self, name: str) -> None:
        from ..data import load_dataset
        from ..experiments.planning import find_plan, further_steps, plan_table
        from ..flops.account import CAP

        plan, config = find_plan(name), _config(self.model)
        table = plan_table(config, plan, load_dataset())
        if self.json:
            write_json(self.json, table.reset_index().to_dict("records"))
        total, rest = table["exact"].sum(), max(0, further_steps(config, plan, table))
        print(table.to_string(formatters={"share of the cap": "{:.3%}".format}, float_format="{:.4g}".format))
        print(
            f"all of it: {total:.4g} FLOPs, {total / CAP:.2%} of {CAP:.0e}; the rest buys {rest:,} further steps of its last run"
        )

    def _price_step(self) -> None:
        from ..flops.account import flops_json

        if self.gradient_checkpointing and not self.train:
            raise UserError("--gradient-checkpointing 1: only a training step computes activations again; add --train")
        account = self._account()
        total, what = account.forward, "inference"
        if self.train:
            total, what = account.training, "training step: 3 × forward"
        if self.gradient_checkpointing:
            total, what = total + account.blocks, f"{what}, and the layers once more"
        if self.json:
            write_json(self.json, flops_json(account, train=self.train) | {"total": total})
        for name, flops in account.components.items():
            print(f"{name:<18}{flops:>26,}")
        print(f"{'forward':<18}{account.forward:>26,}")
        print(f"{'total':<18}{total:>26,}  ({what}, {account.convention})")
        print(f"{'parameters':<18}{account.parameters:>26,}\n{'trainable':<18}{account.trainable:>26,}")

    def _account(self) -> Account:
        from ..flops.account import forward_account

        adapted = TrainSettings(
            lora_r=self.lora_r, target_modules=self.target_modules, numeric_head=self.numeric_head
        ).adaptation
        return forward_account(
            _config(self.model),
            self.batch_size,
            self.length,
            lora_r=adapted.lora_r,
            target_modules=adapted.target_modules,
            vocabulary=adapted.vocabulary,
            convention=self.convention,
            loss=self.train,
        )


def _config(name: str) -> Mapping[str, Any] | PreTrainedConfig:
    """An architecture's numbers (and a name and flags: `Any`), for Qwen2.5-0.5B-Instruct without the network."""
    from ..flops.architecture import QWEN_05B

    if name == "Qwen/Qwen2.5-0.5B-Instruct":
        return QWEN_05B
    from ..models import load_config

    return load_config(name)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What has been spent, by run and kind, and what is left."""

    json: OptionalFile = None
    """Write the ledger there, as a record."""
    csv: OptionalFile = None
    """Write every entry there, as a table."""
    model: BaseName = field(default_factory=default_model)

    def __call__(self) -> None:
        import pandas as pd

        from ..ledger import COLUMNS, ledger_note, ledger_path, read_ledger
        from ..ledger.stores import without_password

        path = ledger_path(self.model)
        report = read_ledger(path)
        entries = pd.DataFrame(report["entries"], columns=COLUMNS)
        for out in (self.json, self.csv):  # neither is written where the other cannot be
            if out:
                check_writable(out)
        if self.json:
            write_json(self.json, report)
        if self.csv:
            write_text(self.csv, entries.to_csv(index=False))
        spent = f"{report['spent']:.4g} FLOPs spent or reserved" if len(entries) else "nothing has been spent yet"
        print(
            f"{without_password(str(path))}{ledger_note(self.model, path)}: {spent}, {report['left']:.4g} left of {report['cap']:.0e}"
        )
        if len(entries):
            table = entries.groupby(["stage", "run", "kind"], sort=False)[["tokens", "flops", "flops_course"]].sum()
            table["share of the cap"] = (table["flops"] / report["cap"]).map("{:.4%}".format)
            print(table.to_string(float_format="{:.4g}".format))
