"""A waterfall of `bench.waterfall` as a picture. Needs matplotlib (`pip install -e .[bench]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..outputs import check_output, replacing
from ..palette import BLUE, FAINT, GRID, INK, PALE_BLUE, PAPER, RED, Color

_INCHES, _DOTS = (9.6, 5.4), 200


def check_plot(path: Path) -> None:
    """Before anything is measured: whether the picture can be drawn.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--plot needs matplotlib to draw a waterfall, and it is not installed; run "
            "pip install -e .[bench], or leave --plot out"
        )
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"cannot draw {path}: expected .png, .svg or .pdf, got '{path.suffix}'")
    check_output(path)


def plot_waterfall(result: Mapping[str, Any], path: Path) -> None:
    """Draw the table of `bench_waterfall`: what is left of the time, and what each step took away.

    Args: result: `rows` and `device`.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: Sequence[Mapping[str, Any]] = result["rows"]
    figure = Figure(figsize=_INCHES, facecolor=_hex(PAPER))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.2, 0.9, 0.63), facecolor=_hex(PAPER))
    times = [row["seconds"] * 1e3 for row in rows]
    _bars(axes, rows, times)
    _frame(axes, rows, max(times))
    first, last = rows[0], rows[-1]
    left, top = 0.02, 0.945
    figure.text(
        left,
        top,
        f"{first['frames_per_second']:.1f} to {last['frames_per_second']:.1f} frames per second: "
        "what each part gains",
        color=_hex(INK),
        fontsize=15,
        va="center",
    )
    decoder = first["decoder"]
    shown = "without decoding" if decoder == "none" else f"{decoder} frames on the host"
    figure.text(
        left,
        top - 0.06,
        f"{first['frames']} frames of {first['width']}x{first['height']}, {shown}; "
        f"{result['device']}; medians of {first['runs']} runs, lines: least to most",
        color=_hex(FAINT),
        fontsize=9.5,
        va="center",
    )
    both = ""
    if any(row.get("off_too") for row in rows):
        both = " (both: graphs, which need it, too)"
    figure.text(
        left,
        0.045,
        "bold: the time before a step over that with it.  without it: the time of all steps but "
        f"this one{both} over that of all steps",
        color=_hex(FAINT),
        fontsize=8.5,
        va="center",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS, format=path.suffix[1:].lower())


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], times: Sequence[float]) -> None:
    from matplotlib.patheffects import withStroke

    highest = max(times)
    for place, (row, time) in enumerate(zip(rows, times, strict=True)):
        color = RED if place == 0 else BLUE
        axes.bar(place, time, 0.62, color=_hex(color), zorder=2)
        top = time
        if place:
            before = times[place - 1]
            top = max(before, time)
            # What the step took away, hanging from what there was before.
            if before > time:
                axes.bar(place, before - time, 0.62, bottom=time, color=_hex(PALE_BLUE), zorder=2)
            axes.plot(
                [place - 1 + 0.31, place + 0.31], [before] * 2, color=_hex(FAINT), lw=0.8, zorder=3
            )
        least, most = row["seconds_min"] * 1e3, row["seconds_max"] * 1e3
        axes.plot([place] * 2, [least, most], color=_hex(INK), lw=1.2, zorder=4)
        note = f"{time:.0f} ms\n{row['frames_per_second']:.1f} FPS"
        inside = time > 0.16 * highest
        axes.text(
            place,
            min(least, time) - 0.02 * highest if inside else top + 0.02 * highest,
            note,
            ha="center",
            va="top" if inside else "bottom",
            color=_hex(PAPER if inside else INK),
            fontsize=9.5,
            linespacing=1.35,
            zorder=5,
        )
        if place:
            raised = 0.0 if inside else 0.115 * highest
            gain = axes.text(
                place,
                top + 0.02 * highest + raised,
                f"{row['gain_added']:.2f}x",
                ha="center",
                va="bottom",
                color=_hex(INK),
                fontsize=11,
                fontweight="bold",
                zorder=5,
            )
            gain.set_path_effects([withStroke(linewidth=4, foreground=_hex(PAPER))])


def _frame(axes: Any, rows: Sequence[Mapping[str, Any]], highest: float) -> None:
    """Axes, and under each bar its name and what switching it off costs."""
    axes.set_xticks(range(len(rows)), [row["step"] for row in rows], fontsize=9.5)
    axes.tick_params(axis="x", colors=_hex(INK), pad=5)
    for place, row in enumerate(rows):
        if "gain_off" in row:
            axes.annotate(
                f"without {'both' if row.get('off_too') else 'it'} {row['gain_off']:.2f}x",
                (place, 0),
                xytext=(0, -30),
                textcoords="offset points",
                ha="center",
                color=_hex(FAINT),
                fontsize=9.5,
            )
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylim(0, 1.14 * highest)
    axes.set_ylabel("milliseconds a video", color=_hex(FAINT), fontsize=9.5)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", colors=_hex(FAINT), labelsize=9)
    axes.grid(axis="y", color=_hex(GRID), lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
