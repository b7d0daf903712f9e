"""What commands print in a terminal of 80 columns, for docs/terminal.md: writes benchmarks/results/terminal.md.

python benchmarks/terminal.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COMMANDS = (
    "turbovlm doctor",
    "turbovlm inspect timm:vit_small_patch16_224 --flops 0.6",
    "turbovlm macs timm:test_vit --r 8 --json",
)


def main() -> None:
    environment = {**os.environ, "COLUMNS": "80"}
    parts = ["# What commands print"]
    for command in COMMANDS:
        words = [sys.executable, "-m", *command.split()]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        printed = "\n".join(line.rstrip() for line in done.stdout.splitlines())
        parts.append(f"```text\n$ {command}\n{printed}\n```")
    (RESULTS / "terminal.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
