"""The one interface of the pipeline: trimming, clamping, conventions, bounded memory, loading."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.vae import (
    TAEHV,
    StreamingDecoder,
    StreamingEncoder,
    TAEHVConfig,
    VideoVAE,
    WanVAE,
    WanVAEConfig,
    load_vae,
)
from lightforcing.lightforcing_core.vae.latent_stats import (
    LATENT_MEAN,
    LATENT_STD,
    denormalise_latents,
    normalise_latents,
)

VAEFactory = Callable[[], VideoVAE]
TAEHV_SIZES = TAEHVConfig(decoder_widths=(8, 6, 4, 4), encoder_width=6)


def wan() -> VideoVAE:
    return VideoVAE(WanVAE(WanVAEConfig.from_dim(4)).eval().requires_grad_(False))


def taehv_front() -> VideoVAE:
    network = TAEHV(TAEHV_SIZES).eval().requires_grad_(False)
    return VideoVAE(network, encode_padding="front")


def taehv_end() -> VideoVAE:
    return VideoVAE(TAEHV(TAEHV_SIZES).eval().requires_grad_(False), latents="denormalised")


EVERY_KIND = pytest.mark.parametrize("make", [wan, taehv_front, taehv_end])


def mean_and_std(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.tensor(LATENT_MEAN).reshape(shape), torch.tensor(LATENT_STD).reshape(shape)


@EVERY_KIND
@pytest.mark.parametrize("split", [(6,), (1, 5), (3, 3), (2, 1, 3), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("latents_per_pass", [1, 4, 99])
def test_a_stream_is_one_frame_then_four_per_latent_however_it_is_cut(
    make: VAEFactory, split: tuple[int, ...], latents_per_pass: int
) -> None:
    vae = make()
    latents = torch.randn(2, 16, 6, 2, 3)
    whole = vae.new_decoder(latents_per_pass=99).decode(latents)
    assert whole.shape == (2, 21, 3, 16, 24)
    decoder = vae.new_decoder(latents_per_pass=latents_per_pass)
    parts = [decoder.decode(part) for part in latents.split(split, dim=2)]
    assert [p.shape[1] for p in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert decoder.latents_seen == 6


def test_wan_pixels_are_mapped_to_zero_to_one_and_clamped() -> None:
    vae = wan()
    vae.network.decoder.head["2"].bias.copy_(torch.tensor([0.0, 2.0, -2.0]))
    latents = torch.randn(1, 16, 2, 2, 2)
    frames = vae.new_decoder().decode(latents)
    raw, _ = vae.network.decode(latents)
    torch.testing.assert_close(frames, ((raw + 1) / 2).clamp(0, 1).transpose(1, 2))
    assert frames.min() == 0
    assert frames.max() == 1


def test_taehv_frames_are_clamped_and_the_first_three_dropped_once() -> None:
    vae = taehv_front()
    vae.network.decoder[22].bias.copy_(torch.tensor([0.5, 2.0, -2.0]))
    latents = torch.randn(1, 16, 3, 2, 2)
    raw, _ = vae.network.decode(latents.transpose(1, 2))
    frames = vae.new_decoder().decode(latents)
    torch.testing.assert_close(frames, raw[:, 3:].clamp(0, 1))


def test_a_denormalised_taehv_gets_latents_with_mean_and_deviation_put_back() -> None:
    vae = taehv_end()
    latents = torch.randn(1, 16, 2, 2, 2)
    mean, std = mean_and_std((1, 1, 16, 1, 1))
    raw, _ = vae.network.decode(latents.transpose(1, 2) * std + mean)
    torch.testing.assert_close(vae.new_decoder().decode(latents), raw[:, 3:].clamp(0, 1))
    video = torch.rand(1, 1, 3, 16, 16)
    own, _ = vae.network.encode(video.expand(-1, 4, -1, -1, -1))
    expected = ((own - mean) / std).transpose(1, 2)
    torch.testing.assert_close(vae.new_encoder().encode(video), expected)


def test_the_latent_conversions_are_inverse_in_any_channel_dimension() -> None:
    latents = torch.randn(2, 16, 3, 4)
    torch.testing.assert_close(normalise_latents(denormalise_latents(latents)), latents)
    moved = denormalise_latents(latents.movedim(1, -1), channel_dim=-1).movedim(-1, 1)
    torch.testing.assert_close(moved, denormalise_latents(latents))
    assert denormalise_latents(latents.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [wan, taehv_front])
@pytest.mark.parametrize("split", [(17,), (1, 16), (5, 4, 8), (1, 4, 4, 4, 4)])
@pytest.mark.parametrize("latents_per_pass", [1, 2, 99])
def test_encoding_is_the_same_however_the_frames_are_cut(
    make: VAEFactory, split: tuple[int, ...], latents_per_pass: int
) -> None:
    vae = make()
    frames = torch.rand(1, 17, 3, 16, 24)
    whole = vae.new_encoder(latents_per_pass=99).encode(frames)
    assert whole.shape == (1, 16, 5, 2, 3)
    encoder = vae.new_encoder(latents_per_pass=latents_per_pass)
    parts = [encoder.encode(part) for part in frames.split(split, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)
    assert encoder.latents_seen == 5


def test_wan_encodes_frames_as_pixels_from_minus_one_to_one() -> None:
    vae = wan()
    frames = torch.rand(1, 5, 3, 16, 16)
    expected, _ = vae.network.encode(frames.transpose(1, 2) * 2 - 1)
    torch.testing.assert_close(vae.new_encoder().encode(frames), expected)


def test_front_padding_repeats_the_first_frame_and_end_padding_the_last() -> None:
    frames = torch.rand(1, 5, 3, 16, 16)
    front = taehv_front()
    padded = torch.cat([frames[:, :1]] * 3 + [frames], dim=1)
    expected = front.network.encode(padded)[0].transpose(1, 2)
    torch.testing.assert_close(front.new_encoder().encode(frames), expected)
    end = VideoVAE(front.network, encode_padding="end")
    padded = torch.cat([frames] + [frames[:, -1:]] * 3, dim=1)
    expected = end.network.encode(padded)[0].transpose(1, 2)
    torch.testing.assert_close(end.new_encoder().encode(frames), expected)


def test_a_stream_of_a_file_that_pads_the_end_cannot_go_on_until_it_is_reset() -> None:
    encoder = taehv_end().new_encoder()
    first = encoder.encode(torch.ones(1, 5, 3, 16, 16))
    with pytest.raises(ValueError, match=r"pads the end.*reset"):
        encoder.encode(torch.ones(1, 4, 3, 16, 16))
    encoder.reset()
    torch.testing.assert_close(encoder.encode(torch.ones(1, 5, 3, 16, 16)), first)


@EVERY_KIND
def test_runs_share_weights_but_no_state_and_reset_starts_over(make: VAEFactory) -> None:
    vae = make()
    one, other = torch.randn(2, 1, 16, 2, 2, 2)
    alone = vae.new_decoder().decode(one)
    first, second = vae.new_decoder(), vae.new_decoder()
    second.decode(other)
    torch.testing.assert_close(first.decode(one), alone)
    second.reset()
    assert second.latents_seen == second.state_bytes == 0
    torch.testing.assert_close(second.decode(one), alone)


@EVERY_KIND
def test_the_memory_of_a_run_does_not_grow_with_its_length(make: VAEFactory) -> None:
    decoder = make().new_decoder()
    held = set()
    for count in (1, 3, 7, 2):
        decoder.decode(torch.randn(1, 16, count, 2, 2))
        held.add(decoder.state_bytes)
    assert len(held) == 1
    assert held.pop() > 0


@EVERY_KIND
def test_nan_in_latents_stays_visible(make: VAEFactory) -> None:
    latents = torch.randn(1, 16, 2, 2, 2)
    latents[:, :, 1] = float("nan")
    frames = make().new_decoder().decode(latents)
    assert frames[:, 0].isfinite().all()
    assert frames[:, 1:].isnan().any()


@EVERY_KIND
def test_overflow_does_not_pass_for_black_or_white(
    make: VAEFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make()
    exact = vae.network.decode
    infinite = lambda *inputs: (exact(*inputs)[0] * torch.inf, exact(*inputs)[1])  # noqa: E731
    monkeypatch.setattr(vae.network, "decode", infinite)
    assert vae.new_decoder().decode(torch.randn(1, 16, 1, 2, 2)).isnan().all()


@EVERY_KIND
def test_latents_and_frames_of_any_float_type_are_taken(make: VAEFactory) -> None:
    vae = make()
    frames = vae.new_decoder().decode(torch.randn(1, 16, 1, 2, 2).bfloat16())
    assert frames.dtype == torch.float32
    assert vae.new_encoder().encode(frames.double()).dtype == torch.float32


@EVERY_KIND
def test_wrong_shapes_are_refused(make: VAEFactory) -> None:
    vae = make()
    decoder = vae.new_decoder()
    with pytest.raises(ValueError, match=r"latents must be \[B, 16, T, h, w\]"):
        decoder.decode(torch.zeros(1, 2, 16, 4, 4))
    decoder.decode(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ValueError, match=r"this stream has .*\(1, 4, 4\).*got \(1, 4, 2\)"):
        decoder.decode(torch.zeros(1, 16, 1, 4, 2))
    with pytest.raises(ValueError, match="frames must be"):
        vae.new_encoder().encode(torch.zeros(1, 1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"1 \+ 4 k frames"):
        vae.new_encoder().encode(torch.zeros(1, 4, 3, 16, 16))
    for make_stream in (StreamingDecoder, StreamingEncoder):
        with pytest.raises(ValueError, match="at least 1"):
            make_stream(vae, latents_per_pass=0)


def test_unknown_conventions_are_refused() -> None:
    network = TAEHV(TAEHV_SIZES)
    with pytest.raises(ValueError, match="latents must be"):
        VideoVAE(network, latents="raw")
    with pytest.raises(ValueError, match="encode_padding must be"):
        VideoVAE(network, encode_padding="middle")


def test_running_out_of_gpu_memory_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = wan()

    def exhausted(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae.network, "decode", exhausted)
    with pytest.raises(UserError, match=r"decoding one latent frame; take a smaller size"):
        vae.new_decoder().decode(torch.zeros(1, 16, 6, 2, 2))


def test_what_does_not_fit_at_once_is_decoded_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae = wan()
    latents = torch.randn(1, 16, 7, 2, 2)
    expected = vae.new_decoder().decode(latents)
    decode = vae.network.decode
    passes = []

    def small(part: Tensor, state: Any) -> Any:
        passes.append(part.shape[2])
        # The second pass fails: the stream must go on from where the first one left it.
        if part.shape[2] > 1 and len(passes) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return decode(part, state)

    monkeypatch.setattr(vae.network, "decode", small)
    got = vae.new_decoder().decode(latents)
    assert passes == [3, 3, 1, 1, 1, 1]
    assert torch.allclose(got, expected, atol=1e-5)
    assert caplog.text.count("one by one") == 1


# Loading


def write(path: Path, weights: dict[str, Tensor], facts: object = None) -> Path:
    metadata = None if facts is None else {"lightforcing": json.dumps(facts)}
    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata)
    return path


def test_each_family_is_told_by_its_tensors(tmp_path: Path) -> None:
    latents = torch.randn(1, 16, 2, 2, 2)
    for make, kind in ((wan, "wan"), (taehv_front, "taehv")):
        vae = make()
        path = write(tmp_path / f"{kind}.safetensors", vae.network.state_dict())
        loaded = load_vae(path)
        assert loaded.kind == kind
        assert loaded.can_encode
        assert loaded.dtype == torch.float32
        torch.testing.assert_close(
            loaded.new_decoder().decode(latents), vae.new_decoder().decode(latents)
        )
        assert load_vae(path, "cpu", torch.bfloat16).dtype == torch.bfloat16
        assert not any(p.requires_grad for p in loaded.network.parameters())


@pytest.mark.parametrize("prefix", ["first_stage_model.", "model.", "vae.", "state_dict."])
def test_names_under_one_wrapper_and_torch_files_are_read(tmp_path: Path, prefix: str) -> None:
    weights = wan().network.state_dict()
    path = tmp_path / "vae.pth"
    torch.save({f"{prefix}{name}": tensor for name, tensor in weights.items()}, path)
    assert load_vae(path).kind == "wan"


def test_the_metadata_states_the_conventions_and_the_argument_overrides_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightforcing")
    weights = taehv_front().network.state_dict()
    facts = {"kind": "taehv", "latents": "denormalised", "encode_padding": "front"}
    own = write(tmp_path / "own.safetensors", weights, facts)
    assert (load_vae(own).latents, load_vae(own).encode_padding) == ("denormalised", "front")
    assert load_vae(own, latents="normalised").latents == "normalised"
    assert caplog.text == ""
    plain = write(tmp_path / "lighttaew2_1.safetensors", weights)
    loaded = load_vae(plain)
    assert (loaded.latents, loaded.encode_padding) == ("normalised", "end")
    assert "assuming a TAEHV file for normalised latents" in caplog.text
    assert load_vae(plain, latents="denormalised").latents == "denormalised"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.self_attn.q.weight", "patch_embedding.weight"], "this is a Wan denoiser"),
        (["generator_ema.model.patch_embedding.weight"], "this is a Wan denoiser"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "this is a T5 text encoder"),
        (["decoder.upsamples.0.upsamples.0.residual.2.weight"], "this is a Wan 2.2 VAE"),
        (["decoder.mid_block.resnets.0.conv1.weight"], "VAE in the diffusers layout"),
        (["blocks.0.self_attn.q.lora_A.weight"], "this is a LoRA"),
        (["something.else"], "tensors of unknown kind, such as 'something.else'"),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_that_in_one_line(
    tmp_path: Path, names: list[str], message: str
) -> None:
    path = write(tmp_path / "wrong.safetensors", {name: torch.zeros(1) for name in names})
    with pytest.raises(UserError, match=r"wrong\.safetensors: this is .*; give Wan 2\.1 VAE") as e:
        load_vae(path)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_files_that_do_not_fit_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    weights = wan().network.state_dict()
    torn = {k: v for k, v in weights.items() if "middle.1.proj" not in k}
    path = write(tmp_path / "torn.safetensors", torn)
    with pytest.raises(UserError, match=r"torn\.safetensors: Wan VAE weights do not fit: missing"):
        load_vae(path)
    path = write(tmp_path / "vae.safetensors", weights)
    with pytest.raises(UserError, match="needs no latents setting"):
        load_vae(path, latents="normalised")
    other = TAEHV(TAEHVConfig(decoder_widths=(4, 4, 4, 4), encoder_width=4, latent_channels=48))
    path = write(tmp_path / "taew2_2.safetensors", other.state_dict())
    with pytest.raises(UserError, match=r"48 latent channels, Wan 2\.1 has 16; give taew2_1"):
        load_vae(path)
    with pytest.raises(UserError, match="no such file"):
        load_vae(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("this is not a checkpoint, it is a sentence")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_vae(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"latents": "raw"}', "says latents = 'raw', expected normalised or denormalised"),
        ('{"encode_padding": []}', r"says encode_padding = \[\], expected front or end"),
    ],
)
def test_damaged_metadata_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.safetensors"
    save_file(taehv_front().network.state_dict(), path, {"lightforcing": text})
    with pytest.raises(UserError, match=message):
        load_vae(path)


def test_a_decoder_only_file_decodes_and_says_that_it_cannot_encode(tmp_path: Path) -> None:
    for make in (wan, taehv_front):
        weights = {
            k: v for k, v in make().network.state_dict().items() if not k.startswith("encoder.")
        }
        vae = load_vae(write(tmp_path / "decoder.safetensors", weights))
        assert vae.new_decoder().decode(torch.zeros(1, 16, 1, 2, 2)).shape == (1, 1, 3, 16, 16)
        assert not vae.can_encode
        with pytest.raises(UserError, match="has no encoder"):
            vae.new_encoder()
