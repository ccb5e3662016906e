"""What eight-bit linear layers cost the embedded model: by layer, in its videos, to its judge.

    python benchmarks/eight_bit_quality.py [--device cuda] [--sparse] [--prompts 16] [--seeds 8]
        [--seconds 300] [--csv FILE]

- Layers: products of every large layer with the activations of a real bf16 run, in bf16 and in
  eight bits, against the same in float32: relative L2 error.
- Forward: the velocity of one forward at each of the four timesteps, from the same noise, against
  bf16's.
- Forward of 1.3B: the same of a model of that size with random weights, at 832x480; on a GPU only.
- Videos: held-out prompts, the same noise for every method; PSNR and SSIM against bf16's video, and
  the judge's accuracies (`training/judge.py`) with their spread over seeds. float32 shows how far
  another rounding alone moves a video and a verdict.

Methods take turns seed by seed; no seed is begun after `--seconds`, so all methods have made the
same videos. Every figure is one row: mean, smallest and largest over what `of` says.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightforcing.lightforcing_core.bench.case import RolloutCase, random_denoiser, random_prompt
from lightforcing.lightforcing_core.bench.common import device_name, machine_facts, write_csv
from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.cli.common import say
from lightforcing.lightforcing_core.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT, EMBEDDED_VAE
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.fast.linears import (
    EIGHT_BIT_LAYERS,
    EIGHT_BIT_SPEEDS,
    EightBitLinear,
    eight_bit_obstacle,
    with_eight_bit_linears,
)
from lightforcing.lightforcing_core.layout import FrameSize
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import rollout
from lightforcing.lightforcing_core.rollout_settings import RolloutSettings
from lightforcing.lightforcing_core.sparse_settings import SparseSettings
from lightforcing.lightforcing_core.text.embedded import EmbeddedTextEncoder
from lightforcing.lightforcing_core.vae.load import load_vae
from lightforcing.lightforcing_core.vae.taehv import TAEHV
from lightforcing.lightforcing_core.video_quality import QualityMeter
from lightforcing.lightforcing_core.wan.forward import TextContext, prepare_text
from lightforcing.training.autoencoder import decode_video
from lightforcing.training.evaluate import SETS, held_out_scenes
from lightforcing.training.judge import METRICS
from lightforcing.training.scenes import Scenes, prompts
from lightforcing.training.validate_judge import judge_bytes

RESULTS = Path(__file__).parent / "results"
LATENT = (16, 16, 32)  # channels, height, width of 256x128 pixels
FRAMES = 21
AT_ONCE, DECODED_AT_ONCE = 16, 4

Row = dict[str, Any]


class Listening(ForwardEngine):
    """Keeps the velocities."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__(tree, graphs=False)
        self.velocities: list[Tensor] = []

    def __call__(self, *args: Any) -> Tensor:
        velocity = super().__call__(*args)
        self.velocities.append(velocity.float())
        return velocity


class Bench:
    """The embedded model on a device, in bf16 and in what else the device can."""

    def __init__(self, device: torch.device, sparse: SparseSettings | None) -> None:
        self.device, self.sparse = device, sparse
        load = partial(load_model, EMBEDDED_MODEL, device=device)
        self.trees: dict[str, nn.Module] = {"bf16": load(dtype=torch.bfloat16).tree}
        self.numbers: dict[str, torch.dtype] = {}
        for name, numbers in EIGHT_BIT_SPEEDS.items():
            if obstacle := eight_bit_obstacle(device, torch.bfloat16, numbers):
                say(f"{name} is left out: {obstacle}")
                continue
            self.numbers[name] = numbers
            self.trees[name] = with_eight_bit_linears(self.trees["bf16"], numbers)
        self.trees["float32"] = load(dtype=torch.float32).tree
        wide = torch.bfloat16 if device.type == "cuda" else torch.float32
        network = load_vae(EMBEDDED_VAE, device=device, dtype=wide).network
        assert isinstance(network, TAEHV)
        self.vae = network
        self.encoder = EmbeddedTextEncoder.load(EMBEDDED_TEXT)

    def text(self, method: str, texts: Sequence[str]) -> TextContext:
        tree = self.trees[method]
        dtype = tree.patch_embedding.weight.dtype
        rows = torch.cat([self.encoder.encode(text) for text in texts])
        return prepare_text(tree, rows.to(self.device, dtype))

    def noise(self, seed: int, batch: int) -> SeededNoise:
        return SeededNoise(seed, (batch, *LATENT), self.device)

    def layers(self, text: str) -> list[Row]:
        """Relative errors of every kind of layer, over blocks and passes of two chunks."""
        tree = self.trees["bf16"]
        errors: dict[tuple[str, str], list[float]] = defaultdict(list)

        def compare(
            kind: str, rounded: dict[str, EightBitLinear], layer: nn.Linear, given: Any, out: Tensor
        ) -> None:
            x = given[0]
            exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())
            errors["bf16", kind].append(relative(out, exact))
            for method, linear in rounded.items():
                errors[method, kind].append(relative(linear(x), exact))

        hooks = []
        for block in tree.blocks:
            for kind in EIGHT_BIT_LAYERS:
                layer = block.get_submodule(kind)
                rounded = {m: EightBitLinear(layer, numbers=n) for m, n in self.numbers.items()}
                hooks.append(layer.register_forward_hook(partial(compare, kind, rounded)))
        settings = RolloutSettings(6, 3)
        for _ in rollout(tree, settings, self.text("bf16", [text]), self.noise(0, 1)):
            pass
        for hook in hooks:
            hook.remove()
        return [
            figure(method, f"relative error of {kind}", values, "blocks and passes")
            for (method, kind), values in sorted(errors.items())
        ]

    def forwards(self, texts: Sequence[str]) -> list[Row]:
        """Relative error of one forward's velocity, per timestep."""
        found = {
            method: velocities(
                self.trees[method], self.text(method, texts), self.noise(0, len(texts))
            )
            for method in ("bf16", *self.numbers)
        }
        return errors_of(found, "relative error of a velocity, to bf16")

    def large_forwards(self) -> list[Row]:
        """As `forwards`, of 1.3B with random weights."""
        case = RolloutCase(FrameSize(832, 480))
        tree = random_denoiser(case, self.device)
        text = random_prompt(case, tree, self.device)
        found = {"bf16": velocities(tree, text, case.noise(self.device))}
        for method, numbers in self.numbers.items():
            rounded = with_eight_bit_linears(tree, numbers)
            found[method] = velocities(rounded, text, case.noise(self.device))
        return errors_of(found, "relative error of a velocity, 1.3B at random")

    def videos(self, method: str, texts: Sequence[str], seed: int) -> Tensor:
        """uint8 [B, T, 3, H, W]."""
        tree, parts = self.trees[method], []
        settings = RolloutSettings(FRAMES, 3, sparse=self.sparse)
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            noise = self.noise(seed * 1000 + start, len(some))
            # The kernels do not do float32.
            engine = None if method == "float32" else ForwardEngine(tree)
            chunks = rollout(tree, settings, self.text(method, some), noise, engine=engine)
            latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
            for few in latents.split(DECODED_AT_ONCE):
                parts.append((decode_video(self.vae, few) * 255).round().byte())
        return torch.cat(parts)

    def judged(self, number: int, seeds: int, until: float) -> list[Row]:
        """Accuracies, and PSNR and SSIM to bf16, over seeds."""
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        sets: dict[str, Scenes] = {
            name: held_out_scenes(number, self.device, several=name == SETS[1]) for name in SETS
        }
        made = 0
        for seed in range(seeds):
            if seed and time.monotonic() > until:
                say(f"stopped after {seed} of {seeds} seeds: no time left")
                break
            for name, scenes in sets.items():
                texts = prompts(scenes)
                reference: Tensor | None = None
                for method in self.trees:
                    videos = self.videos(method, texts, seed)
                    made += len(videos)
                    summary = judge_bytes(videos, scenes).summary()
                    for metric in METRICS:
                        values[method, f"{metric}, {name}, all objects"].append(
                            100 * summary[f"all_{metric}"]
                        )
                    if reference is None:
                        reference = videos  # bf16 is the first
                        continue
                    meter = QualityMeter()
                    for a, b in zip(reference, videos, strict=True):
                        meter.add(a.float() / 255, b.float() / 255)
                    quality = meter.result()
                    values[method, f"PSNR to bf16, {name}"].append(quality.mean_psnr)
                    values[method, f"SSIM to bf16, {name}"].append(quality.mean_ssim)
        rows = [
            figure(method, name, figures, f"seeds of {number} videos")
            for (method, name), figures in values.items()
        ]
        for row in rows:
            if "all objects" in row["figure"]:
                plain = next(
                    r for r in rows if r["figure"] == row["figure"] and r["method"] == "bf16"
                )
                row["points_to_bf16"] = round(row["mean"] - plain["mean"], 2)
        say(f"{made} videos")
        return rows


def velocities(tree: nn.Module, text: TextContext, noise: SeededNoise) -> list[Tensor]:
    """Of the first chunk, from the same noise at each timestep."""
    engine = Listening(tree)
    for step in RolloutSettings(3, 3).steps:
        for _ in rollout(tree, RolloutSettings(3, 3, (step,)), text, noise, engine=engine):
            pass
    return engine.velocities


def errors_of(found: dict[str, list[Tensor]], name: str) -> list[Row]:
    """Of every method's velocities, to those in bf16."""
    return [
        figure(
            method,
            name,
            [relative(a, b) for a, b in zip(made, found["bf16"], strict=True)],
            "timesteps",
        )
        for method, made in found.items()
        if method != "bf16"
    ]


def relative(got: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of what was expected."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def figure(method: str, name: str, values: Sequence[float], of: str) -> Row:
    """Mean, smallest and largest."""
    return {
        "method": method,
        "figure": name,
        "mean": round(sum(values) / len(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "number": len(values),
        "of": of,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sparse", action="store_true", help="as in the speed preset")
    parser.add_argument("--prompts", type=int, default=16, help="of each of the two sets")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300, help="no seed is begun after")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    device = torch.device(arguments.device)
    bench = Bench(device, SparseSettings() if arguments.sparse else None)
    texts = prompts(held_out_scenes(4, device, several=True))
    rows = bench.layers(texts[0]) + bench.forwards(texts)
    if device.type == "cuda":
        rows += bench.large_forwards()
    rows += bench.judged(arguments.prompts, arguments.seeds, begun + arguments.seconds)
    for row in rows:
        points = row.get("points_to_bf16")
        say(
            f"{row['method']:<8} {row['figure']:<48} {row['mean']:>9.4f} "
            f"({row['min']:.4f} to {row['max']:.4f}; {row['number']} {row['of']})"
            + ("" if points is None else f"  {points:+.1f} points")
        )
    facts = {
        "attention": "sparse 0.88/0.98" if arguments.sparse else "dense",
        "device": device_name(device),
        **machine_facts(device),
    }
    kind = "sparse" if arguments.sparse else "dense"
    path = arguments.csv or RESULTS / f"eight_bit_quality_{kind}_{device.type}.csv"
    write_csv(path, rows, facts)
    say(f"{path}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
