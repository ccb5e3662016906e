"""Presets of `generate`: what they fill in, what overrides them, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core import presets
from lightforcing.lightforcing_core.checkpoints.load import LoadedModel
from lightforcing.lightforcing_core.cli import main
from lightforcing.lightforcing_core.embedded import EMBEDDED_TEXT
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.presets import PRESETS, fill
from lightforcing.lightforcing_core.vae.streaming import VideoVAE
from lightforcing.lightforcing_core.vae.taehv import TAEHV, TAEHVConfig
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

CPU, FLOAT = torch.device("cpu"), torch.float32
SPARSE = {"sparsity", "base_sparsity", "keep_frames", "keep_sink", "keep_near"}


@pytest.fixture
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "eight_bit_obstacles", lambda *_: [])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tree = WanModel(WanConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=1))
    save_file({k: v.detach() for k, v in tree.named_parameters()}, folder / "model.safetensors")
    vae = TAEHV(TAEHVConfig(decoder_widths=(8, 8, 8, 8), encoder_width=8))
    facts = {"kind": "taehv", "latents": "normalised", "encode_padding": "front"}
    metadata = {"lightforcing": json.dumps(facts)}
    save_file(vae.state_dict(), folder / "vae.safetensors", metadata=metadata)
    return [
        "generate",
        "--prompt=a red circle",
        f"--model={folder / 'model.safetensors'}",
        f"--vae={folder / 'vae.safetensors'}",
        f"--text-encoder={EMBEDDED_TEXT}",
        "--device=cpu",
        "--size=64x48",
    ]


@pytest.mark.usefixtures("any_machine")
def test_open_options_are_filled() -> None:
    assert fill("speed", {}, CPU, FLOAT) == {
        "sparsity": 0.88,
        "base_sparsity": 0.98,
        "keep_frames": 6,
        "keep_sink": 1,
        "keep_near": 2,
        "speed": "int8",
    }
    assert fill("low-memory", {"dense": False, "schedule_values": ()}, CPU, FLOAT) == {
        "sparsity": 0.85,
        "base_sparsity": 0.95,
        "keep_frames": 3,
        "keep_sink": 1,
        "keep_near": 1,
        "window": 12,
        "sink": 3,
        "decode_frames": 1,
        "text_device": "cpu",
        "speed": "int8",
    }


@pytest.mark.usefixtures("any_machine")
@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"keep_frames": 0}, {"keep_frames"}),
        ({"base_sparsity": 0.9}, {"base_sparsity"}),
        ({"sparsity": 0.99}, {"sparsity", "base_sparsity"}),
        ({"schedule_values": (0.0, 0.5)}, {"sparsity", "base_sparsity"}),
        ({"policy": "block_top_k"}, {"keep_frames", "keep_sink", "keep_near"}),
        ({"dense": True}, SPARSE),
        ({"window": -1}, {"window", "sink"}),
        ({"sink": 0}, {"sink"}),
        ({"speed": "plain"}, {"speed"}),
        ({"decode_frames": 3, "text_device": "cuda"}, {"decode_frames", "text_device"}),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_what_is_given_overrides_and_takes_what_belongs_to_it(
    given: dict[str, Any], left: set[str]
) -> None:
    everything = fill("low-memory", {}, CPU, FLOAT)
    expected = {name: value for name, value in everything.items() if name not in left}
    assert fill("low-memory", given, CPU, FLOAT) == expected


def test_a_machine_without_eight_bit_products_is_told_every_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match=r"preset 'speed' cannot be used: .* need a CUDA device"):
        fill("speed", {}, CPU, FLOAT)
    with caplog.at_level("WARNING", "lightforcing"):
        filled = fill("low-memory", {}, CPU, FLOAT)
    assert "speed" not in filled and filled["window"] == 12
    assert "'low-memory' without eight-bit products" in caplog.text
    assert fill("speed", {"speed": "plain"}, CPU, FLOAT)["sparsity"] == 0.88


def test_an_old_card_hears_of_the_type_and_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError) as error:
        fill("speed", {}, torch.device("cuda"), FLOAT)
    assert "do bfloat16 and float16, the model computes in float32" in str(error.value)
    assert "compute capability 8.0 or higher, cuda has 7.5" in str(error.value)


def run(files: list[str], folder: Path, *arguments: str) -> dict[str, Any]:
    report = folder / "a.json"
    assert main([*files, f"--out={folder / 'a.mp4'}", f"--json={report}", *arguments]) == 0
    return json.loads(report.read_text())


def test_the_report_names_the_preset_and_what_it_came_to(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    new_decoder = VideoVAE.new_decoder

    def listening(self: VideoVAE, *, latents_per_pass: int) -> Any:
        passes.append(latents_per_pass)
        return new_decoder(self, latents_per_pass=latents_per_pass)

    monkeypatch.setattr(VideoVAE, "new_decoder", listening)
    report = run(files, tmp_path, "--preset=low-memory", "--frames=61", "--sink=1")
    assert report["preset"] == "low-memory" and passes == [1]
    assert report["settings"]["window_frames"] == 12 and report["settings"]["sink_frames"] == 1
    schedule = report["settings"]["sparse"]["schedule"]
    assert (schedule["target"], schedule["base"]) == (0.85, 0.95)
    # Not what a CPU has.
    assert report["peak_allocated_gib"] is None and report["peak_reserved_gib"] is None
    assert run(files, tmp_path, "--frames=9")["preset"] is None
    assert passes == [1, 3]


def test_decoding_one_by_one_gives_the_same_video(files: list[str], tmp_path: Path) -> None:
    videos = []
    for number in (1, 3):
        out = tmp_path / f"{number}.mp4"
        assert main([*files, f"--out={out}", "--frames=21", f"--decode-frames={number}"]) == 0
        videos.append(out.read_bytes())
    assert videos[0] == videos[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=speed"], "the preset 'speed' cannot be used"),
        (["--speed=int8"], "the speed 'int8' cannot be used: the kernels need a CUDA device"),
        (["--decode-frames=0"], "--decode-frames must be at least 1, got 0"),
        (["--text-device=tpu"], "device 'tpu' cannot be used"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    def read(*_: object, **__: object) -> LoadedModel:
        raise AssertionError("weights were read before it was refused")

    monkeypatch.setattr("lightforcing.lightforcing_core.generate.load_checkpoint", read)
    out = tmp_path / "a.mp4"
    assert main([*files, f"--out={out}", "--frames=9", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_knows_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "{" + ",".join(PRESETS) + "}" in capsys.readouterr().out
