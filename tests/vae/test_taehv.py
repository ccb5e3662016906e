"""TAEHV: golden file, an oracle written frame by frame, streaming, strict loading."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.vae.taehv import TAEHV, TAEHVConfig

SMALL = TAEHVConfig(decoder_widths=(12, 10, 8, 6), encoder_width=8)
Weights = dict[str, Tensor]


def random_network(config: TAEHVConfig = SMALL) -> TAEHV:
    network = TAEHV(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        # About unit gain per layer, so that differences are neither lost nor blown up.
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.copy_(torch.randn_like(parameter) * (2 / fan_in) ** 0.5)
    return network


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def compositions(total: int) -> list[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum."""
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, total), count) for count in range(total)
    )
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *positions, total))) for positions in cuts
    ]


class Memory:
    """The oracle's own state: the last input of each block, by name."""

    def __init__(self) -> None:
        self.frames: dict[str, Tensor] = {}


def oracle_block(weights: Weights, name: str, frame: Tensor, memory: Memory) -> Tensor:
    past = memory.frames.get(name, torch.zeros_like(frame))
    memory.frames[name] = frame
    hidden = torch.cat([frame, past], dim=1)
    for index in (0, 2, 4):
        layer = f"{name}.conv.{index}"
        hidden = F.conv2d(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1)
        hidden = hidden if index == 4 else hidden.relu()
    return (hidden + frame).relu()


def oracle_decode(weights: Weights, latents: Tensor) -> Tensor:
    """Frame by frame, in the published order: upsample, then grow, then project."""

    def conv(frame: Tensor, index: int) -> Tensor:
        bias = weights.get(f"decoder.{index}.bias")
        return F.conv2d(frame, weights[f"decoder.{index}.weight"], bias, padding=1)

    memory = Memory()
    out = []
    for latent in latents.unbind(1):
        frames = [conv((latent / 3).tanh() * 3, 1).relu()]
        for first, stride in ((3, 1), (9, 2), (15, 2)):
            grown = []
            for frame in frames:
                for index in range(first, first + 3):
                    frame = oracle_block(weights, f"decoder.{index}", frame, memory)
                frame = frame.repeat_interleave(2, 2).repeat_interleave(2, 3)
                frame = F.conv2d(frame, weights[f"decoder.{first + 4}.conv.weight"])
                grown += [conv(part, first + 5) for part in frame.chunk(stride, dim=1)]
            frames = grown
        out += [conv(frame.relu(), 22) for frame in frames]
    return torch.stack(out, dim=1)


def oracle_encode(weights: Weights, pixels: Tensor) -> Tensor:
    """Frame by frame; a pooling layer waits until it has all its frames."""

    def conv(frame: Tensor, index: int, stride: int = 1) -> Tensor:
        bias = weights.get(f"encoder.{index}.bias")
        weight = weights[f"encoder.{index}.weight"]
        return F.conv2d(frame, weight, bias, padding=1, stride=stride)

    memory = Memory()
    frames = [conv(frame, 0).relu() for frame in pixels.unbind(1)]
    for first, stride in ((4, 2), (9, 2), (14, 1)):
        pooled = []
        for start in range(0, len(frames), stride):
            joined = torch.cat(frames[start : start + stride], dim=1)
            frame = F.conv2d(joined, weights[f"encoder.{first - 2}.conv.weight"])
            frame = conv(frame, first - 1, stride=2)
            for index in range(first, first + 3):
                frame = oracle_block(weights, f"encoder.{index}", frame, memory)
            pooled.append(frame)
        frames = pooled
    return torch.stack([conv(frame, 17) for frame in frames], dim=1)


def test_the_golden_frames_are_reproduced(golden_dir: Path) -> None:
    golden = load_file(golden_dir / "video_vae.safetensors")
    weights = {k.removeprefix("taehv."): v for k, v in golden.items() if "taehv.decoder" in k}
    network = TAEHV.from_state_dict(weights)
    with torch.no_grad():
        frames, _ = network.decode(golden["taehv.latent"])
    assert relative_error(frames, golden["taehv.frames_untrimmed"]) <= 1e-4


@pytest.mark.parametrize("widths", [(12, 10, 8, 6), (8, 8, 8, 8), (5, 7, 3, 9)])
def test_decoding_is_the_published_network_frame_by_frame(
    widths: tuple[int, int, int, int],
) -> None:
    network = random_network(TAEHVConfig(decoder_widths=widths, encoder_width=None))
    latents = torch.randn(2, 3, 16, 3, 5)
    frames, _ = network.decode(latents)
    assert frames.shape == (2, 12, 3, 24, 40)
    assert relative_error(frames, oracle_decode(network.state_dict(), latents)) < 1e-5


def test_encoding_is_the_published_network_frame_by_frame() -> None:
    network = random_network()
    pixels = torch.rand(2, 12, 3, 24, 16)
    latents, _ = network.encode(pixels)
    assert latents.shape == (2, 3, 16, 3, 2)
    assert relative_error(latents, oracle_encode(network.state_dict(), pixels)) < 1e-5


@pytest.mark.parametrize("split", compositions(5))
def test_every_split_decodes_and_encodes_the_same(split: tuple[int, ...]) -> None:
    network = random_network()
    latents = torch.randn(1, 5, 16, 3, 4)
    pixels = torch.rand(1, 20, 3, 16, 24)
    whole = network.decode(latents)[0], network.encode(pixels)[0]
    decoder_state = encoder_state = None
    frames, encoded = [], []
    for part in latents.split(split, dim=1):
        result, decoder_state = network.decode(part, decoder_state)
        frames.append(result)
    for part in pixels.split([4 * n for n in split], dim=1):
        result, encoder_state = network.encode(part, encoder_state)
        encoded.append(result)
    assert relative_error(torch.cat(frames, 1), whole[0]) < 1e-5
    assert relative_error(torch.cat(encoded, 1), whole[1]) < 1e-5
    assert decoder_state.latents_seen == encoder_state.latents_seen == 5


def test_the_state_is_one_frame_per_block_and_does_not_alias_the_chunk() -> None:
    network = random_network()
    for count in (1, 4):
        _, state = network.decode(torch.randn(1, count, 16, 3, 4))
        assert len(state.memories) == 9
        for memory in state.memories:
            assert memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()


def test_gradients_reach_every_weight() -> None:
    network = TAEHV(SMALL)
    latents, _ = network.encode(torch.rand(1, 8, 3, 16, 16))
    frames, _ = network.decode(latents)
    frames.square().mean().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_bfloat16_stays_close_to_float32() -> None:
    network = random_network()
    latents = torch.randn(1, 3, 16, 4, 4)
    exact, _ = network.decode(latents)
    rounded, _ = network.bfloat16().decode(latents.bfloat16())
    # 8 bits of mantissa, about 25 layers in sequence: rounding grows like a random walk.
    assert relative_error(rounded.float(), exact) < 25**0.5 * 2**-8


def test_time_growing_weights_for_more_frames_keep_their_last_rows() -> None:
    network = random_network()
    weights = network.state_dict()
    oversized = dict(weights)
    for index in (7, 13):
        name = f"decoder.{index}.conv.weight"
        oversized[name] = torch.cat([torch.randn_like(weights[name]), weights[name]])
    loaded = TAEHV.from_state_dict(oversized)
    latents = torch.randn(1, 2, 16, 2, 2)
    torch.testing.assert_close(loaded.decode(latents)[0], network.decode(latents)[0])


def test_loading_reads_widths_keeps_dtype_and_leaves_the_random_state_alone() -> None:
    weights = {k: v.half() for k, v in random_network().state_dict().items()}
    before = torch.get_rng_state()
    network = TAEHV.from_state_dict(weights)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.config == SMALL
    assert {p.dtype for p in network.parameters()} == {torch.float16}
    decoder_only = {k: v for k, v in weights.items() if k.startswith("decoder.")}
    assert TAEHV.from_state_dict(decoder_only).encoder is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.3.conv.0.weight": None}, r"missing decoder\.3\.conv\.0\.weight"),
        ({"decoder.99.weight": torch.ones(1)}, r"unexpected decoder\.99\.weight"),
        ({"decoder.3.conv.2.bias": torch.ones(5)}, r"bias is \[5\], expected \[12\]"),
        ({"decoder.1.weight": None}, "not a TAEHV state dict"),
        ({"decoder.22.bias": torch.full((3,), float("nan"))}, r"NaN.*decoder\.22\.bias"),
        ({"decoder.8.weight": torch.ones(0, 12, 3, 3)}, r"decoder\.8\.weight has shape \[0, 12"),
        ({"decoder.1.weight": torch.ones(2**60, 0, 3, 3)}, r"decoder\.1\.weight has shape"),
        ({"decoder.1.weight": torch.ones(12, 16, 3, 3).char()}, r"decoder\.1\.weight holds int8"),
        ({"encoder.0.weight": torch.tensor(1.0)}, r"encoder\.0\.weight has shape \[\]"),
        ({"encoder.0.weight": torch.ones(0, 3, 3, 3)}, r"encoder\.0\.weight has shape"),
        ({"decoder.7.conv.weight": torch.tensor(1.0)}, r"decoder\.7\.conv\.weight is \[\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    weights = random_network().state_dict() | change
    with pytest.raises(UserError, match=message):
        TAEHV.from_state_dict({k: v for k, v in weights.items() if v is not None})


def test_inputs_of_another_shape_are_refused() -> None:
    network = random_network(TAEHVConfig(decoder_widths=(4, 4, 4, 4), encoder_width=4))
    with pytest.raises(ValueError, match=r"latents must be \[B, T, 16, h, w\]"):
        network.decode(torch.zeros(1, 16, 2, 4, 4))
    for shape in [(1, 5, 3, 16, 16), (1, 4, 3, 12, 16), (1, 4, 1, 16, 16), (4, 3, 16, 16)]:
        with pytest.raises(ValueError, match="frames must be"):
            network.encode(torch.zeros(shape))
    decoder = TAEHV(TAEHVConfig(decoder_widths=(4, 4, 4, 4), encoder_width=None))
    with pytest.raises(ValueError, match="no encoder"):
        decoder.encode(torch.zeros(1, 4, 3, 16, 16))


@pytest.mark.parametrize(
    "sizes",
    [{"decoder_widths": (4, 4, 4)}, {"decoder_widths": (4, 4, 0, 4)}, {"encoder_width": 0}],
)
def test_impossible_sizes_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TAEHVConfig(**sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_cpu(dtype: torch.dtype) -> None:
    network = random_network(TAEHVConfig(decoder_widths=(64, 48, 32, 16), encoder_width=16))
    latents = torch.randn(1, 4, 16, 8, 12)
    pixels = torch.rand(1, 8, 3, 64, 96)
    expected = network.decode(latents)[0], network.encode(pixels)[0]
    network = network.to("cuda", dtype)
    got = network.decode(latents.to("cuda", dtype))[0], network.encode(pixels.to("cuda", dtype))[0]
    # Convolutions of float32 may run in TF32, which has float16's 10 bits.
    bits = 7 if dtype == torch.bfloat16 else 10
    for mine, theirs in zip(got, expected, strict=True):
        assert relative_error(mine.float().cpu(), theirs) < 25**0.5 * 2 ** -(bits + 1) * 2
