"""The engine equals a slow oracle written from the formulas.

The oracle knows no cache: for every forward it runs the whole video so far as one sequence in
float64, with an explicit mask that says which frame sees which, and rotates with complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.attention import dense_attention
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text, wan_forward
from lightforcing.lightforcing_core.wan.modules import WanModel

HEIGHT, WIDTH = 4, 6  # latent size: 2 x 3 tokens a frame
TOKENS = 6
STEPS = (1000.0, 800.0, 300.0)


def small_config(**changes: int) -> WanConfig:
    sizes = {"dim": 96, "ffn_dim": 80, "num_heads": 2, "num_layers": 2, "text_dim": 24}
    return WanConfig(text_len=10, **{**sizes, **changes})


def random_tree(config: WanConfig) -> WanModel:
    tree = WanModel(config)
    with torch.no_grad():
        for name, parameter in tree.named_parameters():
            scale = 0.3 if "norm" in name or "modulation" in name else 1.2
            base = 1.0 if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")) else 0.0
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(base + scale * torch.randn_like(parameter) / math.sqrt(fan_in))
    return tree


# --- the oracle: float64, one sequence, explicit mask ---


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-6)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x: Tensor, token_positions: list[tuple[int, int, int]]) -> Tensor:
    """x [S, H, D]; each pair of values is one complex number turned by its axis' angle."""
    dim = x.shape[-1]
    side = 2 * (dim // 6)
    parts = (dim - 2 * side, side, side)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    for token, position in enumerate(token_positions):
        pair = 0
        for axis, part in enumerate(parts):
            for i in range(part // 2):
                angle = position[axis] / 10000 ** (2 * i / part)
                turned[token, :, pair] *= complex(math.cos(angle), math.sin(angle))
                pair += 1
    return torch.view_as_real(turned).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def oracle_velocity(
    weights: Mapping[str, Tensor],
    config: WanConfig,
    latents: Tensor,
    timesteps: list[float],
    visible: Tensor,
    text: Tensor,
) -> Tensor:
    """latents [C, F, h, w], one timestep per frame, visible [F, F]: row sees column."""
    frames = latents.shape[1]
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    positions = [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]
    patches = torch.stack(
        [latents[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() for f, r, c in positions]
    )
    x = linear(
        {
            "p.weight": weights["patch_embedding.weight"].flatten(1),
            "p.bias": weights["patch_embedding.bias"],
        },
        "p",
        patches,
    )
    half = config.freq_dim // 2
    sinusoid = torch.tensor(
        [
            [f(t / 10000 ** (i / half)) for f in (math.cos, math.sin) for i in range(half)]
            for t in timesteps
        ],
        dtype=torch.float64,
    )
    e = linear(weights, "time_embedding.0", sinusoid)
    e = linear(weights, "time_embedding.2", e * torch.sigmoid(e))
    e6 = linear(weights, "time_projection.1", e * torch.sigmoid(e)).unflatten(-1, (6, -1))
    padded = torch.zeros(config.text_len, config.text_dim, dtype=torch.float64)
    padded[: len(text)] = text
    context = linear(weights, "text_embedding.0", padded)
    context = linear(weights, "text_embedding.2", gelu(context))
    of_token = torch.tensor([f for f, _, _ in positions])
    mask = visible[of_token][:, of_token]

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (config.num_heads, -1))

    for i in range(config.num_layers):
        b = f"blocks.{i}"
        m = (weights[f"{b}.modulation"] + e6)[of_token].unbind(1)
        y = layer_norm(x) * (1 + m[1]) + m[0]
        a = f"{b}.self_attn"
        q = rms(linear(weights, f"{a}.q", y), weights[f"{a}.norm_q.weight"])
        k = rms(linear(weights, f"{a}.k", y), weights[f"{a}.norm_k.weight"])
        v = heads(linear(weights, f"{a}.v", y))
        y = softmax_attention(rotate(heads(q), positions), rotate(heads(k), positions), v, mask)
        x = x + linear(weights, f"{a}.o", y) * m[2]
        a = f"{b}.cross_attn"
        y = layer_norm(x) * weights[f"{b}.norm3.weight"] + weights[f"{b}.norm3.bias"]
        q = rms(linear(weights, f"{a}.q", y), weights[f"{a}.norm_q.weight"])
        k = rms(linear(weights, f"{a}.k", context), weights[f"{a}.norm_k.weight"])
        v = heads(linear(weights, f"{a}.v", context))
        x = x + linear(weights, f"{a}.o", softmax_attention(heads(q), heads(k), v, None))
        y = layer_norm(x) * (1 + m[4]) + m[3]
        y = linear(weights, f"{b}.ffn.2", gelu(linear(weights, f"{b}.ffn.0", y)))
        x = x + y * m[5]
    m = (weights["head.modulation"] + e.unsqueeze(1))[of_token].unbind(1)
    out = linear(weights, "head.head", layer_norm(x) * (1 + m[1]) + m[0])
    velocity = torch.empty_like(latents)
    for token, (f, r, c) in enumerate(positions):
        patch = out[token].unflatten(0, (2, 2, -1)).permute(2, 0, 1)
        velocity[:, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch
    return velocity


def oracle_rollout(
    tree: WanModel,
    noise: SeededNoise,
    text: Tensor,
    chunks: list[int],
    *,
    steps: list[tuple[float, ...]],
    given: Tensor | None = None,
    given_chunks: tuple[int, ...] = (),
    window: int = 10**6,
    sink: int = 0,
) -> Tensor:
    """Latents [C, F, h, w] of the generated frames."""
    weights = {k: v.detach().double() for k, v in tree.named_parameters()}
    done = torch.zeros(16, 0, HEIGHT, WIDTH, dtype=torch.float64)
    if given is not None:
        done = given.double()
    seen_by: list[set[int]] = []  # frames that each frame sees
    held: list[int] = []

    def admit(frames: range) -> None:
        for frame in frames:
            if len(held) == window:
                del held[sink]
            held.append(frame)
        seen_by.extend([set(held)] * len(frames))

    first = 0
    for length in given_chunks:
        admit(range(first, first + length))
        first += length
    for index, length in enumerate(chunks):
        frames = range(first, first + length)
        admit(frames)
        first += length
        visible = torch.tensor([[c in row for c in range(first)] for row in seen_by])
        x = noise.initial(frames)[0].double()
        for step, t in enumerate(steps[index]):
            if step:
                x = (1 - t / 1000) * x + t / 1000 * noise.renoise(frames, step)[0].double()
            timesteps = [0.0] * frames.start + [t] * length
            sequence = torch.cat([done, x], dim=1)
            velocity = oracle_velocity(
                weights, tree.config, sequence, timesteps, visible, text.double()
            )
            x = x - t / 1000 * velocity[:, frames.start :]
        done = torch.cat([done, x], dim=1)
    return done[:, (0 if given is None else given.shape[1]) :]


def run_engine(
    tree: WanModel,
    noise: SeededNoise,
    text: Tensor,
    settings: RolloutSettings,
    given: Tensor | None = None,
) -> Tensor:
    with torch.no_grad():
        context = prepare_text(tree, text[None])
    given = None if given is None else given[None]
    chunks = rollout(tree, settings, context, noise, given_latents=given)
    return torch.cat([chunk.latents[0] for chunk in chunks], dim=1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    error = float((actual.double() - expected).norm() / expected.norm())
    # float32 over a few thousand operations in sequence; a wrong mask or position gives > 1e-2.
    assert error < 2e-5, error


CASES = {
    "whole history": (RolloutSettings(6, 2, STEPS), [2, 2, 2], {}),
    "one frame a chunk": (RolloutSettings(3, 1, STEPS), [1, 1, 1], {}),
    "shorter last chunk": (RolloutSettings(5, 3, STEPS), [3, 2], {}),
    "independent first frame": (
        RolloutSettings(5, 2, STEPS, independent_first_frame=True),
        [1, 2, 2],
        {},
    ),
    "window": (RolloutSettings(8, 2, STEPS, window_frames=4), [2] * 4, {"window": 4}),
    "window with sink": (
        RolloutSettings(10, 2, STEPS, window_frames=5, sink_frames=1),
        [2] * 5,
        {"window": 5, "sink": 1},
    ),
    "window that chunks do not fill": (
        RolloutSettings(9, 2, STEPS, window_frames=5, sink_frames=2),
        [2, 2, 2, 2, 1],
        {"window": 5, "sink": 2},
    ),
}


def test_every_frame_has_a_timestep_of_its_own() -> None:
    """One forward over clean, half noisy and noisy frames, as teacher forcing uses it."""
    tree = random_tree(small_config())
    latents = torch.randn(16, 3, HEIGHT, WIDTH)
    text = torch.randn(4, tree.config.text_dim)
    timesteps = [0.0, 412.5, 1000.0]
    weights = {k: v.detach().double() for k, v in tree.named_parameters()}
    expected = oracle_velocity(
        weights,
        tree.config,
        latents.double(),
        timesteps,
        torch.ones(3, 3, dtype=torch.bool),
        text.double(),
    )
    with torch.no_grad():
        velocity = wan_forward(
            tree,
            latents[None],
            torch.tensor([timesteps]),
            range(3),
            prepare_text(tree, text[None]),
            lambda layer, q, k, v: dense_attention(q, k, v),
        )
    assert_same(velocity[0], expected)


@pytest.mark.parametrize("name", CASES)
def test_rollout_equals_the_oracle(name: str) -> None:
    settings, chunks, visibility = CASES[name]
    tree = random_tree(small_config())
    noise = SeededNoise(7, (1, 16, HEIGHT, WIDTH))
    text = torch.randn(6, tree.config.text_dim)
    expected = oracle_rollout(tree, noise, text, chunks, steps=[STEPS] * len(chunks), **visibility)
    assert_same(run_engine(tree, noise, text, settings), expected)


@pytest.mark.parametrize("given_chunks", [(1,), (2, 2), (1, 2)], ids=str)
def test_continuation_equals_the_oracle(given_chunks: tuple[int, ...]) -> None:
    tree = random_tree(small_config())
    noise = SeededNoise(8, (1, 16, HEIGHT, WIDTH))
    text = torch.randn(4, tree.config.text_dim)
    given = torch.randn(16, sum(given_chunks), HEIGHT, WIDTH)
    expected = oracle_rollout(
        tree, noise, text, [2, 2], steps=[STEPS] * 2, given=given, given_chunks=given_chunks
    )
    assert_same(run_engine(tree, noise, text, RolloutSettings(4, 2, STEPS), given), expected)


def test_the_first_chunk_may_have_steps_of_its_own() -> None:
    tree = random_tree(small_config())
    noise = SeededNoise(9, (1, 16, HEIGHT, WIDTH))
    text = torch.randn(4, tree.config.text_dim)
    settings = RolloutSettings(4, 2, steps=(1000.0,), first_chunk_steps=STEPS)
    expected = oracle_rollout(tree, noise, text, [2, 2], steps=[STEPS, (1000.0,)])
    assert_same(run_engine(tree, noise, text, settings), expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 64, "num_heads": 1},  # axes 24 / 20 / 20
        {"dim": 120, "num_heads": 6},  # axes 8 / 6 / 6
        {"dim": 128, "num_heads": 1, "num_layers": 1},  # axes 44 / 42 / 42
        {"dim": 40, "num_heads": 10, "num_layers": 3},  # head dim 4: rows and columns do not turn
    ],
    ids=str,
)
def test_any_width_and_head_count_equals_the_oracle(sizes: dict[str, int]) -> None:
    tree = random_tree(small_config(**sizes))
    noise = SeededNoise(10, (1, 16, HEIGHT, WIDTH))
    text = torch.randn(10, tree.config.text_dim)
    expected = oracle_rollout(tree, noise, text, [2, 1], steps=[STEPS] * 2)
    assert_same(run_engine(tree, noise, text, RolloutSettings(3, 2, STEPS)), expected)


def test_every_entry_of_a_batch_is_a_video_of_its_own() -> None:
    tree = random_tree(small_config())
    text = torch.randn(2, 5, tree.config.text_dim)
    settings = RolloutSettings(4, 2, STEPS)
    pair = SeededNoise(3, (2, 16, HEIGHT, WIDTH))
    with torch.no_grad():
        context = prepare_text(tree, text)
    together = torch.cat([c.latents for c in rollout(tree, settings, context, pair)], dim=2)

    class Second:
        shape = (1, 16, HEIGHT, WIDTH)
        device = torch.device("cpu")

        def initial(self, frames: range) -> Tensor:
            return pair.initial(frames)[1:]

        def renoise(self, frames: range, step: int) -> Tensor:
            return pair.renoise(frames, step)[1:]

    single = SeededNoise(3, (1, 16, HEIGHT, WIDTH))
    assert_same(together[0], run_engine(tree, single, text[0], settings).double())
    assert_same(together[1], run_engine(tree, Second(), text[1], settings).double())


def test_bfloat16_follows_float32() -> None:
    tree = random_tree(small_config())
    noise = SeededNoise(11, (1, 16, HEIGHT, WIDTH))
    text = torch.randn(4, tree.config.text_dim)
    settings = RolloutSettings(4, 2, STEPS)
    exact = run_engine(tree, noise, text, settings)
    rounded = run_engine(tree.bfloat16(), noise, text.bfloat16(), settings)
    assert rounded.dtype == torch.float32
    # bf16 keeps 8 bits: 0.4% a rounding, some dozens of them in a chain of six forwards.
    assert float((rounded - exact).norm() / exact.norm()) < 0.08
