"""Every stage at tiny size on the CPU: it runs, lowers its loss, resumes, and writes its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.vae.load import load_vae
from lightforcing.training import autoencoder, distil, run_all, teacher
from lightforcing.training.common import TINY, JsonLog, Run, load_weights
from lightforcing.training.pool import Batch


def _run(tmp_path: Path, steps: int) -> Run:
    log = JsonLog(tmp_path / "log.jsonl")
    return Run(torch.device("cpu"), 600.0, 0, TINY, log, steps)


def _lines(path: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def test_the_autoencoder_lowers_its_loss_and_normalises_its_latents(tmp_path: Path) -> None:
    model = autoencoder.build_autoencoder(TINY)
    generator = torch.Generator().manual_seed(1)
    frames = autoencoder.random_clips(2, 2, generator)

    def loss() -> float:
        with torch.no_grad():
            latents = autoencoder.normalise(model.encode(autoencoder.pad_front(frames))[0])
            decoded = model.decode(latents)[0][:, 3:]
        return autoencoder.reconstruction_loss(decoded, frames).item()

    before = loss()
    autoencoder.train_autoencoder(_run(tmp_path, 25), model)
    assert loss() < 0.7 * before
    latents = autoencoder.encode_video(model, frames)
    assert latents.shape == (2, 16, 2, 16, 32)
    assert 0.5 < latents.std() < 2


def test_polishing_the_decoder_leaves_the_latents_alone(tmp_path: Path) -> None:
    model = autoencoder.build_autoencoder(TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    autoencoder.train_autoencoder(_run(tmp_path, 2), model, decoder_only=True)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(name.startswith("decoder.") for name in changed)


@pytest.fixture
def pools() -> tuple[Batch, Batch]:
    def batch(frames: int) -> Batch:
        rows = torch.full((2, 32, 2), -1)
        return Batch(torch.randn(2, 16, frames, 16, 32) * 0.3, rows, torch.randn(2, 8))

    return batch(TINY.latent_frames), batch(3)


@pytest.mark.parametrize("train", [teacher.train_teacher, distil.train_student])
def test_denoiser_stages_lower_their_loss(tmp_path: Path, pools, train) -> None:
    # Steps enough for two log lines: the stages log every 50 or 100 steps and at the end.
    run = _run(tmp_path, 8)
    model, losses, _ = teacher.prepare(run, None)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    saved: list[dict] = []

    def error() -> float:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            return sum(losses.flow_of_openings(pools[1], generator).item() for _ in range(3))

    before = error()
    train(run, model, losses, *pools, saved.append)
    assert error() < before
    assert any(not torch.equal(v, start[k]) for k, v in model.state_dict().items())
    (line,) = _lines(
        tmp_path / "log.jsonl", "teacher" if train is teacher.train_teacher else "distil"
    )
    assert line["used"] == 1.0


def test_openings_go_on_from_the_truth_where_the_layout_was_missed(tmp_path: Path, pools) -> None:
    run = _run(tmp_path, 1)
    model, losses, _ = teacher.prepare(run, None)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    student = distil.Student(run, model, losses.positions)
    met = student.meet_openings(losses, pools[1], torch.Generator().manual_seed(2))
    assert met.inputs.shape == (4, 2, 16, 3, 16, 32)
    # An untrained student misses it: what is left after its third step is the truth itself.
    assert torch.equal(met.results, pools[1].latents)
    never = met.chances[:, 0, 0] == 0
    assert never.any() or (met.chances[:, 0, 0] > 0).all()


def test_the_whole_recipe_runs_and_exports_files_the_engine_loads(tmp_path: Path) -> None:
    arguments = ["--tiny", "--device", "cpu", "--max-steps", "2", "--prompts", "1", "--seeds", "1"]
    work, models = tmp_path / "work", tmp_path / "models"
    run_all.main([*arguments, "--out", str(work), "--export", str(models)])
    loaded = load_model(models / run_all.MODEL_FILE)
    assert loaded.preset.frames_per_chunk == 3
    assert loaded.preset.steps == (1000.0, 937.5, 833.3333, 625.0)
    assert (loaded.preset.width, loaded.preset.height, loaded.preset.frames) == (256, 128, 81)
    with safe_open(models / run_all.MODEL_FILE, "pt") as file:
        assert json.loads(file.metadata()["config"]) == {"transformer": {"causal_ar": True}}
    load_vae(models / run_all.VAE_FILE)
    metrics = json.loads((models / "metrics.json").read_text())
    assert {"one_object", "several_objects", "judge"} <= set(metrics)
    # A stage starts from the files of another run.
    fresh = teacher.build_denoiser(replace(TINY))
    load_weights(fresh, work / "teacher.safetensors")
