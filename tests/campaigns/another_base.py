"""Every notebook executed with another base, a folder of random weights: run by hand, since `make test` runs each notebook once.

python tests/campaigns/another_base.py     (fails if a notebook does, or shows the embedded base's results without saying so)
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from m2helpers.models import embedded_config, embedded_tokenizer
from tools import notebooks

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def main() -> int:
    """Execute them all; return the exit status."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tiny"
        torch.manual_seed(0)
        Qwen2ForCausalLM(embedded_config(**TINY, initializer_range=0.3)).save_pretrained(folder)
        embedded_tokenizer().save_pretrained(folder)
        os.environ |= {"M2_MODEL": str(folder), "M2_LEDGER": str(Path(temporary) / "ledger.sqlite")}
        failed = 0
        for path in notebooks.find_notebooks():
            print(f"{path.stem}: {(problem := _problem(path)) or 'as it should be'}", flush=True)
            failed += bool(problem)
    return 1 if failed else 0


def _problem(path: Path) -> str:
    """What is wrong with a notebook under the other base; nothing if nothing is."""
    try:
        notebook, _, _ = notebooks.execute(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream"
    )
    if "tiny" not in printed:
        return "does not name the base"
    if path.stem[0] in "567" and not ("this page shows th" in printed and "embedded" in printed):
        return "shows the embedded base's results and does not say so"
    return ""


if __name__ == "__main__":
    sys.exit(main())
