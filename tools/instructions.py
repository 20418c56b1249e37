"""Write the instructions that are shipped: python tools/instructions.py [--output-dir data/instructions]."""

from __future__ import annotations

import argparse
from pathlib import Path

from m2helpers.data import load_dataset
from m2helpers.instruct.questions import write_questions
from m2helpers.paths import INSTRUCTIONS

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--output-dir", type=Path, default=INSTRUCTIONS, metavar="DIR")
    write_questions(load_dataset(), parser.parse_args().output_dir)
