"""ComfyUI with our pack in this process, and what the claims about it have in common.

A plugin of the pytest that `test_inside.py` starts. COMFYUI_PATH is ComfyUI's tree, COMFY_BASE a
base folder with the pack and the tiny files of conftest.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import sys
from pathlib import Path

TREE, BASE = os.environ["COMFYUI_PATH"], Path(os.environ["COMFY_BASE"])
sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]
sys.path.insert(0, TREE)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")  # first, or `utils` becomes another module
host_nodes = importlib.import_module("nodes")

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_grad_enabled(False)
torch.set_num_threads(1)
PACK = BASE / "custom_nodes" / "comfyui-light-forcing"
assert asyncio.run(host_nodes.load_custom_node(str(PACK)))
NODES = {k: v for k, v in host_nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("LightForcing")}
PACKAGE = NODES["LightForcingLoadModel"].__module__.rsplit(".nodes", 1)[0]


def ours(name: str):
    return importlib.import_module(f"{PACKAGE}.{name}")


sampling = ours("nodes.adapter.sampler")
options = ours("nodes.adapter.options")
engines = ours("nodes.adapter.engine")
patching = ours("nodes.adapter.patching")
sparse_node = ours("nodes.sparse_attention")
core = ours("lightforcing_core.rollout")
UserError = ours("lightforcing_core.errors").UserError
Interrupted = comfy.model_management.InterruptProcessingException

PROMPT = "a large red circle moves right quickly over a checkered slate background"
FRAMES, LATENT = 9, (8, 16)  # half the size the model is made for: twice as fast to test


def run_node(name: str, **inputs):
    """Outputs of a node, inputs left out at their defaults."""
    cls = NODES[f"LightForcing{name}"]
    defaults = {
        w.id: w.default
        for w in cls.define_schema().inputs
        if hasattr(w, "default") and not w.optional
    }
    return cls.execute(**{**defaults, **inputs}).result


@pytest.fixture(scope="module")
def loaded():
    return run_node("LoadModel")


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def prompt(loaded):
    clip = loaded[1]
    return clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))


def sigmas_of(model, steps: int = 4):
    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )


def sample(
    model, prompt, *, seed=0, frames=FRAMES, watch=None, callback=None, steps=4, start=None, **own
):
    """Normalised latents of the chunk sampler under a guider, as SamplerCustomAdvanced does it."""
    shape = (1, 16, frames, *LATENT)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sampler = sampling.ChunkSampler(sampling.ChunkSettings(**own), watch)
    latent = torch.zeros(shape) if start is None else start
    sigmas = sigmas_of(model, steps)
    out = guider.sample(noise, latent, sampler, sigmas, callback=callback, seed=seed)
    return model.model.process_latent_in(out)


def engine(model, prompt, *, tree=None, seed=0, sparse=None, frames=FRAMES, given=None):
    """The same video from the core's engine alone."""
    tree = model.model.diffusion_model if tree is None else tree
    steps = tuple(1000 * float(s) for s in sigmas_of(model)[:-1])
    settings = core.RolloutSettings(frames, 3, steps, sparse=sparse)
    text = ours("lightforcing_core.wan.forward").prepare_text(tree, prompt[0][0].float())
    noise = ours("lightforcing_core.noise").SeededNoise(seed, (1, 16, *LATENT))
    chunks = core.rollout(tree, settings, text, noise, given_latents=given)
    return torch.cat([chunk.latents for chunk in chunks], dim=2)


def error(a, b) -> float:
    return float((a - b).norm() / b.norm())


def settings_of(**values):
    return sparse_node.read_settings(values)[0]


def with_sparsity(model, enabled=True, **values):
    values = {"target_sparsity": 0.6, "base_sparsity": 0.8, **values}
    choice = options.SparseChoice("7", settings_of(**values), enabled)
    return patching.patch_model(model, choice)


def caches_alive() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "KVCache" for thing in gc.get_objects())
