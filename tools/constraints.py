"""Pin every package that an installation brings, not only those that requirements.txt names: write constraints.txt.

python tools/constraints.py             (resolves once for every platform and Python; what is pinned already stays, if it can)
python tools/constraints.py --check     (resolves for each of them, and records in docs/trust.json which are served)
python tools/constraints.py --upgrade   (takes the newest of what requirements.txt does not pin)

Needs `uv` (pip install uv) and a package index; nothing is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SERVED = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
NOT_SERVED = ("x86_64-apple-darwin", "aarch64-pc-windows-msvc")  # PyTorch has no wheels for these any more
HEAD = """\
# Every package of an installation, at the version that was tried; made by tools/constraints.py, not by hand. pip takes it with -c:
# it says which version, if a package is installed at all. Hashes are left out: PyTorch's CPU builds, of another index, have others.
"""


def _resolve(*flags: str) -> subprocess.CompletedProcess[str]:
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *flags, "requirements.txt"]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}  # the oldest that PyTorch serves
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def write(upgrade: bool) -> int:
    """Write constraints.txt; return the exit status."""
    path = ROOT / "constraints.txt"
    done = _resolve("--universal", "--python-version", PYTHONS[0], "-o", path.name, *(["--upgrade"] if upgrade else []))
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return 1
    path.write_text(HEAD + path.read_text(encoding="utf-8"), encoding="utf-8")
    return 0


def check() -> int:
    """Resolve, from wheels alone, for each platform and Python; record which can be had. The exit status is 1 if one changed sides."""
    from tests.campaigns.record import record

    found = {
        f"{python} {platform}": not _resolve(
            "--python-version", python, "--python-platform", platform, "-c", "constraints.txt", "--only-binary", ":all:"
        ).returncode
        for platform in (*SERVED, *NOT_SERVED)
        for python in PYTHONS
    }
    record("platforms", {"resolves": found})
    wrong = [name for name, there in found.items() if there != (name.partition(" ")[2] in SERVED)]
    print(*(f"{name}: {'resolves' if there else 'does not'}" for name, there in found.items()), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    options = parser.parse_args()
    if not shutil.which("uv"):
        sys.exit("tools/constraints.py: needs uv; pip install uv")
    sys.exit(check() if options.check else write(options.upgrade))
