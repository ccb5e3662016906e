"""What ComfyUI's registry gets: its rules are kept, and the archive is a whole pack."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

from lightforcing.development.comfy_server import PACK, make_base, running_server

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED_PYTHON = [
    ROOT / "__init__.py",
    *(f for room in ("kernels", "lightforcing_core", "nodes") for f in (ROOT / room).rglob("*.py")),
]
# Whatever could fetch something, or run what was fetched.
_NETWORK = {
    *("aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket"),
    *("ssl", "torch.hub", "urllib", "urllib3", "webbrowser", "websocket", "xmlrpc"),
}
_INSTALLERS = {"ensurepip", "pip", "setuptools", "venv"}
_RUNS_TEXT = {"__import__", "compile", "eval", "exec"}
# ffmpeg, and git for the commit that a measurement is of.
_RUNS_PROGRAMS = {"lightforcing_core/video_io.py", "lightforcing_core/bench/common.py"}


def complaints(path: str, source: str) -> Iterator[str]:
    """What the registry's rules forbid in a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in _RUNS_TEXT:
                yield f"{path}:{node.lineno} calls {node.func.id}"
        elif isinstance(node, ast.Attribute) and node.attr in {"system", "popen", "hub"}:
            yield f"{path}:{node.lineno} uses .{node.attr}"
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            names = {parts[0], ".".join(parts[:2])}
            # A server's side of HTTP answers the page and asks nobody.
            if module != "aiohttp.web" and names & (_NETWORK | _INSTALLERS):
                yield f"{path} imports {module}"
            if parts[0] == "subprocess" and path not in _RUNS_PROGRAMS:
                yield f"{path} runs programs"


@pytest.mark.parametrize("path", SHIPPED_PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_is_made_fetched_or_installed(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert not [*complaints(name, path.read_text())]


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import os; os.system('pip')",
        "import subprocess",
        "from urllib.request import urlopen",
        "from aiohttp import ClientSession",
        "import torch; torch.hub.load('a', 'b')",
        "import pip",
    ],
)
def test_the_rules_see_what_they_forbid(source: str) -> None:
    assert [*complaints("nodes/x.py", source)]


def test_requirements_leave_torch_and_versions_to_the_host() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert wanted == PYPROJECT["project"]["dependencies"]
    for line in wanted:
        assert re.fullmatch(r"[a-z-]+>=[\d.]+", line), f"{line} is not loose"
        assert not re.match(r"torch|triton|xformers|flash", line)


def test_every_package_of_the_command_is_installed() -> None:
    found = {
        "lightforcing." + ".".join(init.parent.relative_to(ROOT).parts)
        for room in ("kernels", "lightforcing_core")
        for init in (ROOT / room).rglob("__init__.py")
    }
    assert found <= {*PYPROJECT["tool"]["setuptools"]["packages"]}


def test_comfyui_reads_what_the_pack_says_of_itself(comfy_python: Path, comfy_tree: Path) -> None:
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from comfy_config.config_parser import extract_node_configuration as read\n"
        "read = read(sys.argv[2]); project, comfy = read.project, read.tool_comfy\n"
        "print(json.dumps([project.name, project.version, project.license.text, comfy.web,"
        " comfy.display_name, project.supported_comfyui_version, project.supported_os,"
        " project.supported_accelerators]))"
    )
    done = subprocess.run(
        [comfy_python, "-c", program, comfy_tree, ROOT], capture_output=True, text=True, cwd="/"
    )
    name, version, licence, web, *rest = json.loads(done.stdout)
    assert (name, licence) == ("lightforcing", "Apache-2.0")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert not web, "WEB_DIRECTORY says it; said twice, the page loads every script twice"
    assert rest == ["Light Forcing", ">=0.3.75", ["OS Independent"], ["GPU :: NVIDIA CUDA"]]


@pytest.fixture(scope="module")
def archive() -> list[Path]:
    """The files that are published: those of the repository without .comfyignore's."""

    def listed(*options: str) -> set[str]:
        command = ["git", "-C", ROOT, "ls-files", "-z", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"not a checkout: {done.stderr}")
        return {*filter(None, done.stdout.split("\0"))}

    left_out = listed("--cached", "--ignored", f"--exclude-from={ROOT / '.comfyignore'}")
    assert left_out
    return [Path(name) for name in sorted(listed() - left_out)]


def test_the_archive_holds_the_pack_and_nothing_else(archive: list[Path]) -> None:
    assert {path.parts[0] for path in archive} == {
        *("__init__.py", "kernels", "lightforcing_core", "locales", "models", "nodes", "web"),
        *("workflows", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"),
        "requirements.txt",
    }
    assert sum((ROOT / path).stat().st_size for path in archive) < 32 * 2**20


def test_the_archive_works_in_comfyui(
    archive: list[Path], server: Any, comfy_tree: Path, tmp_path: Path
) -> None:
    make_base(tmp_path)
    pack = tmp_path / "custom_nodes" / PACK
    pack.unlink()
    for path in archive:
        (pack / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, pack / path)
    with running_server(comfy_tree, tmp_path, log=tmp_path / "log") as other:
        other.check_pack()

        def ours(asked: Any) -> set[str]:
            return {name for name in asked.ask("/object_info")[1] if name.startswith("LightForc")}

        assert ours(other) == ours(server)
        _, templates = other.ask("/api/workflow_templates")
        assert templates[PACK]
        assert "zh" in other.ask("/i18n")[1]
