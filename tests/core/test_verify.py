"""`lightforcing verify` accepts the golden files and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightforcing.lightforcing_core.cli import main
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.verify import verify_files

FILES = ("self_forcing_rollout.safetensors", "video_vae.safetensors")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", FILES)
def test_every_golden_case_is_reproduced(golden_dir: Path, name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(golden_dir / name), "--json", str(report)]) == 0
    cases = json.loads(report.read_text())["cases"]
    assert cases
    for case in cases:
        assert case["passed"] and case["rel_err"] <= 1e-4, case
    if "rollout" in name:
        golden = json.loads(metadata_of(golden_dir / name)["golden"])
        assert [c["case"] for c in cases] == list(golden["cases"])
    else:
        assert {c["case"] for c in cases} == {"wan_decode", "wan_encode", "taehv_decode"}


@pytest.mark.parametrize("damage", ["value", "nan", "shape"])
def test_a_wrong_expectation_fails(golden_dir: Path, damage: str, tmp_path: Path) -> None:
    source = golden_dir / FILES[1]
    tensors = load_file(source)
    expected = tensors["taehv.frames_untrimmed"]
    if damage == "value":
        expected += 3e-4 * expected.abs().mean() * torch.randn_like(expected).sign()
    elif damage == "nan":
        expected[0, 0, 0, 0, 0] = float("nan")
    else:
        tensors["taehv.frames_untrimmed"] = expected[:, :-1].contiguous()
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata_of(source))
    report = tmp_path / "report.json"
    assert main(["verify", str(path), "--json", str(report)]) == 1
    failed = [c["case"] for c in json.loads(report.read_text())["cases"] if not c["passed"]]
    assert failed == ["taehv_decode"]


def test_a_wrong_rollout_fails(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / FILES[0]
    tensors = load_file(source)
    tensors["framewise.renoise"][5] *= 1.01
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata_of(source))
    results = {r.case: r.passed for r in verify_files([path])}
    assert [case for case, passed in results.items() if not passed] == ["framewise"]


def test_write_works_without_expectations(golden_dir: Path, tmp_path: Path) -> None:
    expected_names = {
        FILES[0]: lambda name: name.endswith(".latents"),
        FILES[1]: lambda name: name in ("wan.pixels", "wan.encode_out", "taehv.frames_untrimmed"),
    }
    for file, is_expected in expected_names.items():
        tensors = load_file(golden_dir / file)
        wanted = {k: v for k, v in tensors.items() if is_expected(k)}
        path = tmp_path / "inputs.safetensors"
        save_file(
            {k: v for k, v in tensors.items() if k not in wanted},
            path,
            metadata=metadata_of(golden_dir / file),
        )
        results = verify_files([path], write=tmp_path / "out.safetensors")
        assert all(r.rel_err is None and r.passed for r in results)
        written = load_file(tmp_path / "out.safetensors")
        assert written.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.allclose(written[name], value, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("damage", ["metadata", "weight", "renoise"])
def test_damaged_golden_files_are_refused(golden_dir: Path, damage: str, tmp_path: Path) -> None:
    source = golden_dir / FILES[0]
    tensors, metadata = load_file(source), metadata_of(source)
    if damage == "metadata":
        metadata["golden"] = "{nonsense"
    elif damage == "weight":
        del tensors["model.blocks.0.ffn.2.bias"]
    else:
        tensors["chunkwise.renoise"] = tensors["chunkwise.renoise"][:2].contiguous()
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata)
    assert main(["verify", str(path)]) == 2


def test_write_is_checked_before_the_work(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / FILES[1]
    assert main(["verify", str(source), "--write", str(tmp_path / "no" / "x")]) == 2
    assert main(["verify", str(source), "--write", str(source)]) == 2
    assert load_file(source)


def test_files_that_are_not_golden_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a golden file"):
        verify_files([path])
    save_file({"a": torch.zeros(1)}, path, metadata={"vae": "{}"})
    with pytest.raises(UserError, match="missing from the golden file"):
        verify_files([path])
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
