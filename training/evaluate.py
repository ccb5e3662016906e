"""Stage 4: make held-out videos with the finished model and judge them.

64 prompts with one object and 64 with two or three, three seeds each, through the engine's own
rollout with four steps and no guidance. The first object of every prompt is a combination of
colour, shape, direction and size that training never showed.
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
from ..lightforcing_core.rollout import rollout
from ..lightforcing_core.rollout_settings import RolloutSettings
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

PROMPTS, SEEDS = 64, 3
SETS = ("one_object", "several_objects")
_PROMPT_SEED = 20261122
_AT_ONCE = 16
_DECODED_AT_ONCE = 4


def held_out_scenes(number: int, device: torch.device, *, several: bool) -> Scenes:
    """The scenes whose prompts are asked; drawn on the CPU, so the same on every machine.

    Args:
        number: how many, at most 1024 / 4.
        device: where to.
        several: with two or three objects each instead of one.
    """
    generator = torch.Generator().manual_seed(_PROMPT_SEED)
    scenes = sample_attributes(1024, generator, held_out_first=True)
    fitting = (scenes.count > 1) == several
    return scenes.select(fitting.nonzero()[:number, 0]).to(device)


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
        # Decoding whole videos takes gigabytes of activations: a few at a time.
        for latents in torch.cat(chunks, dim=2).split(_DECODED_AT_ONCE):
            videos.append((decode_video(vae, latents) * 255).round().byte())
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
    """Denoiser and autoencoder from files, ready to sample on the run's device.

    The denoiser runs in bf16 everywhere, as its file is stored.
    """
    model = build_denoiser(sizes)
    load_weights(model, model_path)
    vae = TAEHV.from_state_dict(load_file(vae_path))
    return (
        model.to(run.device, torch.bfloat16).eval().requires_grad_(False),
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
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many noise seeds")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--skip-validation", action="store_true")
    arguments = parser.parse_args(argv)
    run = run_from_arguments(arguments)
    model, vae = load_models(run.sizes, run, arguments.resume, arguments.autoencoder)
    encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)
    seeds = tuple(range(arguments.seeds))
    result: dict[str, object] = {"prompts": arguments.prompts, "seeds": list(seeds)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        scenes = held_out_scenes(arguments.prompts, run.device, several=name == SETS[1])
        texts = prompts(scenes)
        rows = []
        for seed in seeds:
            started = time.monotonic()
            videos = generate(
                model, vae, encoder, texts, seed=seed, latent_frames=run.sizes.latent_frames
            )
            rows.append(judge_bytes(videos, scenes).summary())
            spent = time.monotonic() - started
            run.log.write("evaluate", set=name, seed=seed, seconds=spent, **rows[-1])
            if seed == 0 and arguments.sheet:
                shown = videos[:16].float() / 255
                picture = arguments.sheet.with_stem(f"{arguments.sheet.stem}_{name}")
                contact_sheet(shown, texts[: len(shown)], picture, columns=9, scale=0.75)
        result[name] = spread(rows)
        arguments.out.write_text(json.dumps(result, indent=1))
    if not arguments.skip_validation:
        result["judge"] = validate(vae, run.generator(40), arguments.prompts)
    arguments.out.write_text(json.dumps(result, indent=1))
    run.log.write("evaluated", judge=result.get("judge"))


if __name__ == "__main__":
    main()
