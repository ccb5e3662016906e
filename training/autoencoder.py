"""Stage 1: the small TAEHV-shaped autoencoder.

Clips are rendered as training runs, each from a random time of a random scene, and always encoded
from the start of a stream (first frame repeated four times), so the start is trained as often as
the rest. Latents are normalised by their batch while training; at the end the normalisation
moves into the encoder's last convolution, so files hold a plain TAEHV whose latents have mean 0 and
variance 1 per channel. The decoder sees latents with a little noise: it
learns to hide the small errors that a denoiser makes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..lightforcing_core.vae.taehv import (
    FRAMES_PER_LATENT,
    FRAMES_TO_TRIM,
    TAEHV,
    MemBlock,
    TAEHVConfig,
)
from .common import (
    Run,
    Sizes,
    add_run_arguments,
    learning_rate,
    load_weights,
    run_from_arguments,
    save_weights,
)
from .optimizer import MasterOptimizer
from .scenes import FRAMES, render, sample_attributes

METADATA = {
    "lightforcing": json.dumps(
        {"kind": "taehv", "latents": "normalised", "encode_padding": "front"}
    )
}
_LATENT_NOISE = 0.1
_PEAK_RATE = 1.5e-3


def build_autoencoder(sizes: Sizes) -> TAEHV:
    """A TAEHV of these widths with fresh weights that keep the size of signals.

    The default initialisation shrinks them by a factor of ten on the way to the latents; training
    then stays at the mean picture for long.
    """
    model = TAEHV(
        TAEHVConfig(decoder_widths=sizes.decoder_widths, encoder_width=sizes.encoder_width)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MemBlock):
                module.conv[4].weight.mul_(0.2)
        model.decoder[22].weight.mul_(0.1)
        model.decoder[22].bias.fill_(0.5)
    return model


def pad_front(frames: Tensor) -> Tensor:
    """Repeat the first frame so that it fills latent frame 0: [B, 1 + 4 k, ...] -> [B, 4 + 4 k]."""
    return torch.cat([frames[:, :1]] * FRAMES_TO_TRIM + [frames], dim=1)


def encode_video(model: TAEHV, frames: Tensor) -> Tensor:
    """[B, 1 + 4 k, 3, H, W] in [0, 1] -> latents [B, 16, 1 + k, h, w] in the model's dtype."""
    dtype = model.decoder[1].weight.dtype
    return model.encode(pad_front(frames).to(dtype))[0].transpose(1, 2)


def decode_video(model: TAEHV, latents: Tensor) -> Tensor:
    """Latents [B, 16, 1 + k, h, w] -> frames [B, 1 + 4 k, 3, H, W], clamped to [0, 1]."""
    dtype = model.decoder[1].weight.dtype
    frames, _ = model.decode(latents.transpose(1, 2).to(dtype))
    return frames[:, FRAMES_TO_TRIM:].float().clamp(0, 1)


def random_clips(
    batch: int, latents: int, generator: torch.Generator, *, moving_start: bool = True
) -> Tensor:
    """Pixels of random training scenes: [B, 1 + 4 (latents - 1), 3, H, W]."""
    scenes = sample_attributes(batch, generator)
    length = 1 + FRAMES_PER_LATENT * (latents - 1)
    latest = FRAMES - length if moving_start else 0
    start = torch.randint(
        latest + 1, (batch, 1), generator=generator, device=generator.device
    ).float()
    return render(scenes, start + torch.arange(length, device=generator.device))


def _wide_convolution(name: str, parameter: Tensor) -> bool:
    """What Muon trains: not biases, pictures or latents."""
    return parameter.ndim == 4 and min(parameter.shape[:2]) > 16


def normalise(latents: Tensor) -> Tensor:
    """Mean 0 and variance 1 per channel over the batch: [B, T, C, h, w], float32."""
    values = latents.float()
    mean = values.mean((0, 1, 3, 4), keepdim=True)
    variance = values.var((0, 1, 3, 4), keepdim=True)
    return (values - mean) * (variance + 1e-6).rsqrt()


@torch.no_grad()
def fold_normalisation(model: TAEHV, clips: Sequence[Tensor]) -> None:
    """Make the encoder give, and the decoder take, latents of mean 0 and variance 1 per channel.

    Only the encoder changes: its decoder was trained on normalised latents. In place.

    Args:
        clips: batches of frames [B, 1 + 4 k, 3, H, W] to take the statistics from.
    """
    latents = torch.cat([encode_video(model, frames).float() for frames in clips])
    mean, scale = latents.mean((0, 2, 3, 4)), latents.var((0, 2, 3, 4)).rsqrt()
    last = model.encoder[17]
    last.weight.mul_(scale[:, None, None, None].to(last.weight))
    last.bias.copy_((last.bias - mean.to(last.bias)) * scale.to(last.bias))


def reconstruction_loss(decoded: Tensor, frames: Tensor) -> Tensor:
    """L1 of the pixels and of their differences along x, y and time, plus a squared error.

    L1 alone is content with the median, the background, for a long time.
    """
    error = decoded - frames
    loss = error.abs().mean() + 2 * error.square().mean()
    for dim in (1, 3, 4):
        loss = loss + 0.5 * (decoded.diff(dim=dim) - frames.diff(dim=dim)).abs().mean()
    return loss


def train_autoencoder(run: Run, model: TAEHV, *, decoder_only: bool = False) -> TAEHV:
    """Train in place and return the averaged network, latents normalised.

    With `decoder_only`, the latents stay what they are: for polishing after a denoiser was trained.
    """
    device, sizes = run.device, run.sizes
    model = model.to(device)
    model = model.to(memory_format=torch.channels_last) if run.fast else model
    generator = run.generator(1)
    optimizer = MasterOptimizer(
        model.decoder if decoder_only else model,
        use_muon=_wide_convolution,
        ema=0.998,
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )

    def forward(frames: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=run.fast):
            if decoder_only:
                with torch.no_grad():
                    latents = model.encode(pad_front(frames))[0].float()
            else:
                latents = normalise(model.encode(pad_front(frames))[0])
            decoded = model.decode(latents + _LATENT_NOISE * noise)[0][:, FRAMES_TO_TRIM:]
        excess = (latents.abs() - 3).clamp(min=0).square().mean()
        return reconstruction_loss(decoded.float(), frames) + 0.1 * excess

    compiled = torch.compile(forward) if run.fast else forward
    clock = run.clock()
    losses: list[Tensor] = []
    while True:
        frames = random_clips(sizes.autoencoder_batch, sizes.autoencoder_latents, generator)
        noise = torch.randn(
            sizes.autoencoder_batch, sizes.autoencoder_latents, 16, 16, 32,
            generator=generator, device=device,
        )  # fmt: skip
        loss = compiled(frames, noise)
        loss.backward()
        optimizer.step(learning_rate(_PEAK_RATE, clock.used))
        losses.append(loss.detach())
        going = clock.tick()
        if clock.step == 2 and run.fast:
            clock.restart()
        if clock.step % 200 == 0 or not going:
            run.log.write(
                "autoencoder",
                step=clock.step,
                loss=torch.stack(losses).mean().item(),
                used=clock.used,
            )
            losses.clear()
        if not going:
            break
    trained = model.decoder if decoder_only else model
    trained.load_state_dict(optimizer.averaged())
    if decoder_only:
        return model.eval()
    with torch.no_grad():
        fold_normalisation(
            model,
            [
                random_clips(4, sizes.latent_frames, generator, moving_start=False)
                for _ in range(16 if run.fast else 1)
            ],
        )
    return model.eval()


@torch.no_grad()
def measure_autoencoder(
    model: TAEHV, generator: torch.Generator, *, clips: int, latents: int
) -> dict[str, float]:
    """L1 over whole streams, at their start, and how far latents reach."""
    frames = random_clips(clips, latents, generator, moving_start=False)
    encoded = encode_video(model, frames)
    error = (decode_video(model, encoded) - frames).abs()
    return {
        "l1": error.mean().item(),
        "l1_first_frame": error[:, 0].mean().item(),
        "l1_last_frame": error[:, -1].mean().item(),
        "latent_std": encoded.float().std().item(),
        "latent_beyond_3": (encoded.abs() > 3).float().mean().item(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m lightforcing.training.autoencoder --out FILE`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, seconds=180)
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    arguments = parser.parse_args(argv)
    run = run_from_arguments(arguments)
    model = build_autoencoder(run.sizes)
    if arguments.resume:
        load_weights(model, arguments.resume)
    model = train_autoencoder(run, model, decoder_only=arguments.decoder_only)
    save_weights(arguments.out, model.state_dict(), torch.float16, METADATA)
    run.log.write(
        "autoencoder_done",
        **measure_autoencoder(
            model,
            run.generator(2),
            clips=16 if run.fast else 1,
            latents=run.sizes.latent_frames,
        ),
        parameters=sum(p.numel() for p in model.parameters()),
    )


if __name__ == "__main__":
    main()
