"""`python -m lightforcing.development demo|ui|locales`: a genuine ComfyUI with this pack.

Exit status: 0 success, 2 a failure (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from ..lightforcing_core.cli.common import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    Parser,
    complain,
    say,
)
from ..lightforcing_core.errors import UserError
from ..lightforcing_core.outputs import check_output
from ..lightforcing_core.progress import ChunkProgress
from .comfy_server import HOST, PACK, ROOT, Server, comfy_tree, make_base, running_server
from .demo import WORKFLOW, make_video
from .locales import node_texts


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit status."""
    parser = Parser(prog="development", description="A genuine ComfyUI with this pack.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make a shipped workflow's video and report on it")
    demo.add_argument("--out", type=Path, default=Path("output/demo.mp4"))
    demo.add_argument("--json", type=Path, default=Path("output/demo.json"))
    demo.add_argument("--workflow", type=Path, default=WORKFLOW, help="in API format")
    demo.add_argument("--port", type=int, help="default: a free one")
    demo.set_defaults(run=_demo)
    ui = commands.add_parser("ui", help="start the server for a person")
    ui.add_argument("--port", type=int, default=8188)
    ui.add_argument(
        "--base", type=Path, default=Path("output/comfyui"), help="its models, input and output"
    )
    ui.set_defaults(run=_ui)
    locales = commands.add_parser("locales", help="write locales/en from the nodes")
    locales.set_defaults(run=_locales)
    arguments = parser.parse_args(argv)
    # The server must be stopped however this ends.
    signal.signal(signal.SIGTERM, _interrupt)
    # OpenMP's threads that spin for long make a run on a busy machine many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        arguments.run(arguments)
    except (UserError, OSError) as error:
        complain(str(error))
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _demo(arguments: argparse.Namespace) -> None:
    graph = _read_graph(arguments.workflow)
    check_output(arguments.out, [arguments.json, arguments.workflow])
    check_output(arguments.json, [arguments.out, arguments.workflow])
    tree = comfy_tree()
    say(f"== starting ComfyUI ({tree})")
    base = Path(tempfile.mkdtemp(prefix="lightforcing-demo-"))
    log = arguments.out.with_name("comfyui.log").resolve()
    try:
        make_base(base)
        cpu = not torch.cuda.is_available()
        with running_server(tree, base, log=log, port=arguments.port, cpu=cpu) as server:
            _run_demo(server, graph, arguments)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _read_graph(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the workflow {path}: {error}") from error


def _run_demo(server: Server, graph: dict, arguments: argparse.Namespace) -> None:
    server.check_pack()
    say(f"== {arguments.workflow.name} goes to http://{HOST}:{server.port}/prompt")
    with ChunkProgress(Console(stderr=True)) as progress:
        report = make_video(
            server,
            graph,
            out=arguments.out,
            json_out=arguments.json,
            on_chunk=lambda chunk: progress.chunk_done(
                chunk["index"], chunk["num_chunks"], chunk["frames"], chunk["seconds"]
            ),
        )
    density = sum(chunk["density"] for chunk in report["chunks"]) / len(report["chunks"])
    say(
        f"{report['out']}: {report['frames']} frames of {report['width']}x{report['height']} in "
        f"{report['seconds']:.1f} s ({report['frames_per_second']:.1f} frames/s with decoding, "
        f"{report['device']}, mean density of a chunk {density:.2f}) by ComfyUI "
        f"{report['comfyui']['version']}"
    )


def _locales(arguments: argparse.Namespace) -> None:
    base = Path(tempfile.mkdtemp(prefix="lightforcing-locales-"))
    try:
        make_base(base)
        with running_server(comfy_tree(), base, log=base / "comfyui.log") as server:
            server.check_pack()
            texts = node_texts(server.ask("/object_info")[1])
    finally:
        shutil.rmtree(base, ignore_errors=True)
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n")
    say(f"{path}: {len(texts)} nodes")


def _ui(arguments: argparse.Namespace) -> None:
    tree = comfy_tree()
    base = arguments.base.resolve()
    if os.environ.get("COMFYUI_PATH") and not (base / "models").exists():
        base.mkdir(parents=True, exist_ok=True)
        (base / "models").symlink_to(tree / "models", target_is_directory=True)
    make_base(base)
    say(f"== starting ComfyUI ({tree})")
    cpu = not torch.cuda.is_available()
    log = base / "comfyui.log"
    with running_server(tree, base, log=log, port=arguments.port, cpu=cpu) as server:
        server.check_pack()
        say(
            f"open    http://{HOST}:{server.port}/?template=first_video&source={PACK}\n"
            f"        (or Workflow, Browse Templates, {PACK}, first_video), then press Run\n"
            f"models  {base / 'models'}\n"
            f"videos  {base / 'output'}\n"
            f"log     {log}\n"
            "stop    Ctrl-C"
        )
        try:
            while server.process.poll() is None:
                time.sleep(0.5)
        except KeyboardInterrupt:
            return
        raise UserError(f"ComfyUI has ended; {server.last_words()}")


if __name__ == "__main__":
    raise SystemExit(main())
