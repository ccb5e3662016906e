"""A genuine ComfyUI for the tests: its environment, a disposable base folder, one server.

`make test` installs it (.ci/install-comfyui). COMFYUI_PATH names another tree to test against.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoints.metadata import file_metadata
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE, WanVAEConfig
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv" / "comfyui"
PACK = "comfyui-light-forcing"
_START_SECONDS = 120
_RUN_SECONDS = 120


@pytest.fixture(scope="session")
def comfy_python() -> Path:
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".complete").exists():
        pytest.skip(f"no ComfyUI environment in {ENVIRONMENT}: run make comfyui")
    return python


@pytest.fixture(scope="session")
def comfy_tree(comfy_python: Path) -> Path:
    return Path(os.environ.get("COMFYUI_PATH", ENVIRONMENT / "ComfyUI"))


@pytest.fixture(scope="session")
def comfy_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ComfyUI's base folder: the pack under a name with a dash, and tiny files of every kind."""
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    models = base / "models"
    for folder in ("diffusion_models", "vae", "loras", "text_encoders"):
        (models / folder).mkdir(parents=True)
    torch.manual_seed(0)
    denoiser = _tiny(WanModel(WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2)))
    save_file(denoiser, models / "diffusion_models" / "tiny_wan.safetensors")
    causal = models / "diffusion_models" / "tiny_causal_wan.safetensors"
    save_file(denoiser, causal, metadata=file_metadata({}))
    raw = models / "diffusion_models" / "self_forcing_tiny.pt"
    torch.save({"generator_ema": {f"model.{name}": t for name, t in denoiser.items()}}, raw)
    vae = _tiny(WanVAE(WanVAEConfig.from_dim(8)))
    save_file(vae, models / "vae" / "tiny_vae.safetensors")
    save_file(vae, models / "diffusion_models" / "not_a_denoiser.safetensors")
    (models / "diffusion_models" / "truncated.safetensors").write_bytes(causal.read_bytes()[:5000])
    yield base
    shutil.rmtree(base, ignore_errors=True)


def _tiny(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights that keep numbers in range."""
    weights = {}
    for name, tensor in module.state_dict().items():
        scale = 0.02 if tensor.ndim < 4 else 0.1
        is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        weights[name] = torch.randn_like(tensor) * scale + (1 if is_gain else 0)
    return weights


class Events:
    """The server's text events for one client: a websocket, read only."""

    def __init__(self, port: int, client_id: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_RUN_SECONDS)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        assert b" 101 " in self._stream.readline()
        while self._stream.readline().strip():
            pass

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while True:
            head = self._stream.read(2)
            length = head[1] & 0x7F
            if length > 125:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
            body = self._stream.read(length)
            if head[0] & 0x0F == 1:
                event = json.loads(body)
                yield event["type"], event["data"]

    def close(self) -> None:
        self._socket.close()


class Server:
    """A ComfyUI server, asked over HTTP."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, base: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.base = base
        self.log = log

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of a GET, or of a POST when there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def submit(self, graph: dict[str, Any], client_id: str | None = None) -> str:
        """Queue a graph in API format; returns its id."""
        body = {"prompt": graph} | ({"client_id": client_id} if client_id else {})
        status, answer = self.ask("/prompt", body)
        assert status == 200, answer
        return answer["prompt_id"]

    def finished(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a graph, waited for."""
        until = time.monotonic() + _RUN_SECONDS
        while time.monotonic() < until:
            _, history = self.ask(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            assert self.process.poll() is None, "the server is gone"
            time.sleep(0.1)
        raise TimeoutError(f"{prompt_id} did not finish in {_RUN_SECONDS} s")

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Outputs of a graph by node, which must succeed."""
        entry = self.finished(self.submit(graph))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        return entry["outputs"]

    def error(self, graph: dict[str, Any]) -> dict[str, Any]:
        """The execution error of a graph, which must fail."""
        status = self.finished(self.submit(graph))["status"]
        assert status["status_str"] == "error", status
        return dict(status["messages"])["execution_error"]

    def forget(self) -> None:
        """Have nothing cached, so that the next run computes everything again."""
        self.ask("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.5)

    def output(self, outputs: dict[str, Any], node: str) -> Path:
        """The one file that a node has saved."""
        (file,) = next(iter(v for k, v in outputs[node].items() if k != "animated"))
        return self.base / file["type"] / file["subfolder"] / file["filename"]

    @contextlib.contextmanager
    def events(self) -> Iterator[tuple[str, Events]]:
        """A client id, and the events the server sends to it."""
        client_id = uuid.uuid4().hex
        events = Events(self.port, client_id)
        try:
            yield client_id, events
        finally:
            events.close()


@pytest.fixture(scope="session")
def server(comfy_python: Path, comfy_tree: Path, comfy_base: Path) -> Iterator[Server]:
    """The one server of a test run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = comfy_base / "server.log"
    options = [
        *("--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"),
        *("--disable-api-nodes", "--base-directory", str(comfy_base)),
        *("--database-url", "sqlite:///:memory:"),
    ]
    # Tiny networks only lose time to threads that wait for each other on a busy machine.
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [comfy_python, comfy_tree / "main.py", *options],
            cwd=comfy_base,
            env={**os.environ, **quiet, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    running = Server(process, port, comfy_base, log)
    try:
        until = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if running.ask("/system_stats")[0] == 200:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        process.wait(timeout=30)
