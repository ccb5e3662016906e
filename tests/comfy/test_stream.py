"""Streaming, live sliders and the nodes that compare, in a running ComfyUI server."""

from __future__ import annotations

import base64
import copy
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, Any]
Event = tuple[str, dict[str, Any]]


def workflow(name: str, **by_class: dict[str, Any]) -> Graph:
    """A shipped workflow in API format; keywords change inputs of our nodes by class."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
    for short, inputs in by_class.items():
        graph[find(graph, short)]["inputs"].update(inputs)
    return graph


def find(graph: Graph, short: str) -> str:
    """Id of the node of a class."""
    (found,) = (i for i, n in graph.items() if n["class_type"] == f"LightForcing{short}")
    return found


def values_of(graph: Graph) -> dict[str, Any]:
    """The widgets of its Sparse Attention, as the page sends them."""
    inputs = graph[find(graph, "SparseAttention")]["inputs"]
    return {name: value for name, value in inputs.items() if name != "model"}


def watch(
    server: Any, graph: Graph, react: Callable[[str, dict[str, Any]], None] = lambda *_: None
) -> list[Event]:
    """Run a graph as a page would; returns our events. `react` is called with each of them."""
    told = []
    with server.events() as (client, events):
        server.submit(graph, client)
        for event, data in events:
            if event.startswith("lightforcing."):
                told.append((event.removeprefix("lightforcing."), data))
                react(*told[-1])
            assert event != "execution_error", data
            if event in ("execution_success", "execution_interrupted"):
                return told
    raise AssertionError("unreachable")


def of_kind(told: list[Event], kind: str) -> list[dict[str, Any]]:
    return [data for event, data in told if event == kind]


def mp4_files(server: Any) -> set[str]:
    return {path.name for path in (server.base / "output").rglob("*.mp4")}


# ---- Stream Video


def test_a_stream_is_told_chunk_by_chunk_and_forecast_exactly(server: Any) -> None:
    graph = workflow("first_video", StreamVideo={"length": 33, "seed": 101})
    stream, sparse = find(graph, "StreamVideo"), find(graph, "SparseAttention")
    told = watch(server, graph)
    kinds = [event for event, _ in told]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("chunk") == 3
    assert all(set(data["node_ids"]) == {stream, sparse} for _, data in told)
    assert of_kind(told, "end")[0]["finished"] is True

    frames = []
    for strip in of_kind(told, "frames"):
        picture = Image.open(io.BytesIO(base64.b64decode(strip["jpeg"])))
        assert picture.size == (strip["width"], strip["height"] * strip["frames"])
        frames += np.split(np.asarray(picture), strip["frames"])
    assert len(frames) == 33 and frames[0].shape == (128, 256, 3)

    marks = of_kind(told, "chunk")
    plan = of_kind(told, "start")[0]["plan"]
    status, forecast = server.ask(
        "/lightforcing/forecast",
        {
            "values": values_of(graph),
            "frames": 33,
            "frames_per_chunk": max(plan["chunk_frames"]),
            "frame_tokens": plan["frame_tokens"],
            "num_layers": plan["num_layers"],
        },
    )
    assert status == 200
    for mark, chunk in zip(marks, forecast["chunks"], strict=True):
        assert mark["density"] == pytest.approx(chunk["density"])
        assert mark["sparsity"] == pytest.approx(chunk["sparsity"])
        assert mark["seconds"] > 0 and mark["frames_per_second"] > 0
    assert [mark["frames"] for mark in marks] == [9, 12, 12]


def test_a_stream_leaves_a_whole_mp4_and_nothing_else(server: Any) -> None:
    before = mp4_files(server)
    graph = workflow("first_video", StreamVideo={"length": 33, "seed": 102})
    outputs = server.run(graph)
    path = server.output(outputs, find(graph, "StreamVideo"))
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 33
    assert mp4_files(server) - before == {path.name}


@pytest.mark.parametrize(("collect", "count"), [(True, 21), (False, 12)])
def test_images_are_all_or_the_last_chunk(server: Any, collect: bool, count: int) -> None:
    graph = workflow(
        "first_video", StreamVideo={"length": 21, "seed": 103, "collect_images": collect}
    )
    stream = find(graph, "StreamVideo")
    graph["save"] = {"class_type": "PreviewImage", "inputs": {"images": [stream, 1]}}
    assert len(server.run(graph)["save"]["images"]) == count


def test_a_stream_goes_on_from_a_picture(server: Any) -> None:
    graph = workflow("first_video", StreamVideo={"length": 17, "seed": 104})
    stream, load = find(graph, "StreamVideo"), find(graph, "LoadModel")
    graph["picture"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 256, "height": 128, "batch_size": 1, "color": 0x4070A0},
    }
    graph["encode"] = {
        "class_type": "LightForcingStreamingVAEEncode",
        "inputs": {"pixels": ["picture", 0], "vae": [load, 2]},
    }
    graph[stream]["inputs"]["initial_latent"] = ["encode", 0]
    told = watch(server, graph)
    strips = of_kind(told, "frames")
    assert strips[0]["chunk"] is None and strips[0]["frames"] == 1
    assert sum(strip["frames"] for strip in strips) == 17
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(strips[0]["jpeg"]))))
    assert np.abs(first.mean(axis=(0, 1)) - [0x40, 0x70, 0xA0]).max() < 40
    assert of_kind(told, "start")[0]["plan"]["given_frames"] == 1


def test_a_vae_of_core_decodes_a_stream(server: Any) -> None:
    graph = workflow(
        "first_video",
        LoadModel={"model_name": "self_forcing_tiny.pt"},
        StreamVideo={"length": 21, "seed": 107, "width": 64, "height": 64},
    )
    stream, load = find(graph, "StreamVideo"), find(graph, "LoadModel")
    graph["embedded"] = copy.deepcopy(workflow("first_video")[load])
    graph["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": "tiny_vae.safetensors"}}
    (prompt, _) = graph[stream]["inputs"]["positive"]
    graph[prompt]["inputs"]["clip"] = ["embedded", 1]
    graph[stream]["inputs"]["vae"] = ["vae", 0]
    path = server.output(server.run(graph), stream)
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 21


def test_a_stopped_stream_leaves_what_plays_under_a_name_that_says_so(server: Any) -> None:
    before = mp4_files(server)

    def stop(event: str, data: dict[str, Any]) -> None:
        if event == "chunk" and data["index"] == 1:
            server.ask("/interrupt", {})

    graph = workflow(
        "first_video",
        StreamVideo={"length": 321, "seed": 105, "filename_prefix": "video/stopped"},
    )
    told = watch(server, graph, stop)
    assert of_kind(told, "end")[0]["finished"] is False
    (left,) = mp4_files(server) - before
    assert left.endswith(".interrupted.mp4")
    path = server.base / "output" / "video" / left
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] >= 21
    assert server.ask("/lightforcing/live")[1] == {"runs": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 10}, "4k + 1"),
        ({"width": 264}, "multiples of 16 pixels"),
        ({"window_frames": 2}, "window"),
    ],
)
def test_a_stream_that_cannot_be_made_is_refused(
    server: Any, changes: dict[str, Any], message: str
) -> None:
    before = mp4_files(server)
    failure = server.error(workflow("first_video", StreamVideo={"seed": 106, **changes}))
    assert message in failure["exception_message"]
    assert mp4_files(server) == before


# ---- sliders in mid-run


def _moves_target(server: Any, graph: Graph, length: int) -> list[dict[str, Any]]:
    """Marks of a run whose target sparsity is moved to 0.3 when its second chunk is done."""
    sparse = find(graph, "SparseAttention")
    answers = []

    def move(event: str, data: dict[str, Any]) -> None:
        if event == "chunk" and data["index"] == 1:
            values = {**values_of(graph), "target_sparsity": 0.3, "base_sparsity": 0.4}
            body = {"node_id": sparse, "values": values}
            answers.append(server.ask("/lightforcing/live", body))

    told = watch(server, graph, move)
    ((status, answer),) = answers
    assert status == 200 and 2 <= answer["next_chunk"] < length
    marks = of_kind(told, "chunk")
    for mark in marks:
        changed = mark["index"] >= answer["next_chunk"]
        target = 0.3 if changed else values_of(graph)["target_sparsity"]
        assert mark["settings"]["schedule"]["target"] == target
        if mark["index"]:
            assert (mark["sparsity"] < 0.5) == changed
    return marks


def test_a_slider_moved_in_mid_run_acts_from_the_next_chunk(server: Any) -> None:
    graph = workflow("first_video", StreamVideo={"length": 81, "seed": 111})
    marks = _moves_target(server, graph, 7)
    assert [mark["index"] for mark in marks] == list(range(7))
    assert marks[-1]["density"] > marks[1]["density"]


def test_sliders_act_under_the_chunk_sampler_too(server: Any) -> None:
    graph = workflow("first_video")
    stream, sparse = find(graph, "StreamVideo"), find(graph, "SparseAttention")
    prompt = graph.pop(stream)["inputs"]["positive"]
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "noise": ("RandomNoise", {"noise_seed": 112}),
        "guider": ("BasicGuider", {"model": [sparse, 0], "conditioning": prompt}),
        "sigmas": (
            "BasicScheduler",
            {"model": [sparse, 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
        ),
        "sampler": (
            "LightForcingChunkSampler",
            {
                "frames_per_chunk": 0,
                "window_frames": 0,
                "sink_frames": -1,
                "noise_rule": "seeded",
            },
        ),
        "empty": (
            "EmptyHunyuanLatentVideo",
            {"width": 256, "height": 128, "length": 81, "batch_size": 1},
        ),
        "sample": (
            "SamplerCustomAdvanced",
            {
                "noise": ["noise", 0],
                "guider": ["guider", 0],
                "sampler": ["sampler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["empty", 0],
            },
        ),
        "save": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": "latent"}),
    }
    graph |= {name: {"class_type": kind, "inputs": i} for name, (kind, i) in nodes.items()}
    assert sum(mark["frames"] for mark in _moves_target(server, graph, 7)) == 81


def test_what_cannot_change_in_mid_run_is_said_and_the_run_goes_on(server: Any) -> None:
    graph = workflow("first_video", StreamVideo={"length": 57, "seed": 113})
    sparse = find(graph, "SparseAttention")
    answers: list[tuple[int, Any]] = []

    def ask(event: str, data: dict[str, Any]) -> None:
        if event == "chunk" and data["index"] == 1:
            for changes in ({"block_size": "32"}, {"target_sparsity": 7}, {"preset": "none"}):
                body = {"node_id": sparse, "values": {**values_of(graph), **changes}}
                answers.append(server.ask("/lightforcing/live", body))
            answers.append(server.ask("/lightforcing/live", {"node_id": sparse, "values": 3}))
            answers.append(server.ask("/lightforcing/live", {"node_id": "77", "values": {}}))

    told = watch(server, graph, ask)
    assert len(of_kind(told, "chunk")) == 5 and of_kind(told, "end")[0]["finished"]
    assert [status for status, _ in answers] == [400, 400, 400, 400, 404]
    messages = [answer["error"] for _, answer in answers]
    assert "block size cannot change" in messages[0]
    assert "target_sparsity must be a number from 0 to 0.99, got 7" in messages[1]
    assert "preset must be one of custom" in messages[2]
    assert "must be an object" in messages[3] and "press Run" in messages[4]
    body = {"node_id": sparse, "values": values_of(graph)}
    assert server.ask("/lightforcing/live", body)[0] == 404, "the run is over"


def test_a_page_loaded_in_mid_run_finds_marks_and_frames(server: Any) -> None:
    graph = workflow("first_video", StreamVideo={"length": 57, "seed": 114})
    stream = find(graph, "StreamVideo")
    seen: dict[str, Any] = {}

    def look(event: str, data: dict[str, Any]) -> None:
        if event == "chunk" and data["index"] == 2:
            (seen["run"],) = server.ask("/lightforcing/live")[1]["runs"]
            seen["frames"] = server.ask(f"/lightforcing/frames?node_id={stream}")[1]

    told = watch(server, graph, look)
    marks = of_kind(told, "chunk")
    assert seen["run"]["chunks"][:3] == [
        {k: v for k, v in mark.items() if k not in ("node_ids", "run_id")} for mark in marks[:3]
    ]
    strips = of_kind(told, "frames")
    held = seen["frames"]["strips"]
    assert len(held) >= 3
    assert [s["jpeg"] for s in held] == [s["jpeg"] for s in strips[: len(held)]]
    assert server.ask(f"/lightforcing/frames?node_id={stream}")[0] == 404


def test_a_dense_model_streams_and_says_that_it_has_no_sliders(server: Any) -> None:
    graph = workflow("first_video", StreamVideo={"length": 33, "seed": 115})
    stream, sparse = find(graph, "StreamVideo"), find(graph, "SparseAttention")
    graph[stream]["inputs"]["model"] = graph.pop(sparse)["inputs"]["model"]
    answers = []

    def ask(event: str, data: dict[str, Any]) -> None:
        if event == "chunk" and data["index"] == 0:
            answers.append(server.ask("/lightforcing/live", {"node_id": stream, "values": {}}))

    marks = of_kind(watch(server, graph, ask), "chunk")
    assert [(m["density"], m["settings"]) for m in marks] == [(1.0, None)] * 3
    assert answers[0][0] == 400 and "no Sparse Attention" in answers[0][1]["error"]


# ---- forecasts


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "'values' must be an object"),
        ({"values": {}, "frames": 10}, "4k + 1"),
        ({"values": {}, "frames_per_chunk": 0}, "frames_per_chunk must be a whole number"),
        ({"values": {"keep_frames": 1.5}}, "keep_frames must be a whole number"),
        ({"values": {"target_sparsity": 0.9, "base_sparsity": 0.2}}, "base sparsity"),
        ([], "expected a JSON object"),
    ],
)
def test_a_forecast_of_nonsense_says_what_is_wrong(server: Any, body: Any, message: str) -> None:
    status, answer = server.ask("/lightforcing/forecast", body)
    assert status == 400 and message in answer["error"]


def test_a_forecast_knows_the_family(server: Any) -> None:
    def chunks(**body: Any) -> list[dict[str, Any]]:
        _, answer = server.ask("/lightforcing/forecast", {"values": {}, "frames": 81, **body})
        return answer["chunks"]

    assert len(chunks()) == 7 and chunks()[-1]["visible_frames"] == 21
    assert len(chunks(family="causal_forcing_framewise")) == 21
    assert chunks(family="from the file", model_name="longlive_base.pt")[-1]["visible_frames"] == 12
    assert {chunk["density"] for chunk in chunks(values={"enabled": False})} == {1.0}


# ---- Sparsity Map and Compare


def test_sparsity_maps_show_what_was_recorded(server: Any) -> None:
    graph = workflow("sparsity_playground", StreamVideo={"length": 33, "seed": 121})
    maps = [i for i, n in graph.items() if n["class_type"] == "LightForcingSparsityMap"]
    graph[maps[1]]["inputs"]["chunk"] = 3
    outputs = server.run(graph)
    pictures = []
    for name in maps:
        (file,) = outputs[name]["images"]
        pictures.append(Image.open(server.base / "temp" / file["filename"]).convert("RGB"))
    assert all(picture.width > 700 for picture in pictures)
    assert pictures[0].tobytes() != pictures[1].tobytes()

    wrong = copy.deepcopy(graph)
    wrong[maps[0]]["inputs"]["chunk"] = 4
    assert "there is no chunk 4: 3 were recorded" in server.error(wrong)["exception_message"]
    wrong = copy.deepcopy(graph)
    wrong[maps[0]]["inputs"]["layer"] = 99
    assert "there is no layer 99" in server.error(wrong)["exception_message"]


def test_a_map_of_nothing_says_what_to_switch_on(server: Any) -> None:
    graph = workflow(
        "sparsity_playground", StreamVideo={"length": 9, "seed": 122, "record_selection": False}
    )
    assert "record_selection" in server.error(graph)["exception_message"]


@pytest.mark.parametrize("layout", ["side_by_side", "slider"])
def test_compare_measures_both_and_shows_them(server: Any, layout: str) -> None:
    graph = workflow("dense_against_sparse", Compare={"length": 33, "layout": layout, "seed": 123})
    compare = find(graph, "Compare")
    outputs = server.run(graph)
    (report,) = outputs[compare]["text"]
    assert "PSNR" in report and "(mean of 33 frames, 9 of them equal)" in report
    rows = report.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"] and "equal" in rows[0]
    (file,) = outputs[compare]["images"]
    path = server.base / "output" / file["subfolder"] / file["filename"]
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == ((516 if layout == "side_by_side" else 256), 128)
    reader.close()
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 33


def test_compare_needs_something_to_compare(server: Any) -> None:
    graph = workflow("dense_against_sparse", SparseAttention={"enabled": False})
    failure = server.error(graph)
    assert "nothing to compare" in failure["exception_message"]


def test_nothing_is_left_of_any_run(server: Any) -> None:
    time.sleep(0.2)
    assert server.ask("/lightforcing/live") == (200, {"runs": []})
    assert not [name for name in mp4_files(server) if ".partial" in name or ".packing" in name]
