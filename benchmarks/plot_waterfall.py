"""Draw a table of `lightforcing bench rollout --waterfall`: `plot_waterfall.py TABLE.csv OUT.png`.

Needs matplotlib (`pip install -e .[bench]`).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from lightforcing.lightforcing_core.bench.waterfall_plot import plot_waterfall


def main() -> None:
    """Read the table, draw what each step takes away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with arguments.table.open(newline="") as file:
        rows = [{k: _read(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    plot_waterfall({"rows": rows, "device": rows[0]["device"]}, arguments.out)


def _read(text: str) -> str | int | float:
    """A cell as the number it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
