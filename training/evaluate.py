"""Stage 4: make held-out videos with the finished model and judge them.

64 prompts whose first object is a combination of colour, shape, direction and size that training
never showed, three seeds each, through the engine's own rollout with four steps and no guidance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..lightforcing_core.embedded import EMBEDDED_TEXT
from ..lightforcing_core.noise import SeededNoise
from ..lightforcing_core.rollout import RolloutSettings, rollout
from ..lightforcing_core.text.embedded import EmbeddedTextEncoder
from ..lightforcing_core.timesteps import SELF_FORCING_STEPS
from ..lightforcing_core.vae.taehv import TAEHV
from ..lightforcing_core.wan.forward import prepare_text
from ..lightforcing_core.wan.modules import WanModel
from .autoencoder import decode_video
from .common import Run, Sizes, add_run_arguments, load_weights, run_from_arguments
from .denoiser import LATENT_HEIGHT, LATENT_WIDTH, build_denoiser
from .pool import CHUNK
from .scenes import Scenes, prompts, sample_attributes
from .sheets import contact_sheet
from .validate_judge import judge_bytes, validate

PROMPTS, SEEDS = 64, (0, 1, 2)
_PROMPT_SEED = 20261122
_AT_ONCE = 16


def held_out_scenes(count: int, device: torch.device) -> Scenes:
    """The scenes whose prompts are asked; drawn on the CPU, so the same on every machine."""
    generator = torch.Generator().manual_seed(_PROMPT_SEED)
    return sample_attributes(count, generator, held_out_first=True).to(device)


@torch.no_grad()
def generate(
    model: WanModel,
    vae: TAEHV,
    encoder: EmbeddedTextEncoder,
    texts: Sequence[str],
    *,
    seed: int,
    latent_frames: int,
    steps: Sequence[float] = SELF_FORCING_STEPS,
) -> Tensor:
    """Videos of some prompts: uint8 [B, T, 3, H, W] on the model's device."""
    weight = model.patch_embedding.weight
    videos = []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        rows = torch.stack([encoder.encode_rows(text) for text in some])
        text = prepare_text(model, rows.to(weight.device, weight.dtype))
        shape = (len(some), model.config.in_dim, LATENT_HEIGHT, LATENT_WIDTH)
        noise = SeededNoise(seed * 1000 + start, shape, weight.device)
        settings = RolloutSettings(latent_frames, frames_per_chunk=CHUNK, steps=steps)
        chunks = [chunk.latents for chunk in rollout(model, settings, text, noise)]
        frames = decode_video(vae, torch.cat(chunks, dim=2))
        videos.append((frames * 255).round().byte())
    return torch.cat(videos)


def spread(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, smallest and largest of each metric over seeds."""
    result = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        result[name] = {
            "mean": sum(values) / len(values), "min": min(values), "max": max(values)
        }  # fmt: skip
    return result


def load_models(sizes: Sizes, run: Run, model_path: Path, vae_path: Path) -> tuple[WanModel, TAEHV]:
    """Denoiser and autoencoder from files, ready to sample on the run's device."""
    model = build_denoiser(sizes)
    load_weights(model, model_path)
    vae = TAEHV.from_state_dict(load_file(vae_path))
    return (
        model.to(run.device, run.dtype).eval().requires_grad_(False),
        vae.to(run.device, run.dtype).eval().requires_grad_(False),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m lightforcing.training.evaluate --autoencoder F --resume MODEL --out METRICS.json`.

    `--out` is a JSON file here; `--sheet` a picture.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, seconds=120)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="contact sheet of some videos, .png")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--skip-validation", action="store_true")
    arguments = parser.parse_args(argv)
    run = run_from_arguments(arguments)
    model, vae = load_models(run.sizes, run, arguments.resume, arguments.autoencoder)
    encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)
    scenes = held_out_scenes(arguments.prompts, run.device)
    texts = prompts(scenes)
    result: dict[str, object] = {"prompts": len(texts), "seeds": list(SEEDS)}
    if not arguments.skip_validation:
        result["judge"] = validate(vae, run.generator(40), len(texts))
    rows = []
    for seed in SEEDS:
        started = time.monotonic()
        videos = generate(
            model, vae, encoder, texts, seed=seed, latent_frames=run.sizes.latent_frames
        )
        rows.append(judge_bytes(videos, scenes).summary())
        run.log.write("evaluate", seed=seed, seconds=time.monotonic() - started, **rows[-1])
        if seed == SEEDS[0] and arguments.sheet:
            shown = videos[: min(16, len(texts))].float() / 255
            contact_sheet(shown, texts[: len(shown)], arguments.sheet, columns=9, scale=0.75)
    result["metrics"] = spread(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1))
    run.log.write("evaluated", judge=result.get("judge"))


if __name__ == "__main__":
    main()
