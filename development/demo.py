"""The demo: a shipped workflow through ComfyUI, followed chunk by chunk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from ..lightforcing_core.errors import UserError
from ..lightforcing_core.outputs import replacing
from .comfy_server import ROOT, Server

WORKFLOW = ROOT / "workflows" / "api" / "first_video.json"
STREAM = "LightForcingStreamVideo"
_FRAME_RATE = 16

# Told of every chunk: the data of nodes/live.py's chunk event.
OnChunk = Callable[[dict[str, Any]], None]


def make_video(
    server: Server,
    graph: dict[str, Any],
    *,
    out: Path,
    json_out: Path,
    on_chunk: OnChunk = lambda chunk: None,
) -> dict[str, Any]:
    """Run a graph with one Stream Video node; leaves its mp4 in `out` and a report in `json_out`.

    Returns:
        The report: the names of `lightforcing generate --json`, and what ComfyUI says of itself.
    Raises:
        UserError: it was refused, failed or was stopped; neither file is changed then.
    """
    (stream,) = (name for name, node in graph.items() if node["class_type"] == STREAM)
    prompt_id, run = _follow(server, graph, on_chunk)
    entry = server.finished(prompt_id)
    video = server.output(entry["outputs"], stream)
    frames = imageio_ffmpeg.count_frames_and_secs(str(video))[0]
    inputs = graph[stream]["inputs"]
    machine = server.ask("/system_stats")[1]
    report = {
        "out": str(out),
        "frames": frames,
        "fps": _FRAME_RATE,
        "width": inputs["width"],
        "height": inputs["height"],
        "seed": inputs["seed"],
        "seconds": run["seconds"],
        "load_seconds": run["load_seconds"],
        "frames_per_second": frames / run["seconds"],
        "device": machine["devices"][0]["type"],
        "chunks": [
            {
                "index": chunk["index"],
                "sparsity": chunk["sparsity"],
                "density": chunk["density"],
                "pixel_frames": chunk["frames"],
                "seconds": chunk["seconds"],
            }
            for chunk in run["chunks"]
        ],
        "comfyui": {
            "version": machine["system"]["comfyui_version"],
            "prompt_id": prompt_id,
            "torch": machine["system"]["pytorch_version"],
        },
    }
    with replacing(out) as video_copy, replacing(json_out) as report_file:
        shutil.copyfile(video, video_copy)
        report_file.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _follow(server: Server, graph: dict[str, Any], on_chunk: OnChunk) -> tuple[str, dict[str, Any]]:
    """Queue a graph and wait for its end; the prompt's id, and times and chunks of its run."""
    submitted = began = ended = time.perf_counter()
    chunks = []
    with server.events() as (client, events):
        prompt_id = server.submit(graph, client)
        for event, data in events:
            if event == "lightforcing.start":
                began = time.perf_counter()
            elif event == "lightforcing.chunk":
                chunks.append(data)
                on_chunk(data)
            elif event == "lightforcing.end":
                ended = time.perf_counter()
            elif event == "execution_error":
                raise UserError(
                    f"node {data['node_id']} ({data['node_type']}) failed: "
                    f"{data['exception_message'].strip()}"
                )
            elif event == "execution_interrupted":
                raise UserError("the run was stopped in ComfyUI; nothing was written")
            elif event == "execution_success":
                break
    if not chunks:
        raise UserError("ComfyUI ran the workflow and sent no chunk; does it have Stream Video?")
    return prompt_id, {
        "seconds": ended - began,
        "load_seconds": began - submitted,
        "chunks": chunks,
    }
