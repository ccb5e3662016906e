"""Draw a table of `lightforcing bench attention` as bars: `plot_attention.py TABLE.csv OUT.png`.

Needs matplotlib (`pip install -e .[dev]`).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

METHODS = {
    "cudnn": ("dense, cuDNN", "#9a9a9a"),
    "flash2": ("dense, flash-attention 2", "#c9c9c9"),
    "flex": ("FlexAttention, same lists", "#d8b26e"),
    "triton": ("ours, plain Triton", "#7fb3a6"),
    "gluon": ("ours, Gluon", "#1f7a66"),
    "select once + attend": ("ours, with selection once a chunk", "#0c3f35"),
}


def main() -> None:
    """Read the table, draw milliseconds of every chunk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", default="Attention of one layer")
    arguments = parser.parse_args()
    with arguments.table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["ms"] and row["method"] in METHODS]
    chunks = sorted({int(row["chunk"]) for row in rows})
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    width = 0.86 / len(methods)
    for place, name in enumerate(methods):
        found = {int(row["chunk"]): float(row["ms"]) for row in rows if row["method"] == name}
        at = [i + (place - (len(methods) - 1) / 2) * width for i in range(len(chunks))]
        label, colour = METHODS[name]
        bars = axes.bar(at, [found.get(c, 0) for c in chunks], width * 0.94, color=colour,
                        label=label)  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
    axes.set_xticks(range(len(chunks)), [f"chunk {chunk + 1}" for chunk in chunks])
    axes.set_ylabel("milliseconds")
    axes.set_title(f"{arguments.title} ({rows[0]['device']})" if "device" in rows[0]
                   else arguments.title, fontsize=10)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
