"""Where things are: what the project ships (base, data, records, pages), and where a user's own runs and ledgers go.

`ROOT` is read: the folder that ``M2_HOME`` names if it holds the embedded base, else a checkout, else what is installed.
`HOME` is written: ``M2_HOME``, else a checkout, else the user's folder for the data of programs; never site-packages.
"""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_data_path

from .files import UserError, sha256_files

EMBEDDED = "embedded"
"""Name of the base that this project ships."""

_PACKAGE = Path(__file__).resolve().parent
_BASE = Path("checkpoint", EMBEDDED, "base")


def _holds_base(root: Path) -> bool:
    return (root / _BASE / "model.safetensors").is_file()


def _find_roots() -> tuple[Path, Path]:
    """`ROOT` and `HOME`."""
    named, checkout, installed = os.environ.get("M2_HOME"), _PACKAGE.parent, _PACKAGE / "shipped"
    in_checkout = (checkout / "pyproject.toml").is_file() and _holds_base(checkout)
    if named:
        home = Path(named).expanduser().absolute()
    else:
        home = checkout if in_checkout else user_data_path("m2helpers", appauthor=False)
    shipped = checkout if in_checkout else installed
    return (home if named and _holds_base(home) else shipped), home


ROOT, HOME = _find_roots()
EMBEDDED_BASE = ROOT / _BASE
DATA_FILE = ROOT / "data" / "lotka_volterra_data.h5"
INSTRUCTIONS = ROOT / "data" / "instructions"
SHIPPED_BASELINES = ROOT / "data" / "baselines"
SHIPPED_LAWS = ROOT / "data" / "law"
SHIPPED_FLOORS = ROOT / "data" / "floor"
SHIPPED_BENCHMARKS = ROOT / "docs" / "benchmarks.json"
SHIPPED_COSTS = ROOT / "docs" / "cost.json"
SHIPPED_CLASSICS = ROOT / "docs" / "classic_series.json"
CLUSTER_TIMES = ROOT / "docs" / "cluster.json"
CHECKPOINTS = HOME / "checkpoint"
BASELINE_CACHE = HOME / "data" / "baselines"
LAW_CACHE = HOME / "data" / "law"
FLOOR_CACHE = HOME / "data" / "floor"
BENCHMARKS = HOME / "docs" / "benchmarks.json"
CLASSICS = HOME / "docs" / "classic_series.json"


def find_base(name: str, *, weights: bool = True) -> Path | None:
    """The folder of a base that is on this machine; None if there is none. Nothing is fetched.

    Parameters
    ----------
    name : str
        ``embedded``, a folder in hub format, or a hub name, which is looked up in the hub's local cache.
    weights : bool
        False if ``config.json`` is enough.
    """
    if name == EMBEDDED:
        return EMBEDDED_BASE
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        return None
    import huggingface_hub  # here, because few need it and it takes a while

    patterns = hub_files(weights)
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name that a hub could know
        return None
    whole = weight_files(folder) if weights else (folder / "config.json").is_file()
    return folder if whole else None  # a cache can hold a config or a tokenizer alone


def hub_files(weights: bool) -> list[str]:
    """Which files are read of a model on the hub: no code, no pickles."""
    return ["*.json", "*.txt", "*.safetensors"] if weights else ["config.json"]


def is_hub_name(name: str) -> bool:
    """Whether a hub could know a name: ``owner/model``."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, not a training state or an adapter beside them."""
    return sorted(folder.glob("model*.safetensors"))


def find_run(folder: Path) -> Path:
    """The folder of a run as a user named it, or the shipped one that a checkout has there: ``checkpoint/embedded/final``."""
    return ROOT / folder if not folder.exists() and (ROOT / folder).is_dir() else folder


def short_name(name: str) -> str:
    """The last part of a base's name, for folders and headings: ``Qwen2.5-0.5B-Instruct``; of ``.``, the folder's own."""
    return Path(os.path.abspath(name)).name


def is_embedded(name: str) -> bool:
    """Whether a name, or a folder under whatever name, is the base that this project ships."""
    folder = find_base(name)
    if name == EMBEDDED or folder is None:
        return name == EMBEDDED
    ours, theirs = weight_files(EMBEDDED_BASE), weight_files(folder)
    sizes = [[path.stat().st_size for path in paths] for paths in (ours, theirs)]  # saves hashing a large one
    return bool(ours) and sizes[0] == sizes[1] and sha256_files(ours) == sha256_files(theirs)


def checkpoint_folder(name: str) -> Path:
    """Where the records of a base are read: of the embedded one those that are shipped, of any other a user's own.

    Raises
    ------
    UserError
        If the base is not on this machine.
    """
    return EMBEDDED_BASE.parent if is_embedded(name) else own_folder(name)


def own_folder(name: str) -> Path:
    """Where a user's runs of a base, and its ledger, go (see `folder_of`).

    Raises
    ------
    UserError
        If the base is not on this machine: what it is called does not say which one it is.
    """
    if name == EMBEDDED:
        return CHECKPOINTS / EMBEDDED
    folder = find_base(name)
    if folder is None and is_hub_name(name):
        raise UserError(
            f"{name}: not in the hub's local cache, and no folder, so nothing was done with it here; "
            "fetch it first ('hf download'), or give a folder or 'embedded'"
        )
    if folder is None:
        raise UserError(f"{name}: no such model; give 'embedded', a folder, or a hub name such as Qwen/Qwen2.5-0.5B")
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"{name}: no model*.safetensors weights in {folder}; give a folder in hub format")
    return folder_of(name, sha256_files(weights))


def folder_of(name: str, sha256: str) -> Path:
    """The folder of a base with these weights: ``checkpoint/embedded``, or ``checkpoint/<last part of the name>-<hash>``.

    Weights say which base it is, and its name does not: another copy has the same folder, another base never.
    """
    ours = weight_files(EMBEDDED_BASE)
    if name == EMBEDDED or (ours and sha256 == sha256_files(ours)):
        return CHECKPOINTS / EMBEDDED
    kept = sorted(CHECKPOINTS.glob(f"*-{sha256[:8]}"))  # begun when the base was called something else
    return kept[0] if kept else CHECKPOINTS / f"{short_name(name)}-{sha256[:8]}"
