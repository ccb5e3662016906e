"""A genuine ComfyUI for the tests: its environment, a disposable base folder, one server.

`make test` installs it (.ci/install-comfyui). COMFYUI_PATH names another tree to test against.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.development.comfy_server import ENVIRONMENT, Server, make_base, running_server
from lightforcing.development.comfy_server import comfy_tree as find_comfy_tree
from lightforcing.lightforcing_core.checkpoints.metadata import file_metadata
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE, WanVAEConfig
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel


@pytest.fixture(scope="session")
def comfy_python() -> Path:
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".complete").exists():
        pytest.skip(f"no ComfyUI environment in {ENVIRONMENT}: run make comfyui")
    return python


@pytest.fixture(scope="session")
def comfy_tree(comfy_python: Path) -> Path:
    return find_comfy_tree()


@pytest.fixture(scope="session")
def comfy_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ComfyUI's base folder: the pack under a name with a dash, and tiny files of every kind."""
    base = tmp_path_factory.mktemp("comfy")
    make_base(base)
    models = base / "models"
    torch.manual_seed(0)
    denoiser = _tiny(WanModel(WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2)))
    save_file(denoiser, models / "diffusion_models" / "tiny_wan.safetensors")
    causal = models / "diffusion_models" / "tiny_causal_wan.safetensors"
    save_file(denoiser, causal, metadata=file_metadata({}))
    raw = models / "diffusion_models" / "self_forcing_tiny.pt"
    torch.save({"generator_ema": {f"model.{name}": t for name, t in denoiser.items()}}, raw)
    vae = _tiny(WanVAE(WanVAEConfig.from_dim(8)))
    save_file(vae, models / "vae" / "tiny_vae.safetensors")
    save_file(vae, models / "diffusion_models" / "not_a_denoiser.safetensors")
    (models / "diffusion_models" / "truncated.safetensors").write_bytes(causal.read_bytes()[:5000])
    yield base
    shutil.rmtree(base, ignore_errors=True)


def _tiny(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights that keep numbers in range."""
    weights = {}
    for name, tensor in module.state_dict().items():
        scale = 0.02 if tensor.ndim < 4 else 0.1
        is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        weights[name] = torch.randn_like(tensor) * scale + (1 if is_gain else 0)
    return weights


class CheckedServer(Server):
    """The server, with what tests expect of it."""

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Outputs of a graph by node, which must succeed."""
        entry = self.finished(self.submit(graph))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        return entry["outputs"]

    def error(self, graph: dict[str, Any]) -> dict[str, Any]:
        """The execution error of a graph, which must fail."""
        status = self.finished(self.submit(graph))["status"]
        assert status["status_str"] == "error", status
        return dict(status["messages"])["execution_error"]

    def forget(self) -> None:
        """Have nothing cached, so that the next run computes everything again."""
        self.ask("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.5)


@pytest.fixture(scope="session")
def server(comfy_tree: Path, comfy_base: Path) -> Iterator[CheckedServer]:
    """The one server of a test run."""
    # Tiny networks only lose time to threads that wait for each other on a busy machine.
    one_thread = {"OMP_NUM_THREADS": "1"}
    log = comfy_base / "server.log"
    with running_server(comfy_tree, comfy_base, log=log, environment=one_thread) as running:
        yield CheckedServer(running.process, running.port, running.base, running.log)
