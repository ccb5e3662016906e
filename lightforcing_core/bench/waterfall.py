"""`lightforcing bench rollout --waterfall`: what each part of the speed preset gains.

Every part is measured twice: added to those before it, in order, and switched off alone from the
full preset. The two differ where parts need each other (graphs gain more when little is left to
launch), so both are shown.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..sparse_settings import SparseSettings
from .case import NO_DECODER, RolloutCase
from .common import device_name, machine_facts
from .rollout import spread, timed
from .video import Parts, Video

log = logging.getLogger("lightforcing")

START = "dense"
STEPS = {
    "sparse": "+ sparse attention",
    "fused": "+ fused glue",
    "graphs": "+ CUDA graphs",
    "eight_bit": "+ low precision",
    "beside": "+ decoding beside",
}
"""Fields of `Parts` in the order they are added, and what they are called."""


def bench_waterfall(
    case: RolloutCase, device: torch.device, sparse: SparseSettings, repeats: int = 3
) -> dict[str, Any]:
    """Measure a case's video with more and more of the speed preset.

    Returns:
        `rows` (one per step; `seconds` of the whole video with frames on the host, median, least
        and most; `gain_added`: the time before this step over that with it; `gain_off`: the time
        of the full preset without this part, and without `off_too`, over that of the full preset),
        `left_out` (parts that this device cannot do, and why), `device`, `versions`.
    """
    left_out = _left_out(case, device)
    steps = [part for part in STEPS if part not in left_out]
    measured: dict[Parts, dict[str, float]] = {}

    def seconds(parts: Parts) -> dict[str, float]:
        if parts not in measured:
            video = Video(case, parts, sparse, device)
            try:
                runs = timed(video, repeats)
            finally:
                video.release()
            measured[parts] = spread("seconds", [run.seconds for run in runs])
            log.info("%s: %s", parts, measured[parts])
        return measured[parts]

    nothing = Parts(beside=False)
    full = replace(nothing, **dict.fromkeys(steps, True))
    size = {"width": case.size.width, "height": case.size.height, "frames": case.frames}
    size |= {"decoder": case.decoder, "runs": repeats}
    now = nothing
    rows = [{"step": START, **_times(case, seconds(now)), **size}]
    for part in steps:
        before, now = now, replace(now, **{part: True})
        also = _also_off(part, steps)
        off = seconds(replace(full, **{part: False}, **dict.fromkeys(also, False)))
        rows.append(
            {
                "step": STEPS[part],
                **_times(case, seconds(now)),
                "gain_added": round(seconds(before)["seconds"] / seconds(now)["seconds"], 3),
                "gain_off": round(off["seconds"] / seconds(full)["seconds"], 3),
                "off_too": ", ".join(also),
                **{f"{name}_off": value for name, value in off.items()},
                **size,
            }
        )
    return {
        "device": device_name(device),
        "versions": machine_facts(device),
        "rows": rows,
        "left_out": left_out,
    }


def _also_off(part: str, steps: Sequence[str]) -> list[str]:
    """What cannot stay on without a part: graphs, for only fused forwards are recorded."""
    return ["graphs"] if part == "fused" and "graphs" in steps else []


def _left_out(case: RolloutCase, device: torch.device) -> dict[str, str]:
    """Parts that cannot be measured here, and why."""
    alone = {part: replace(Parts(beside=False), **{part: True}) for part in STEPS}
    alone["graphs"] = replace(alone["graphs"], fused=True)
    reasons = {part: parts.obstacle(device, case.dtype) for part, parts in alone.items()}
    if case.decoder == NO_DECODER:
        reasons["beside"] = "nothing is decoded"
    elif device.type != "cuda":
        reasons["beside"] = f"decoding goes on in line on {device}: both would share its cores"
    return {part: reason for part, reason in reasons.items() if reason is not None}


def _times(case: RolloutCase, seconds: dict[str, float]) -> dict[str, float]:
    return {**seconds, "frames_per_second": round(case.frames / seconds["seconds"], 2)}


def waterfall_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as lines of text."""
    lines = [f"{'':22}{'seconds':>9}{'spread':>18}{'frames/s':>10}{'added':>8}{'off':>8}"]
    for row in rows:
        gains = "".join(
            f"{row[key]:>6.2f} x" if key in row else f"{'':>8}"
            for key in ("gain_added", "gain_off")
        )
        lines.append(
            f"{row['step']:22}{row['seconds']:>9.3f}"
            f"{row['seconds_min']:>9.3f} ..{row['seconds_max']:>6.3f}"
            f"{row['frames_per_second']:>10.1f}{''.join(gains)}"
        )
    return lines
