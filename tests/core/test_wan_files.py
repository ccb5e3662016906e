"""`generate` with the layouts a user of real Wan weights has, at small widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.cli import main
from lightforcing.lightforcing_core.vae.taehv import TAEHV, TAEHVConfig
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE, WanVAEConfig
from lightforcing.lightforcing_core.video_io import read_video
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel


@pytest.fixture
def folder(tmp_path: Path, umt5_weights: dict[str, Tensor], umt5_piece: bytes) -> Path:
    """A Self Forcing .pt, a Wan VAE .pth, a TAEHV and a ComfyUI-style UMT5 file."""
    width = umt5_weights["shared.weight"].shape[1]
    tree = WanModel(WanConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=1, text_dim=width))
    tensors = {f"model.{k}": v.detach() for k, v in tree.named_parameters()}
    torch.save({"generator_ema": tensors}, tmp_path / "self_forcing_dmd.pt")
    torch.save(WanVAE(WanVAEConfig.from_dim(8)).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    taehv = TAEHV(TAEHVConfig(decoder_widths=(8, 8, 8, 8), encoder_width=None))
    torch.save(taehv.state_dict(), tmp_path / "taew2_1.pth")
    spiece = torch.frombuffer(bytearray(umt5_piece), dtype=torch.uint8)
    save_file(umt5_weights | {"spiece_model": spiece}, tmp_path / "umt5.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "vae", [["Wan2.1_VAE.pth"], ["taew2_1.pth"], ["taew2_1.pth", "--vae-latents=denormalised"]]
)
def test_self_forcing_files_make_a_video(folder: Path, vae: list[str]) -> None:
    out, report = folder / "out.mp4", folder / "out.json"
    status = main(
        [
            "generate",
            "--prompt=a red ball rolls over the green field",
            f"--out={out}",
            f"--model={folder / 'self_forcing_dmd.pt'}",
            f"--vae={folder / vae[0]}",
            *vae[1:],
            f"--text-encoder={folder / 'umt5.safetensors'}",
            "--frames=13",
            "--size=64x32",
            "--device=cpu",
            f"--json={report}",
        ]
    )
    assert status == 0
    frames, _ = read_video(out)
    assert frames.shape == (13, 32, 64, 3)
    chunks = json.loads(report.read_text())["chunks"]
    assert [c["steps"] for c in chunks] == [4, 4]


def test_files_given_for_the_wrong_role_are_called_by_their_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, vae, text = (
        folder / name for name in ("self_forcing_dmd.pt", "Wan2.1_VAE.pth", "umt5.safetensors")
    )
    for files, what in (
        ((vae, vae, text), "a Wan VAE"),
        ((model, model, text), "a Wan denoiser"),
        ((model, vae, model), "UMT5"),
    ):
        arguments = [
            f"--{k}={v}" for k, v in zip(("model", "vae", "text-encoder"), files, strict=True)
        ]
        assert main(["generate", "--prompt=x", f"--out={folder / 'o.mp4'}", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert what in error
    assert not (folder / "o.mp4").exists()
