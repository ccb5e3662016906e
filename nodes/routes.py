"""What a page may ask the server: a forecast, the runs under way, other settings for one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from server import PromptServer

from ..lightforcing_core.checkpoints.families import FAMILIES, identify
from ..lightforcing_core.checkpoints.presets import Preset
from ..lightforcing_core.errors import UserError
from ..lightforcing_core.forecast import forecast
from ..lightforcing_core.layout import FrameSize, chunk_lengths, latent_frames
from ..lightforcing_core.schedule import Timeline
from ..lightforcing_core.sparse_settings import SparseSettings
from .live import LiveRun, LiveRuns, RunPlan

_RUNS = web.AppKey("lightforcing_runs", LiveRuns)
_MOST_FRAMES = 4096  # latent frames a forecast is made for
# From a Sparse Attention node's widgets to its settings and its switch.
ReadSettings = Callable[[Mapping[str, Any]], tuple[SparseSettings, bool]]
# (lowest, highest) of what a forecast is asked for beside the settings.
_VIDEO = {
    "frames": (1, 4 * _MOST_FRAMES),
    "frames_per_chunk": (1, _MOST_FRAMES),
    "window_frames": (-1, _MOST_FRAMES),
    "given_frames": (0, _MOST_FRAMES),
    "frame_tokens": (1, 1_000_000),
    "num_layers": (1, 100),
    "num_steps": (1, 50),
}


def add_routes(
    server: PromptServer, read: ReadSettings, presets: Mapping[str, Mapping[str, float | int]]
) -> None:
    """Give the server our routes and the registry of runs they look into.

    Args:
        read: raises UserError for values out of range.
        presets: of the Sparse Attention node: values of its inputs by name.
    """
    runs = LiveRuns()
    server.app[_RUNS] = runs

    @server.routes.get("/lightforcing/presets")
    async def list_presets(request: web.Request) -> web.Response:
        return web.json_response(presets)

    @server.routes.post("/lightforcing/forecast")
    async def forecast_settings(request: web.Request) -> web.Response:
        return await _answer(request, lambda body: _forecast(body, read))

    @server.routes.get("/lightforcing/live")
    async def list_runs(request: web.Request) -> web.Response:
        return web.json_response({"runs": [run.state() for run in runs.all()]})

    @server.routes.post("/lightforcing/live")
    async def change_settings(request: web.Request) -> web.Response:
        return await _answer(request, lambda body: _change(body, runs, read))

    @server.routes.get("/lightforcing/frames")
    async def latest_frames(request: web.Request) -> web.Response:
        try:
            run = runs.get(request.query.get("node_id", ""))
        except KeyError:
            return _not_running(request.query.get("node_id"))
        return web.json_response({"run_id": run.run_id, "strips": run.strips()})


@contextlib.contextmanager
def live_run(
    node_ids: Sequence[str], plan: RunPlan, settings: SparseSettings | None, *, enabled: bool
) -> Iterator[LiveRun]:
    """A run that pages can follow while the block lasts; without a server, nobody can."""
    server = getattr(PromptServer, "instance", None)
    client = getattr(server, "client_id", None)

    def send(event: str, data: dict[str, Any]) -> None:
        # Without a client the graph came from a program, and no page shows it.
        if client is not None:
            server.send_sync(event, data, client)

    run = LiveRun(node_ids, plan, settings, enabled=enabled, send=send)
    runs = None if server is None else server.app.get(_RUNS)
    with (runs or LiveRuns()).holding(run):
        yield run


async def _answer(
    request: web.Request, handle: Callable[[dict[str, Any]], web.Response]
) -> web.Response:
    """A handler's answer to a JSON object; what it refuses is said with status 400."""
    try:
        body = await request.json()
        if not isinstance(body, dict):
            raise UserError(f"expected a JSON object, got {type(body).__name__}")
        # In a thread: a long video's forecast takes longer than the server may stand still.
        return await asyncio.to_thread(handle, body)
    except UserError as error:
        return _refuse(str(error), 400)
    # Not UTF-8, nested too deep, a number too long: JSON's own error is a ValueError as well.
    except (ValueError, RecursionError) as error:
        return _refuse(f"the request is not JSON: {error}", 400)


def _refuse(message: str, status: int) -> web.Response:
    return web.json_response({"error": message}, status=status)


def _not_running(node_id: object) -> web.Response:
    return _refuse(f"node {node_id!r} is not making a video; press Run", 404)


def _values(body: dict[str, Any]) -> dict[str, Any]:
    values = body.get("values")
    if not isinstance(values, dict):
        raise UserError("'values' must be an object: the Sparse Attention node's inputs by name")
    return values


def _change(body: dict[str, Any], runs: LiveRuns, read: ReadSettings) -> web.Response:
    node_id = body.get("node_id")
    try:
        run = runs.get(str(node_id))
    except KeyError:
        return _not_running(node_id)
    settings, enabled = read(_values(body))
    return web.json_response({"next_chunk": run.change(settings, enabled=enabled)})


def _forecast(body: dict[str, Any], read: ReadSettings) -> web.Response:
    settings, enabled = read(_values(body))
    preset = _preset(body)
    usual = {
        "frames": 81,
        "frames_per_chunk": preset.frames_per_chunk,
        "window_frames": preset.window_frames,
        "given_frames": 0,
        "frame_tokens": FrameSize(832, 480).frame_tokens,
        "num_layers": 30,
        "num_steps": len(preset.steps),
    }
    video = {
        name: _count(name, body.get(name, usual[name]), *limits) for name, limits in _VIDEO.items()
    }
    total = latent_frames(video["frames"])
    given = min(video["given_frames"], total - 1)
    lengths = chunk_lengths(total - given, video["frames_per_chunk"])
    window = video["window_frames"] or -1
    result = forecast(
        settings if enabled else None,
        Timeline(tuple(lengths), given, window),
        frame_tokens=video["frame_tokens"],
        num_layers=video["num_layers"],
        num_steps=video["num_steps"],
    )
    chunks = [vars(chunk) for chunk in result.chunks]
    return web.json_response(
        {"frames": video["frames"], "density": result.density, "chunks": chunks}
    )


def _preset(body: dict[str, Any]) -> Preset:
    """What a model was trained for, by its family or its file's name; the file is not opened."""
    family, name = body.get("family"), body.get("model_name")
    known = isinstance(family, str) and any(known.name == family for known in FAMILIES)
    path = Path(name if isinstance(name, str) else "")
    return identify(0, {}, path, family if known else None).preset


def _count(name: str, value: object, lowest: int, highest: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not lowest <= value <= highest:
        raise UserError(
            f"{name} must be a whole number from {lowest} to {highest}, got {json.dumps(value)}"
        )
    return value
