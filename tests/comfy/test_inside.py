"""Claims checked in ComfyUI's own process: see the files in `inside/`, where they are written.

They run once, in one process of ComfyUI's environment, started outside of the repository; every
test in them is a test here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "inside"
INSIDE = [FOLDER / f"{name}.py" for name in ("in_process", "decoding_beside")]
NAMES = [
    node.name
    for path in INSIDE
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def report(
    comfy_python: Path, comfy_tree: Path, comfy_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[tuple[str, str]]]:
    """(outcome, text) of every case of each test."""
    folder = tmp_path_factory.mktemp("inside")
    done = subprocess.run(
        [
            *(comfy_python, "-m", "pytest", *INSIDE, "--import-mode=importlib", "-q"),
            *("-c", os.devnull, "--rootdir", FOLDER, "--confcutdir", FOLDER, "-p", "host"),
            *("-p", "no:cacheprovider", "--junitxml", folder / "report.xml"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "COMFYUI_PATH": str(comfy_tree),
            "COMFY_BASE": str(comfy_base),
            "PYTHONPATH": str(FOLDER),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    path = folder / "report.xml"
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    cases: dict[str, list[tuple[str, str]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        outcome, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = child.tag
                text = f"{child.get('message')}\n{child.text or ''}"
        cases.setdefault((case.get("name") or "").split("[")[0], []).append((outcome, text))
    assert cases, done.stdout[-3000:] + done.stderr[-3000:]
    return cases


@pytest.mark.parametrize("name", NAMES)
def test_inside(name: str, report: dict[str, list[tuple[str, str]]]) -> None:
    outcomes = report.get(name)
    assert outcomes, f"it did not run: {report}"
    wrong = [text for outcome, text in outcomes if outcome in ("failure", "error")]
    assert not wrong, "\n".join(wrong)
    if all(outcome == "skipped" for outcome, _ in outcomes):
        pytest.skip(outcomes[0][1].strip())
