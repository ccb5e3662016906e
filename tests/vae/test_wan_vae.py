"""Wan VAE: golden file, an oracle over the whole sequence, streaming, strict loading."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.vae.latent_stats import LATENT_MEAN, LATENT_STD
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE, WanVAEConfig, WanVAEState
from lightforcing.lightforcing_core.vae.wan_vae_modules import ChannelNorm

Weights = dict[str, Tensor]
# Widths that no formula gives, to prove that all of them are read from the file.
ODD = WanVAEConfig(
    decoder_widths=(10, 9, 7, 6, 5), upsampled_widths=(8, 4, 3), encoder_widths=(3, 4, 5, 6, 8)
)


def random_network(config: WanVAEConfig = ODD) -> WanVAE:
    network = WanVAE(config).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        # About unit gain per layer, so that differences are neither lost nor blown up.
        if name.endswith("gamma"):
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn_like(parameter) * (1 / fan_in) ** 0.5)
    return network


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


class Oracle:
    """The published network on a whole video at once, from its formulas.

    No state: every causal convolution sees the whole sequence behind two zero frames.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        time, space = weight.shape[2] - 1, weight.shape[3] // 2
        return F.conv3d(F.pad(x, (space, space, space, space, time, 0)), weight, bias)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gamma = self.weights[f"{name}.gamma"].reshape(1, -1, 1, 1, 1)
        return x / x.square().sum(1, keepdim=True).sqrt() * x.shape[1] ** 0.5 * gamma

    def residual(self, name: str, x: Tensor) -> Tensor:
        hidden = self.norm(f"{name}.residual.0", x)
        hidden = self.conv(f"{name}.residual.2", hidden * hidden.sigmoid())
        hidden = self.norm(f"{name}.residual.3", hidden)
        hidden = self.conv(f"{name}.residual.6", hidden * hidden.sigmoid())
        has_shortcut = f"{name}.shortcut.weight" in self.weights
        return hidden + (self.conv(f"{name}.shortcut", x) if has_shortcut else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        normed = self.norm(f"{name}.norm", x)
        out = torch.empty_like(x)
        for batch, frame in itertools.product(range(x.shape[0]), range(x.shape[2])):
            rows = normed[batch, :, frame].flatten(1)  # [C, H*W]
            matrix = self.weights[f"{name}.to_qkv.weight"][:, :, 0, 0]
            query, key, value = (
                matrix @ rows + self.weights[f"{name}.to_qkv.bias"][:, None]
            ).chunk(3)
            shares = (query.T @ key / len(query) ** 0.5).softmax(-1)
            result = self.weights[f"{name}.proj.weight"][:, :, 0, 0] @ (value @ shares.T)
            result = result + self.weights[f"{name}.proj.bias"][:, None]
            out[batch, :, frame] = result.reshape(x[batch, :, frame].shape)
        return x + out

    def upsample(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.time_conv.weight" in self.weights:
            weight = self.weights[f"{name}.time_conv.weight"]
            frames = [x[:, :, 0]]
            later = F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0))
            for time in range(x.shape[2] - 1):
                window = later[:, :, time : time + 3]
                both = torch.einsum("bcthw,oct->bohw", window, weight[..., 0, 0])
                both = both + self.weights[f"{name}.time_conv.bias"][:, None, None]
                frames += both.chunk(2, dim=1)
            x = torch.stack(frames, dim=2)
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        weight = self.weights[f"{name}.resample.1.weight"][:, :, None]
        bias = self.weights[f"{name}.resample.1.bias"]
        return F.conv3d(x, weight, bias, padding=(0, 1, 1))

    def downsample(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.resample.1.weight"][:, :, None]
        bias = self.weights[f"{name}.resample.1.bias"]
        x = F.conv3d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2))
        if f"{name}.time_conv.weight" not in self.weights:
            return x
        weight = self.weights[f"{name}.time_conv.weight"][..., 0, 0]
        frames = [x[:, :, 0]]
        for time in range(0, x.shape[2] - 2, 2):
            frame = torch.einsum("bcthw,oct->bohw", x[:, :, time : time + 3], weight)
            frames.append(frame + self.weights[f"{name}.time_conv.bias"][:, None, None])
        return torch.stack(frames, dim=2)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.residual(f"{name}.0", x)
        x = self.attention(f"{name}.1", x)
        return self.residual(f"{name}.2", x)

    def head(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(f"{name}.0", x)
        return self.conv(f"{name}.2", x * x.sigmoid())

    def decode(self, latents: Tensor) -> Tensor:
        shape = (1, 16, 1, 1, 1)
        x = latents.double() * torch.tensor(LATENT_STD).double().reshape(shape)
        x = self.conv("conv2", x + torch.tensor(LATENT_MEAN).double().reshape(shape))
        x = self.middle("decoder.middle", self.conv("decoder.conv1", x))
        for index in range(15):
            step = self.upsample if index in (3, 7, 11) else self.residual
            x = step(f"decoder.upsamples.{index}", x)
        return self.head("decoder.head", x)

    def encode(self, pixels: Tensor) -> Tensor:
        x = self.conv("encoder.conv1", pixels.double())
        for index in range(11):
            step = self.downsample if index in (2, 5, 8) else self.residual
            x = step(f"encoder.downsamples.{index}", x)
        x = self.head("encoder.head", self.middle("encoder.middle", x))
        mean = self.conv("conv1", x)[:, :16]
        shape = (1, 16, 1, 1, 1)
        mean = mean - torch.tensor(LATENT_MEAN).double().reshape(shape)
        return mean / torch.tensor(LATENT_STD).double().reshape(shape)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Weights:
    return load_file(golden_dir / "video_vae.safetensors")


@pytest.fixture(scope="module")
def golden_network(golden: Weights) -> WanVAE:
    prefix = "wan_vae."
    weights = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    return WanVAE.from_state_dict(weights).requires_grad_(False)


def test_the_golden_pixels_are_reproduced(golden: Weights, golden_network: WanVAE) -> None:
    pixels, _ = golden_network.decode(golden["wan.latent"])
    assert relative_error(pixels, golden["wan.pixels"]) <= 1e-4


def test_the_golden_latents_are_reproduced(golden: Weights, golden_network: WanVAE) -> None:
    latents, _ = golden_network.encode(golden["wan.encode_in"])
    assert relative_error(latents, golden["wan.encode_out"]) <= 1e-4


@pytest.mark.parametrize("config", [ODD, WanVAEConfig.from_dim(4)], ids=["odd", "dim4"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_decoding_is_the_published_network(config: WanVAEConfig, count: int) -> None:
    network = random_network(config)
    latents = torch.randn(2, 16, count, 3, 2)
    pixels, _ = network.decode(latents)
    assert pixels.shape == (2, 3, 1 + 4 * (count - 1), 24, 16)
    assert relative_error(pixels.double(), Oracle(network.state_dict()).decode(latents)) < 1e-5


@pytest.mark.parametrize("config", [ODD, WanVAEConfig.from_dim(4)], ids=["odd", "dim4"])
@pytest.mark.parametrize("count", [1, 5, 13])
def test_encoding_is_the_published_network(config: WanVAEConfig, count: int) -> None:
    network = random_network(config)
    pixels = torch.rand(2, 3, count, 16, 24) * 2 - 1
    latents, _ = network.encode(pixels)
    assert latents.shape == (2, 16, 1 + count // 4, 2, 3)
    assert relative_error(latents.double(), Oracle(network.state_dict()).encode(pixels)) < 1e-5


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_any_split_gives_the_same_pixels_and_latents(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    network = random_network()
    latents = torch.randn(1, 16, sum(sizes), 2, 2)
    pixels = torch.rand(1, 3, 4 * sum(sizes) - 3, 16, 16) * 2 - 1
    decoder_state: WanVAEState | None = None
    encoder_state: WanVAEState | None = None
    decoded, encoded = [], []
    for part in latents.split(sizes, dim=2):
        result, decoder_state = network.decode(part, decoder_state)
        decoded.append(result)
    for part in pixels.split([4 * sizes[0] - 3, *(4 * n for n in sizes[1:])], dim=2):
        result, encoder_state = network.encode(part, encoder_state)
        encoded.append(result)
    assert relative_error(torch.cat(decoded, 2), network.decode(latents)[0]) < 1e-5
    assert relative_error(torch.cat(encoded, 2), network.encode(pixels)[0]) < 1e-5
    assert decoder_state is not None and encoder_state is not None
    assert decoder_state.latents_seen == encoder_state.latents_seen == sum(sizes)


def test_a_frame_never_changes_the_frames_before_it() -> None:
    network = random_network()
    latents = torch.randn(1, 16, 4, 2, 2)
    before, _ = network.decode(latents)
    latents[:, :, 2] += 1
    after, _ = network.decode(latents)
    torch.testing.assert_close(after[:, :, :5], before[:, :, :5])
    assert not torch.allclose(after[:, :, 5], before[:, :, 5])


def test_the_state_has_one_size_from_the_first_call_on_and_does_not_alias_the_chunk() -> None:
    network = random_network()
    state = None
    sizes = set()
    for count in (1, 3, 1, 4):
        _, state = network.decode(torch.randn(1, 16, count, 2, 2), state)
        sizes.add(sum(feature.untyped_storage().nbytes() for feature in state.features))
        assert all(f.untyped_storage().nbytes() == 4 * f.numel() for f in state.features)
    assert len(sizes) == 1


def test_bfloat16_stays_close_to_float32() -> None:
    network = random_network(WanVAEConfig.from_dim(8))
    latents = torch.randn(1, 16, 2, 4, 4)
    exact, _ = network.decode(latents)
    rounded, _ = network.bfloat16().decode(latents.bfloat16())
    # 8 bits of mantissa, about 35 layers in sequence: rounding grows like a random walk.
    assert relative_error(rounded.float(), exact) < 35**0.5 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_a_zero_or_large_vector_is_finite(dtype: torch.dtype) -> None:
    norm = ChannelNorm(8, 3).to(dtype)
    zero = norm(torch.zeros(1, 8, 1, 1, 1, dtype=dtype))
    assert torch.equal(zero, torch.zeros_like(zero))
    # The squares alone would overflow float16.
    large = norm(torch.full((1, 8, 1, 1, 1), 6e4, dtype=dtype))
    torch.testing.assert_close(large, torch.ones_like(large), rtol=1e-2, atol=0)


def test_lightvae_is_the_same_class_with_a_quarter_of_the_widths() -> None:
    full, light = WanVAEConfig.from_dim(96), WanVAEConfig.from_dim(24)
    assert full.decoder_widths == (384, 384, 384, 192, 96)
    assert light.decoder_widths == tuple(int(width * 0.25) for width in full.decoder_widths)
    assert full.upsampled_widths == (192, 192, 96)


def test_loading_reads_widths_keeps_dtype_and_leaves_the_random_state_alone() -> None:
    weights = {k: v.bfloat16() for k, v in random_network().state_dict().items()}
    before = torch.get_rng_state()
    network = WanVAE.from_state_dict(weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.config == ODD
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_a_file_without_encoder_decodes_and_says_that_it_cannot_encode() -> None:
    weights = {
        k: v for k, v in random_network().state_dict().items() if not k.startswith("encoder.")
    }
    network = WanVAE.from_state_dict(weights)
    with torch.no_grad():
        assert network.decode(torch.randn(1, 16, 1, 2, 2))[0].shape == (1, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="no encoder"):
        network.encode(torch.zeros(1, 3, 1, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.middle.1.proj.bias": None}, r"missing decoder\.middle\.1\.proj\.bias"),
        ({"decoder.conv1.weight": None}, r"not a Wan 2\.1 VAE.*missing decoder\.conv1\.weight"),
        ({"extra.weight": torch.ones(1)}, r"unexpected extra\.weight"),
        ({"conv2.bias": torch.ones(3)}, r"conv2\.bias is \[3\], expected \[16\]"),
        ({"conv2.bias": torch.full((16,), float("inf"))}, r"NaN or infinity in conv2\.bias"),
        ({"decoder.conv1.weight": torch.ones(10, 48, 3, 3, 3)}, "48 latent channels"),
        ({"decoder.conv1.weight": torch.ones(10)}, r"decoder\.conv1\.weight has shape \[10\]"),
        ({"decoder.conv1.weight": torch.ones(0, 16, 3, 3, 3)}, r"conv1\.weight has shape \[0,"),
        ({"decoder.conv1.weight": torch.ones(2**40, 16, 0, 3, 3)}, r"conv1\.weight has shape"),
        ({"decoder.conv1.weight": torch.ones(4, 16, 3, 3, 3).int()}, r"conv1\.weight holds int32"),
        ({"decoder.upsamples.0.residual.6.weight": torch.tensor(1.0)}, r"6\.weight has shape \[\]"),
        ({"decoder.upsamples.3.resample.1.weight": torch.ones(0, 1, 3, 3)}, r"1\.weight has shape"),
        ({"encoder.conv1.weight": torch.tensor(1.0)}, r"encoder\.conv1\.weight has shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    weights = random_network().state_dict() | change
    with pytest.raises(UserError, match=message):
        WanVAE.from_state_dict({k: v for k, v in weights.items() if v is not None})


def test_inputs_of_another_shape_are_refused() -> None:
    network = random_network()
    for shape in [(1, 3, 16, 4, 4), (1, 16, 0, 4, 4), (16, 1, 4, 4)]:
        with pytest.raises(ValueError, match=r"latents must be \[B, 16, T, h, w\]"):
            network.decode(torch.zeros(shape))
    for shape in [(1, 3, 4, 16, 16), (1, 3, 1, 12, 16), (1, 1, 5, 16, 16), (3, 5, 16, 16)]:
        with pytest.raises(ValueError, match=r"1 \+ 4 k frames at the start"):
            network.encode(torch.zeros(shape))
    _, state = network.encode(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="4 k frames here"):
        network.encode(torch.zeros(1, 3, 5, 16, 16), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_cpu(dtype: torch.dtype) -> None:
    network = random_network(WanVAEConfig.from_dim(24))
    latents = torch.randn(1, 16, 3, 8, 12)
    pixels = torch.rand(1, 3, 9, 64, 96) * 2 - 1
    expected = network.decode(latents)[0], network.encode(pixels)[0]
    network = network.to("cuda", dtype)
    got = network.decode(latents.to("cuda", dtype))[0], network.encode(pixels.to("cuda", dtype))[0]
    # Convolutions of float32 may run in TF32, which has float16's 10 bits.
    bits = 7 if dtype == torch.bfloat16 else 10
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_error(mine.float().cpu(), theirs) < 35**0.5 * 2 ** -(bits + 1)
