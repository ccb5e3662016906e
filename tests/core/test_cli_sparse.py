"""The command line of sparse attention: schedule, generate, bench."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from lightforcing.lightforcing_core.cli import main

PROMPT = "--prompt=a large red circle moving right"


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's own checks
        return int(stopped.code or 0)


def test_schedule_prints_writes_and_draws_the_published_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "s.json", tmp_path / "s.png"
    arguments = ["--frames=21", "--chunk=3", "--target=0.88", "--base=0.98"]
    assert run("schedule", *arguments, "--json", out, "--plot", picture) == 0
    said = json.loads(out.read_text())
    assert said["kept_blocks"] == [72, 24, 31, 36, 42, 46, 51]
    assert said["sparsities"][0] == 0.0
    # From the formula with exact arithmetic, as published to four digits.
    published = [0, 0.8270, 0.8551, 0.8718, 0.8832, 0.8917, 0.8982]
    assert said["sparsities"] == pytest.approx(published, abs=5e-5)
    assert "0.8982" in capsys.readouterr().out
    assert Image.open(picture).size[0] >= 600


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule", "--target=1.5"],
        ["schedule", "--base=0.5", "--target=0.9"],
        ["schedule", "--frames=0"],
        ["schedule", "--plot=x.nonsense"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=1.2"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--dense"],
        ["generate", PROMPT, "--out=x.mp4", "--keep-frames=4"],
        ["generate", PROMPT, "--out=x.mp4", "--policy=block_top_k"],
        ["generate", PROMPT, "--out=x.mp4", "--backend=triton"],
        ["generate", PROMPT, "--out=x.mp4", "--plan=pass"],
        ["generate", PROMPT, "--out=x.mp4", "--token-order=tiles"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--token-order=cubes"],
        ["generate", PROMPT, "--out=x.mp4", "--qk-precision=int8"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--schedule-values=0.1,0.2"],
        ["bench", "attention", "--device=nonsense"],
        ["bench", "attention", "--device=cuda:99"],
        ["bench", "attention", "--device=cpu", "--runs=0"],
        ["bench", "attention", "--device=cpu", "--runs=-1"],
        ["bench", "attention", "--device=cpu", "--chunks=1.5"],
        ["bench", "attention", "--device=cpu", "--key-block=0"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--keep-frames=1"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--backend=triton", "--device=cpu"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--backend=gluon", "--device=cpu"],
        ["generate", PROMPT, "--out=x.mp4", "--sparsity=0.5", "--key-block=0"],
    ],
    ids=lambda a: " ".join(a[0:1] + a[2:]),
)
def test_bad_input_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_generate_runs_sparse_and_says_how_sparse(tmp_path: Path) -> None:
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    arguments = [PROMPT, f"--out={out}", f"--json={report}", "--frames=33", "--device=cpu"]
    assert run("generate", *arguments, "--sparsity=0.5", "--backend=reference") == 0
    chunks = json.loads(report.read_text())["chunks"]
    assert (chunks[0]["sparsity"], chunks[0]["density"]) == (0.0, 1.0)
    for chunk in chunks[1:]:
        assert 0.2 < chunk["sparsity"] < 0.7
        # Whole blocks only: the budget is rounded down to them, so a little less is kept.
        assert 0 <= 1 - chunk["sparsity"] - chunk["density"] < 0.05
        assert chunk["select_seconds"] > 0
        assert chunk["attend_seconds"] > 0


def test_generate_runs_in_tiles_and_in_eight_bits(tmp_path: Path) -> None:
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    arguments = [PROMPT, f"--out={out}", f"--json={report}", "--frames=21", "--device=cpu"]
    options = ["--sparsity=0.5", "--token-order=tiles", "--qk-precision=int8"]
    assert run("generate", *arguments, *options, "--backend=reference") == 0
    said = json.loads(report.read_text())
    assert said["settings"]["sparse"]["token_order"] == "tiles"
    assert said["settings"]["sparse"]["qk_precision"] == "int8"
    assert said["chunks"][1]["density"] < 1


def test_dense_is_the_default_and_what_dense_asks_for(tmp_path: Path) -> None:
    made = []
    for options in ([], ["--dense"]):
        out, report = tmp_path / "a.mp4", tmp_path / "a.json"
        arguments = [PROMPT, f"--out={out}", f"--json={report}", "--frames=9", *options]
        assert run("generate", *arguments) == 0
        assert all(c["density"] == 1.0 for c in json.loads(report.read_text())["chunks"])
        made.append(out.read_bytes())
    assert made[0] == made[1]


def test_bench_runs_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "b.json", tmp_path / "b.csv"
    common = ["--device=cpu", f"--json={out}", f"--csv={table}", "--runs=1"]
    assert run("bench", "attention", *common) == 0
    said = json.loads(out.read_text())
    assert said["device"] == "cpu"
    assert {"rows", "versions"} <= set(said)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(said["rows"])
    assert rows[0]["torch"] == said["versions"]["torch"]
    assert "sdpa" in capsys.readouterr().out
