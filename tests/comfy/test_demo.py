"""`make demo` and `make ui`: what they leave, and what they say when they cannot."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest

from lightforcing.development.__main__ import main
from lightforcing.development.comfy_server import ROOT
from lightforcing.development.demo import WORKFLOW, make_video
from lightforcing.lightforcing_core.errors import UserError

# Enough of a ComfyUI to start: it notes its process and knows no node.
_SERVER = """
import http.server, os, pathlib, sys
pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
print("Cannot import /x/comfyui-light-forcing module for custom nodes: no moon")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def first_video(**inputs: Any) -> dict[str, Any]:
    """The demo's graph with other inputs of its Stream Video."""
    graph = json.loads(WORKFLOW.read_text())
    (stream,) = (n for n in graph.values() if n["class_type"] == "LightForcingStreamVideo")
    stream["inputs"].update(inputs)
    return graph


def test_the_demo_leaves_a_video_and_a_report(server: Any, tmp_path: Path) -> None:
    out, json_out = tmp_path / "demo.mp4", tmp_path / "demo.json"
    told: list[int] = []
    make_video(
        server,
        first_video(length=33, seed=301),
        out=out,
        json_out=json_out,
        on_chunk=lambda chunk: told.append(chunk["index"]),
    )
    report = json.loads(json_out.read_text())
    assert told == [0, 1, 2]
    assert imageio_ffmpeg.count_frames_and_secs(str(out))[0] == report["frames"] == 33
    assert (report["width"], report["height"], report["fps"], report["seed"]) == (256, 128, 16, 301)
    chunks = report["chunks"]
    assert [chunk["pixel_frames"] for chunk in chunks] == [9, 12, 12]
    assert (chunks[0]["sparsity"], chunks[0]["density"]) == (0, 1)
    assert all(0.5 < c["sparsity"] < 1 and 0 < c["density"] < 0.5 for c in chunks[1:])
    assert report["seconds"] == pytest.approx(sum(c["seconds"] for c in chunks), rel=0.5)
    assert report["frames_per_second"] == pytest.approx(33 / report["seconds"])
    version = server.ask("/system_stats")[1]["system"]["comfyui_version"]
    assert report["comfyui"]["version"] == version
    assert report["comfyui"]["prompt_id"] in server.ask("/history")[1]
    assert {p.name for p in tmp_path.iterdir()} == {"demo.mp4", "demo.json"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": -16}, r"refused the workflow: node 5 \(LightForcingStreamVideo\).*width"),
        ({"noise_rule": "loud"}, r"refused the workflow: node 5 .*noise_rule"),
        ({"length": 10}, r"node 5 \(LightForcingStreamVideo\) failed: .*4k \+ 1"),
    ],
)
def test_a_video_that_cannot_be_made_leaves_nothing(
    server: Any, tmp_path: Path, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_video(
            server, first_video(**inputs), out=tmp_path / "a.mp4", json_out=tmp_path / "a.json"
        )
    assert not list(tmp_path.iterdir())


def test_an_unknown_node_is_refused_by_name(server: Any, tmp_path: Path) -> None:
    graph = first_video()
    graph["9"] = {"class_type": "NoSuchNode", "inputs": {}}
    with pytest.raises(UserError, match=r"refused the workflow: .*NoSuchNode"):
        make_video(server, graph, out=tmp_path / "a.mp4", json_out=tmp_path / "a.json")


def _demo(folder: Path, *options: str) -> list[str]:
    return ["demo", "--out", f"{folder / 'a.mp4'}", "--json", f"{folder / 'a.json'}", *options]


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_without_comfyui_is_named(
    comfy_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert main(_demo(tmp_path)) == 2
    line = _one_line(capsys)
    assert f"no ComfyUI in {tmp_path}" in line and "set COMFYUI_PATH" in line


def test_a_port_that_is_taken_is_named(
    comfy_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(_demo(tmp_path, "--port", str(port))) == 2
        assert f"port {port} cannot be used" in _one_line(capsys)
        assert main(["ui", "--port", str(port), "--base", str(tmp_path / "base")]) == 2
        assert f"port {port} cannot be used" in _one_line(capsys)


@pytest.mark.parametrize("text", ["", "{", None])
def test_a_workflow_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    path = tmp_path / "workflow.json"
    if text is not None:
        path.write_text(text)
    assert main(_demo(tmp_path, "--workflow", str(path))) == 2
    assert f"cannot read the workflow {path}" in _one_line(capsys)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('the moon is down')", "status 1 while starting.*the moon is down"),
        (_SERVER, "did not load the pack: Cannot import .*no moon"),
    ],
)
def test_a_server_that_is_of_no_use_is_stopped(
    comfy_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    message: str,
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "main.py").write_text(program)
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    out = tmp_path / "out"
    out.mkdir()
    assert main(_demo(out)) == 2
    line = _one_line(capsys)
    assert re.search(message, line), line
    assert [path.name for path in out.iterdir()] == ["comfyui.log"]
    if (tree / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tree / "pid").read_text()), 0)


def test_make_runs_what_is_tested_here() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert (
        "-m lightforcing.development demo --out output/demo.mp4 --json output/demo.json" in makefile
    )
    assert "-m lightforcing.development ui" in makefile
