"""A genuine ComfyUI server with this pack: started, asked over HTTP and websocket, stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..lightforcing_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv" / "comfyui"  # .ci/install-comfyui makes it
PACK = "comfyui-light-forcing"
HOST = "127.0.0.1"
_START_SECONDS = 300
_RUN_SECONDS = 120  # that tests wait for a graph, and anybody for the next event
_STOP_SECONDS = 30


def comfy_tree() -> Path:
    """The ComfyUI to start: COMFYUI_PATH's, else the installed one.

    Raises:
        UserError: there is none, or no environment to run it in.
    """
    if not (ENVIRONMENT / ".complete").exists():
        raise UserError(f"no ComfyUI environment in {ENVIRONMENT}; run: make comfyui")
    named = os.environ.get("COMFYUI_PATH")
    tree = Path(named).resolve() if named else ENVIRONMENT / "ComfyUI"
    if not (tree / "main.py").is_file():
        raise UserError(f"no ComfyUI in {tree}: main.py is missing; set COMFYUI_PATH to its folder")
    return tree


def make_base(base: Path) -> None:
    """Make ComfyUI's base folder `base`, with the pack linked in under a name with a dash."""
    models = ("diffusion_models", "loras", "text_encoders", "vae")
    folders = ("custom_nodes", "input", "output", "temp", "user")
    for folder in (*folders, *(f"models/{kind}" for kind in models)):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK
    if not link.is_symlink():
        link.symlink_to(ROOT, target_is_directory=True)


class Events:
    """The server's text events for one client: a websocket, read only."""

    def __init__(self, port: int, client_id: str) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=_RUN_SECONDS)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        answer = self._stream.readline()
        if b" 101 " not in answer:
            raise UserError(f"the server at port {port} refused a websocket: {answer!r}")
        while self._stream.readline().strip():
            pass

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(type, data) of each event; raises UserError when no more can come."""
        while True:
            try:
                head = self._stream.read(2)
                length = head[1] & 0x7F
                if length > 125:
                    length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
                body = self._stream.read(length)
            except TimeoutError as error:
                raise UserError(f"ComfyUI has sent nothing for {_RUN_SECONDS} s") from error
            except (OSError, IndexError) as error:
                raise UserError("ComfyUI has closed the connection") from error
            if head[0] & 0x0F == 1:
                event = json.loads(body)
                yield event["type"], event["data"]

    def close(self) -> None:
        """Leave."""
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
            f"http://{HOST}:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def submit(self, graph: dict[str, Any], client_id: str | None = None) -> str:
        """Queue a graph in API format; returns its id.

        Raises:
            UserError: the server refuses it, with its reasons.
        """
        body = {"prompt": graph} | ({"client_id": client_id} if client_id else {})
        status, answer = self.ask("/prompt", body)
        if status != 200:
            raise UserError(f"ComfyUI refused the workflow: {_reasons(answer)}")
        return answer["prompt_id"]

    def finished(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a graph, waited for."""
        until = time.monotonic() + _RUN_SECONDS
        while time.monotonic() < until:
            _, history = self.ask(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise UserError(f"{prompt_id} did not finish in {_RUN_SECONDS} s")

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

    def check_pack(self) -> None:
        """Raises UserError, with the reason, if ComfyUI has not loaded this pack."""
        if self.ask("/object_info/LightForcingStreamVideo")[1]:
            return
        lines = self.log.read_text(errors="replace").splitlines()
        reason = next((line for line in lines if "Cannot import" in line), "no reason given")
        raise UserError(f"ComfyUI did not load the pack: {reason.strip()}; its log: {self.log}")

    def last_words(self) -> str:
        """The end of the log, for an error message."""
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return f"its last words were: {last}; all of them: {self.log}"


def _reasons(answer: dict[str, Any]) -> str:
    """What is wrong with a graph, as `POST /prompt` says it."""
    nodes = [
        f"node {name} ({problems['class_type']}): {problem['message']}, {problem['details']}"
        for name, problems in (answer.get("node_errors") or {}).items()
        for problem in problems["errors"]
    ]
    return "; ".join(nodes) or f"{answer['error']['message']} {answer['error']['details']}".strip()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def check_port(port: int) -> None:
    """Raises UserError if somebody listens on a port."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} cannot be used: {error}; stop what uses it, or name another port"
            ) from error


@contextlib.contextmanager
def running_server(
    tree: Path,
    base: Path,
    *,
    log: Path,
    port: int | None = None,
    cpu: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that answers, stopped when the block ends.

    Args:
        tree: a ComfyUI.
        base: its base folder (`make_base`).
        log: file that its output goes to.
        port: None: a free one.
        cpu: whether to keep it from looking for a GPU.
        environment: variables to set beside this process's.

    Raises:
        UserError: it does not start, with its last words.
    """
    if port is None:
        port = free_port()
    check_port(port)
    options = [
        *("--listen", HOST, "--port", str(port), "--base-directory", str(base)),
        *("--disable-auto-launch", "--disable-api-nodes"),
        *("--database-url", "sqlite:///:memory:", *(["--cpu"] if cpu else [])),
    ]
    variables = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [ENVIRONMENT / "bin" / "python", tree / "main.py", *options],
            cwd=base,
            env={**os.environ, **variables, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, base, log)
    try:
        _wait_for(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(server: Server) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if server.ask("/system_stats")[0] == 200:
                return
        status = server.process.poll()
        if status is not None:
            raise UserError(
                f"ComfyUI ended with status {status} while starting; {server.last_words()}"
            )
        if time.monotonic() > until:
            raise UserError(
                f"ComfyUI did not answer within {_START_SECONDS} s; {server.last_words()}"
            )
        time.sleep(0.2)
