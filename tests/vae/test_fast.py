"""The decoders for a GPU: the same frames as the plain ones, however a stream is cut."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightforcing.lightforcing_core.vae import TAEHV, TAEHVConfig, VideoVAE, WanVAE, WanVAEConfig
from lightforcing.lightforcing_core.vae import fast_wan as fast_wan_module
from lightforcing.lightforcing_core.vae import streaming as streaming_module
from lightforcing.lightforcing_core.vae.channel_operations import fast_obstacle, torch_operations
from lightforcing.lightforcing_core.vae.fast_taehv import FastTAEHVDecoder
from lightforcing.lightforcing_core.vae.fast_wan import FastWanDecoder

CUDA = torch.device("cuda")


def wan(dim: int = 6) -> VideoVAE:
    """Width 6 takes our convolutions; 18 cuDNN's for the first blocks."""
    network = WanVAE(WanVAEConfig.from_dim(dim)).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()  # the default ones hardly show a missing bias
    network.decoder.head["2"].bias.zero_()  # or all frames are limited
    return VideoVAE(network)


def taehv(latents: str = "normalised") -> VideoVAE:
    sizes = TAEHVConfig(decoder_widths=(12, 10, 8, 6), encoder_width=None)
    network = TAEHV(sizes).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(1.5)  # the default ones fade
    network.decoder[22].bias.fill_(0.5)
    return VideoVAE(network, latents=latents)


EVERY_KIND = pytest.mark.parametrize(
    "make", [wan, lambda: wan(18), taehv, lambda: taehv("denormalised")],
    ids=["wan", "wan wide", "taehv", "taehv denormalised"],
)  # fmt: skip


@pytest.fixture
def with_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streaming decoder believes in a GPU and gets the kernels' twins."""
    monkeypatch.setattr(streaming_module, "fast_obstacle", lambda device, dtype: "")
    monkeypatch.setattr(streaming_module, "triton_operations", torch_operations)


def test_a_decoders_memory_goes_with_it_at_once(with_twins: None) -> None:
    """Not when Python next looks for cycles: on a GPU that can be many videos later."""
    decoder = taehv().new_decoder()
    decoder.decode(torch.randn(1, 16, 3, 3, 5))
    gone = weakref.ref(decoder)
    gc.collect()
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()


@EVERY_KIND
@pytest.mark.parametrize("split", [(6,), (1, 5), (3, 3), (2, 1, 3), (1, 1, 1, 1, 1, 1)])
def test_the_same_frames_as_plain_torch_however_cut(
    make: object, split: tuple[int, ...], with_twins: None, caplog: pytest.LogCaptureFixture
) -> None:
    vae = make()
    latents = torch.randn(2, 16, 6, 3, 5)
    expected = vae.new_decoder(use_kernels=False, latents_per_pass=99).decode(latents)
    decoder = vae.new_decoder(latents_per_pass=99)
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        parts = [decoder.decode(part) for part in latents.split(split, dim=2)]
    assert caplog.messages == ["decoding with Triton kernels, channels-last"]
    made = torch.cat(parts, 1)
    assert made.dtype == torch.float32
    assert expected.std() > 0.02
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)


@EVERY_KIND
def test_the_states_are_those_of_the_plain_network(make: object) -> None:
    """Also a stream may change from one to the other."""
    vae = make()
    network, latents = vae.network, torch.randn(1, 16, 4, 2, 3)
    is_wan = isinstance(network, WanVAE)
    fast = (FastWanDecoder if is_wan else FastTAEHVDecoder)(network, torch_operations())

    def unit(frames: Tensor) -> Tensor:
        return (frames.transpose(1, 2) * 0.5 + 0.5 if is_wan else frames).clamp(0, 1)

    latents = latents if is_wan else latents.transpose(1, 2)
    first, second = latents.split(2, dim=2 if is_wan else 1)
    _, state = network.decode(first, None)
    _, fast_state = fast.decode(first, None)
    held = ("features" if is_wan else "memories",)
    for ours, theirs in zip(getattr(fast_state, *held), getattr(state, *held), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert fast_state.latents_seen == state.latents_seen
    expected, _ = network.decode(second, state)
    torch.testing.assert_close(fast.decode(second, state)[0], unit(expected), rtol=1e-3, atol=1e-4)
    crossed, _ = network.decode(second, fast_state)
    torch.testing.assert_close(crossed, expected, rtol=1e-3, atol=1e-4)


def test_weights_keep_their_values_and_stay_ordinary_tensors() -> None:
    """Also where a host runs in inference mode; and what is laid out once is not copied again."""
    network = wan(18).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.inference_mode():
        FastWanDecoder(network, torch_operations())
    weight = network.decoder.upsamples[0].residual["2"].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not any(parameter.is_inference() for parameter in network.parameters())
    address = weight.data_ptr()
    FastWanDecoder(network, torch_operations())
    assert weight.data_ptr() == address
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    network.load_state_dict(before)


def test_the_place_of_a_weight_stays_until_it_was_read() -> None:
    """Weights are laid out on the stream that decodes, and were made on that of the denoiser."""
    done: list[str] = []

    class OnGPU:
        is_cuda, device = True, torch.device("cuda:0")

        def contiguous(self, **_: object) -> str:
            done.append("read")
            return "laid out"

        def record_stream(self, stream: object) -> None:
            done.append(f"kept for {stream}")

    layer = SimpleNamespace(weight=SimpleNamespace(data=OnGPU()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
        fast_wan_module._use_channels_last(layer)
    assert done == ["read", "kept for the stream of cuda:0"]
    assert layer.weight.data == "laid out"


def test_the_side_stream_serves_every_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may be named without its number, which streams always have."""

    def stream(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device("cuda", device.index or 0))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    decoder = wan().new_decoder()
    first = decoder.side_stream(torch.device("cuda"))
    assert decoder.side_stream(torch.device("cuda")) is first
    assert decoder.side_stream(torch.device("cuda:1")) is not first


def test_the_cpu_and_other_types_stay_with_plain_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert "need a CUDA device" in fast_obstacle(torch.device("cpu"), torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        decoder = taehv().new_decoder()
        for _ in range(2):
            decoder.decode(torch.randn(1, 16, 1, 2, 2))
    assert len(caplog.messages) == 1 and "plain torch: the weights are on cpu" in caplog.messages[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [wan, lambda: wan(18), lambda: wan(24), taehv])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(make: object, dtype: torch.dtype) -> None:
    """No further from float32 than plain torch in the same type, but for a little."""
    vae = make()
    latents = torch.randn(1, 16, 5, 6, 10, device=CUDA)
    vae.network.to(CUDA)
    exact = vae.new_decoder(use_kernels=False).decode(latents)
    vae.network.to(dtype)
    plain = vae.new_decoder(use_kernels=False).decode(latents)
    decoder = vae.new_decoder()
    made = torch.cat([decoder.decode(part) for part in latents.split((2, 3), dim=2)], 1)
    assert (made - exact).square().mean() < 2 * (plain - exact).square().mean() + 1e-6
