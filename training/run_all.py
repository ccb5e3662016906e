"""The whole recipe on one device: autoencoder, teacher, distillation, evaluation, export.

    python -m lightforcing.training.run_all --out DIR [--export models]

Each stage can be skipped by giving its weights, so a part can be run again from files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import autoencoder, distil, evaluate, teacher
from .common import Run, add_run_arguments, load_weights, run_from_arguments, save_weights
from .compiled import compiled_blocks
from .denoiser import file_metadata
from .vocabulary import write_table

MODEL_FILE = "lightforcing_mini_256x128.safetensors"
VAE_FILE = "lightforcing_mini_vae.safetensors"
TEXT_FILE = "lightforcing_mini_text.safetensors"
STAGE_SECONDS = {"autoencoder": 220.0, "teacher": 200.0, "distil": 420.0}


def make_autoencoder(run: Run, path: Path, resume: Path | None) -> None:
    """Stage 1, to a file."""
    model = autoencoder.build_autoencoder(run.sizes)
    if resume:
        load_weights(model, resume)
    model = autoencoder.train_autoencoder(run, model)
    save_weights(path, model.state_dict(), torch.float16, autoencoder.METADATA)
    measured = autoencoder.measure_autoencoder(
        model,
        run.generator(2),
        clips=16 if run.fast else 1,
        latents=run.sizes.latent_frames,
    )
    run.log.write("autoencoder_done", **measured)


def make_denoiser(
    run: Run, seconds: dict[str, float], files: dict[str, Path], resume: Path | None
) -> None:
    """Stages 2 and 3 on one pool; a stage of 0 seconds is left out."""
    model, losses, prompt_rows = teacher.prepare(run, resume)
    clips, openings = teacher.load_pools(run, files["autoencoder"], prompt_rows)
    stages = {"teacher": teacher.train_teacher, "distil": distil.train_student}
    for stage, train in stages.items():
        if not seconds[stage]:
            continue

        def save(tensors: dict[str, Tensor], path: Path = files[stage]) -> None:
            save_weights(path, tensors, torch.bfloat16, file_metadata(run.sizes))

        with compiled_blocks(run.fast):
            train(replace(run, seconds=seconds[stage]), model, losses, clips, openings, save)
        save(model.state_dict())


def export(files: dict[str, Path], folder: Path) -> dict[str, int]:
    """Put the finished files under their shipped names; returns their sizes in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(files["distil"], folder / MODEL_FILE)
    shutil.copyfile(files["autoencoder"], folder / VAE_FILE)
    write_table(folder / TEXT_FILE)
    names = (MODEL_FILE, VAE_FILE, TEXT_FILE)
    return {name: (folder / name).stat().st_size for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, seconds=0)
    parser.add_argument("--autoencoder", type=Path, help="skip stage 1, use these weights")
    parser.add_argument("--autoencoder-resume", type=Path, help="start stage 1 from these weights")
    for stage, seconds in STAGE_SECONDS.items():
        parser.add_argument(f"--{stage}-seconds", type=float, default=seconds, help="0: skip")
    parser.add_argument("--prompts", type=int, default=evaluate.PROMPTS)
    parser.add_argument("--seeds", type=int, default=evaluate.SEEDS)
    parser.add_argument("--export", type=Path, help="folder for the shipped files")
    arguments = parser.parse_args(argv)
    work = arguments.out
    arguments.metrics = arguments.metrics or work / "log.jsonl"
    run = run_from_arguments(arguments)
    files = {stage: work / f"{stage}.safetensors" for stage in STAGE_SECONDS}
    seconds = {stage: getattr(arguments, f"{stage}_seconds") for stage in STAGE_SECONDS}
    if arguments.autoencoder:
        files["autoencoder"] = arguments.autoencoder
    else:
        stage_run = replace(run, seconds=seconds["autoencoder"])
        make_autoencoder(stage_run, files["autoencoder"], arguments.autoencoder_resume)
    make_denoiser(run, seconds, files, arguments.resume)
    shared = ["--autoencoder", str(files["autoencoder"]), "--device", arguments.device]
    shared += ["--metrics", str(arguments.metrics), "--prompts", str(arguments.prompts)]
    shared += ["--seeds", str(arguments.seeds)]
    shared += ["--tiny"] if arguments.tiny else []
    for stage in ("teacher", "distil"):
        if seconds[stage]:
            own = ["--resume", str(files[stage]), "--out", str(work / f"{stage}.json")]
            own += ["--sheet", str(work / f"{stage}.png")]
            own += ["--skip-validation"] if stage == "teacher" else []
            evaluate.main([*shared, *own])
    if arguments.export:
        sizes = export(files, arguments.export)
        (arguments.export / "metrics.json").write_text((work / "distil.json").read_text())
        run.log.write("exported", **{"sizes": json.dumps(sizes)})


if __name__ == "__main__":
    main()
