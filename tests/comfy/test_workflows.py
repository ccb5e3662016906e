"""The shipped workflows and help pages fit the nodes of a running server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_NOTES = {"MarkdownNote"}  # drawn by the page, unknown to the server


def _inputs(info: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, type, options) of a node's inputs in their order."""
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            found, *options = info["input"][kind][name]
            yield name, found, options[0] if options else {}


def _widgets(info: dict[str, Any]) -> list[str]:
    """What `widgets_values` of a node holds, in order."""
    names = []
    for name, kind, options in _inputs(info):
        if isinstance(kind, list) or (kind in _WIDGETS and not options.get("forceInput")):
            names.append(name)
            if options.get("control_after_generate"):
                names.append("control_after_generate")
            if options.get("image_upload"):
                names.append("upload")
    return names


@pytest.fixture(scope="module")
def nodes(server: Any) -> dict[str, Any]:
    return server.ask("/object_info")[1]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_every_node_and_widget(path: Path, nodes: dict[str, Any]) -> None:
    graph = json.loads(path.read_text())
    twin = json.loads((path.parent / "api" / path.name).read_text())
    links = {link[0]: link for link in graph["links"]}
    for node in graph["nodes"]:
        if node["type"] in _NOTES:
            continue
        info = nodes[node["type"]]
        names = _widgets(info)
        assert len(node["widgets_values"]) == len(names), f"{node['type']}: {names}"
        values = dict(zip(names, node["widgets_values"], strict=True))
        sockets = {entry["name"] for entry in node["inputs"]}
        assert sockets | set(names) >= {name for name, _, _ in _inputs(info)}
        assert [out["type"] for out in node["outputs"]] == info["output"]
        in_twin = twin[str(node["id"])]
        assert in_twin["class_type"] == node["type"]
        for name, value in in_twin["inputs"].items():
            if name in values:
                assert value == values[name], f"{node['type']}.{name}"
            else:
                (entry,) = (entry for entry in node["inputs"] if entry["name"] == name)
                _, source, slot, *_ = links[entry["link"]]
                assert value == [str(source), slot], f"{node['type']}.{name}"
    assert {i for i, node in ((str(n["id"]), n) for n in graph["nodes"]) if i in twin} == set(twin)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_laid_out_for_people(path: Path) -> None:
    graph = json.loads(path.read_text())
    boxes = [group["bounding"] for group in graph["groups"]]
    assert len(boxes) >= 3
    assert [box[0] for box in boxes] == sorted(box[0] for box in boxes), "left to right"
    for left, right in itertools.pairwise(boxes):
        assert left[0] + left[2] < right[0], "groups lie side by side"
    for node in graph["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        inside = any(
            box[0] <= x and box[1] <= y and x + width <= box[0] + box[2]
            and y + height <= box[1] + box[3]
            for box in boxes
        )  # fmt: skip
        assert inside != (node["type"] in _NOTES), f"{node['type']} at {x}, {y}"
    assert any(node["type"] in _NOTES for node in graph["nodes"])
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.width <= 1600
    assert path.with_suffix(".jpg").stat().st_size < 300_000


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_files_that_a_workflow_needs_can_be_found(path: Path) -> None:
    """Every file that is named comes with its address and folder, on the node that loads it."""
    for node in json.loads(path.read_text())["nodes"]:
        hints = {hint["name"]: hint for hint in node["properties"].get("models", [])}
        named = {
            value
            for value in node["widgets_values"]
            if isinstance(value, str) and value.endswith((".safetensors", ".pt"))
        }
        assert named == set(hints), node["type"]
        for hint in hints.values():
            assert hint["url"].startswith("https://huggingface.co/")
            assert hint["url"].endswith("/" + hint["name"])
            assert hint["directory"] in ("diffusion_models", "loras", "text_encoders", "vae")


def test_the_first_video_comes_out_whole(server: Any) -> None:
    """The one run of all 81 frames."""
    graph = json.loads((ROOT / "workflows" / "api" / "first_video.json").read_text())
    outputs = server.run(graph)
    (stream,) = (i for i, n in graph.items() if n["class_type"] == "LightForcingStreamVideo")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(server.output(outputs, stream)))
    assert (frames, seconds) == (81, pytest.approx(81 / 16, abs=0.1))


def test_templates_are_offered(server: Any) -> None:
    _, templates = server.ask("/api/workflow_templates")
    (ours,) = (names for pack, names in templates.items() if "light-forcing" in pack)
    assert {*ours} == {path.stem for path in WORKFLOWS}


def test_every_node_has_a_help_page_with_every_input(server: Any, nodes: dict[str, Any]) -> None:
    for name, info in nodes.items():
        if not name.startswith("LightForcing"):
            continue
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text()
        missing = [i for i, _, _ in _inputs(info) if f"**{i}**" not in page]
        missing += [out for out in info["output_name"] if f"**{out}**" not in page]
        assert not missing, f"{name}.md: {missing}"
