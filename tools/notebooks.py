"""Execute the notebooks in order: copies for the report, or in place to refresh the outputs that are committed.

python tools/notebooks.py --output-dir docs/notebooks     (what `make report` does)
python tools/notebooks.py --in-place                      (what `make notebooks` does; it also records what each costs)
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

from m2helpers.files import UserError, check_folder_writable, cleared_up_on_signals, read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "docs" / "notebook_costs.json"
CELL_TIMEOUT = 1800  # seconds; pytest --nbval has a limit like it
# No progress bar and no warning of a library lands in an output; conftest.py gives pytest --nbval the same.
ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "QT_API": "",  # tells tqdm.auto that this is a console: its notebook widget does not heed TQDM_DISABLE
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}
_PEAK_MEMORY = """
import pathlib, psutil
status = pathlib.Path("/proc/self/status")  # Linux; getrusage would count what the parent held when it forked
lines = status.read_text().splitlines() if status.exists() else []
peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
print(peaks[0] if peaks else psutil.Process().memory_info().rss)
"""


def find_notebooks(folder: Path = ROOT / "notebooks") -> list[Path]:
    """The numbered notebooks in their order, then the appendices."""
    return [*sorted(folder.glob("[0-9]*_*.ipynb")), *sorted(folder.glob("appendix_*.ipynb"))]


def execute(path: Path) -> tuple[nbformat.NotebookNode, float, int]:
    """Execute a copy of a notebook, in its own folder and this environment's Python.

    Returns
    -------
    notebook
        With its outputs; cell ids as they were, metadata without versions and times, so that diffs stay small.
    float
        Seconds.
    int
        Peak memory of the kernel in bytes.

    Raises
    ------
    UserError
        If a cell fails: names the notebook, the cell and the error.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # of the kernel, whose remarks would break up the progress shown
    )
    started = time.perf_counter()
    with client.setup_kernel(env=os.environ | ENVIRONMENT):
        for index, cell in enumerate(list(notebook.cells)):
            try:
                client.execute_cell(cell, index)
            except CellExecutionError as error:
                reason = f"{error.ename}: {error.evalue}".splitlines()[0]
                raise UserError(f"{path.name}, cell {index + 1}: {reason}") from None
            except (CellControlSignal, DeadKernelError) as error:  # out of time, or out of memory
                raise UserError(f"{path.name}, cell {index + 1}: {str(error).splitlines()[0]}") from None
        seconds = time.perf_counter() - started
        probe = nbformat.v4.new_code_cell(_PEAK_MEMORY)
        notebook.cells.append(probe)
        client.execute_cell(probe, len(notebook.cells) - 1)
        notebook.cells.pop()
    notebook.metadata = nbformat.from_dict(METADATA)  # the state of widgets, full of random ids, is left out
    return notebook, seconds, int(probe.outputs[0]["text"])


def record_cost(name: str, seconds: float, memory: int, path: Path = COSTS) -> None:
    """Put one notebook's seconds and peak memory into the record that pages read, and leave the others' as they are."""
    rows = {row["notebook"]: row for row in read_json(path)["notebooks"]} if path.is_file() else {}
    rows[name] = {"notebook": name, "seconds": round(seconds, 1), "peak_memory_mb": round(memory / 1e6)}
    write_json(path, {"cores": os.cpu_count(), "notebooks": [rows[key] for key in sorted(rows)]})


def note_time(title: str, seconds: float) -> str:
    """A notebook's title cell with the seconds that it took, where it says so (``runs in 9 s on 2 cores``)."""
    return re.sub(r"runs in \d+ s on \d+ cores", f"runs in {seconds:.0f} s on {os.cpu_count()} cores", title)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status, 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--in-place", action="store_true", help="refresh the committed outputs")
    where.add_argument("--output-dir", type=Path, metavar="DIR", help="write executed copies there")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all, in order")
    options = parser.parse_args(arguments)
    paths = options.notebooks or find_notebooks()
    try:
        with cleared_up_on_signals():
            return _execute_all(paths, options.output_dir)
    except (UserError, OSError) as error:  # a full disk, a folder that takes nothing
        print(f"error: {error}; mend that and run it again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nerror: stopped; run it again", file=sys.stderr)
        return 1


def _execute_one(path: Path, output_dir: Path | None) -> tuple[float, int]:
    """Execute a notebook and write it; return its seconds and its peak memory in bytes."""
    try:
        notebook, seconds, memory = execute(path.resolve())
        if output_dir is None:
            notebook.cells[0].source = note_time(notebook.cells[0].source, seconds)
        write_text(path if output_dir is None else output_dir / path.name, nbformat.writes(notebook) + "\n")
        if output_dir is None:
            record_cost(path.stem, seconds, memory)
    except (OSError, MemoryError, RuntimeError) as error:  # the last: no room for a thread, no kernel
        raise UserError(f"{error} ({path.name}); mend that and run it again") from None
    return seconds, memory


def _execute_all(paths: list[Path], output_dir: Path | None) -> int:
    if output_dir:
        check_folder_writable(output_dir)
    with tempfile.TemporaryDirectory(prefix="m2helpers-") as folder:
        ENVIRONMENT["M2_LEDGER"] = str(Path(folder) / "ledger.sqlite")  # a report is read, not spent on
        for number, path in enumerate(paths, 1):
            print(f"[{number}/{len(paths)}] {path.name} … ", end="", flush=True)
            try:
                seconds, memory = _execute_one(path, output_dir)
            except UserError as error:
                print("failed", flush=True)
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(f"{seconds:.0f} s, {memory / 1e6:,.0f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
