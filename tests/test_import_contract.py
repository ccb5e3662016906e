"""Who may import whom, and what importing may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "lightforcing_core", "nodes", "training", "development")
FOREIGN = {
    "kernels": {"comfy", "comfy_api", "folder_paths", "server", "nodes"},
    "lightforcing_core": {"comfy", "comfy_api", "folder_paths", "server", "nodes", "triton"},
    "training": {"comfy", "comfy_api", "folder_paths", "server", "nodes", "triton"},
    "development": {"comfy", "comfy_api", "folder_paths", "server", "nodes", "triton"},
}
# One way: nodes -> lightforcing_core -> kernels; training and development stand beside nodes.
FORBIDDEN_ROOMS = {
    "__init__.py": {"training", "development"},
    "kernels": {"lightforcing_core", "nodes", "training", "development"},
    "lightforcing_core": {"nodes", "training", "development"},
    "training": {"nodes", "development"},
    "nodes": {"training", "development"},
    "development": {"kernels", "nodes", "training"},
}


def _files() -> list[Path]:
    return [
        ROOT / "__init__.py",
        *(f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py"))),
    ]


def _imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(level, module, is star import) of every import statement, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", any(a.name == "*" for a in node.names)


def _target_room(path: Path, level: int, module: str) -> str | None:
    """The room of this repository that a relative import reaches."""
    if not level:
        return None
    folder = path.parent
    for _ in range(level - 1):
        folder = folder.parent
    parts = folder.relative_to(ROOT).parts + tuple(module.split("."))
    return parts[0] if parts else None


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for level, module, star in _imports(path):
        top = module.split(".")[0]
        assert not star, f"{path}: 'import *' hides where names come from"
        assert level or top != "lightforcing", f"{path}: imports inside are relative, got {module}"
        assert level or top not in {"nodes", "kernels"}, f"{path}: '{top}' belongs to others"
        assert level or top not in FOREIGN.get(room, set()), f"{path} must not import {module}"
        reached = _target_room(path, level, module)
        assert reached not in FORBIDDEN_ROOMS.get(room, set()), f"{path} must not import {reached}"


NODES = [f for f in sorted((ROOT / "nodes").rglob("*.py")) if "adapter" not in f.parts]


@pytest.mark.parametrize("path", NODES, ids=lambda p: p.name)
def test_only_the_adapter_knows_comfy(path: Path) -> None:
    for level, module, _ in _imports(path):
        top = module.split(".")[0]
        known = level or top != "comfy" or module == "comfy.utils"  # for its progress bar
        assert known, f"{path}: {module} belongs into nodes/adapter"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_need_torch_and_triton_alone(path: Path) -> None:
    for level, module, _ in _imports(path):
        top = module.split(".")[0]
        allowed = level or top in {"torch", "triton"} | sys.stdlib_module_names
        assert allowed, f"{path} must not import {module}"


def test_the_contract_sees_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from comfy.sd import *\n")
    assert list(_imports(file)) == [(0, "comfy.sd", True)]


def test_importing_the_core_does_no_work() -> None:
    """No CUDA context, no compile, no output, no optional package; nor does importing kernels."""
    modules = [
        "lightforcing." + ".".join(f.relative_to(ROOT).with_suffix("").parts)
        for f in sorted((ROOT / "lightforcing_core").rglob("*.py"))
        if f.name != "__init__.py"
    ]
    modules.append("lightforcing.kernels")
    program = (
        f"import importlib, sys\n"
        f"for m in {modules!r}: importlib.import_module(m)\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "late = {'transformers', 'imageio_ffmpeg', 'torch._dynamo', 'triton'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
