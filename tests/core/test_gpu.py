"""The engine on a CUDA device gives what it gives on the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import collections
import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.checkpoints.lora import load_lora
from lightforcing.lightforcing_core.errors import Cancelled, UserError
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.kv_cache import CacheSpec, KVCache
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, cache_spec, rollout
from lightforcing.lightforcing_core.sparse_settings import (
    SparseSettings,
    make_policy,
    make_schedule,
)
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.forward import prepare_text
from lightforcing.lightforcing_core.wan.modules import WanModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def small_tree() -> WanModel:
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, text_len=32)
    return WanModel(config).requires_grad_(False)


def video(tree: WanModel, embeds: Tensor, settings: RolloutSettings, device: str) -> Tensor:
    dtype = tree.patch_embedding.weight.dtype
    with torch.no_grad():
        text = prepare_text(tree, embeds.to(device, dtype))
    noise = SeededNoise(4, (1, 16, 16, 24), device)
    return torch.cat([c.latents for c in rollout(tree, settings, text, noise)], dim=2).cpu()


@pytest.mark.parametrize(
    "settings",
    [RolloutSettings(9, 3), RolloutSettings(12, 3, window_frames=7, sink_frames=1)],
    ids=["whole history", "window with sink"],
)
def test_cuda_equals_cpu(settings: RolloutSettings) -> None:
    tree = small_tree()
    embeds = torch.randn(1, 20, 64)
    expected = video(tree, embeds, settings, "cpu")
    exact = video(tree.cuda(), embeds, settings, "cuda")
    assert float((exact - expected).norm() / expected.norm()) < 1e-4
    rounded = video(tree.bfloat16(), embeds, settings, "cuda")
    # bf16 keeps 8 bits; a chain of 15 forwards with about ten roundings a layer.
    assert float((rounded - expected).norm() / expected.norm()) < 0.05


def test_noise_is_the_same_on_both_devices() -> None:
    shape = (1, 16, 8, 8)
    assert torch.equal(
        SeededNoise(1, shape, "cuda").initial(range(3)).cpu(),
        SeededNoise(1, shape).initial(range(3)),
    )


def test_a_cache_larger_than_the_card_is_refused_before_it_is_taken() -> None:
    before = torch.cuda.memory_allocated()
    spec = CacheSpec(1, 40, 40, 128, frame_tokens=3600, capacity_frames=2000)
    with pytest.raises(UserError, match="GiB free"):
        KVCache(spec, "cuda")
    assert torch.cuda.memory_allocated() == before


def test_a_cancelled_run_gives_its_memory_back() -> None:
    tree = small_tree().cuda()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64, device="cuda"))
    noise = SeededNoise(0, (1, 16, 16, 24), "cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    calls = iter([False] * 7 + [True] * 99)
    chunks = rollout(tree, RolloutSettings(9, 3), text, noise, should_stop=lambda: next(calls))
    with pytest.raises(Cancelled):
        collections.deque(chunks, maxlen=0)  # keeps no chunk, unlike a loop variable
    del chunks
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_the_1_3b_shape_runs_at_832x480_within_the_memory_announced() -> None:
    """Random weights: this is about shapes, addresses and memory, not pictures."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        tree = WanModel(WanConfig()).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        text = prepare_text(tree, torch.randn(1, 40, 4096, dtype=torch.bfloat16))
    settings = RolloutSettings(6, 3)
    spec = cache_spec(
        tree, settings, batch=1, latent_height=60, latent_width=104, dtype=torch.bfloat16
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    noise = SeededNoise(0, (1, 16, 60, 104), "cuda")
    for chunk in rollout(tree, settings, text, noise):
        assert bool(torch.isfinite(chunk.latents).all())
        held = torch.cuda.memory_allocated() - before
        assert held >= spec.total_bytes
    # Beside the cache: activations of 4680 tokens, a few hundred MB.
    assert torch.cuda.max_memory_allocated() - before < spec.total_bytes + (2 << 30)


def test_weights_arrive_on_the_gpu_as_they_do_on_the_cpu(tmp_path: Path) -> None:
    """Plain, eight-bit and with a LoRA: widened and merged on the device, the same numbers."""
    torch.manual_seed(0)
    config = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)
    plain = {k: v.detach() for k, v in WanModel(config).named_parameters()}
    eight_bit = dict(plain)
    name = "blocks.0.ffn.0"
    scale = plain[f"{name}.weight"].abs().amax(1, keepdim=True) / 448
    eight_bit[f"{name}.weight"] = (plain[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    eight_bit[f"{name}.weight_scale"] = scale
    lora_file = tmp_path / "lora.safetensors"
    low = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(low, lora_file)
    for kind, tensors in (("plain", plain), ("fp8", eight_bit)):
        path = tmp_path / f"{kind}.safetensors"
        save_file(tensors, path)
        for dtype in (None, torch.bfloat16):
            here = load_model(path, dtype=dtype).tree.state_dict()
            there = load_model(path, dtype=dtype, device="cuda").tree.state_dict()
            for key, value in here.items():
                assert there[key].is_cuda
                assert torch.equal(there[key].cpu(), value), (kind, dtype, key)
        loras = [(load_lora(lora_file), 0.5)]
        here = load_model(path, dtype=torch.float32, loras=loras).tree.state_dict()
        there = load_model(path, dtype=torch.float32, device="cuda", loras=loras).tree.state_dict()
        for key, value in here.items():
            assert torch.allclose(there[key].cpu(), value, atol=1e-5), (kind, key)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("size", [(64, 96), (60, 104)], ids=["1536 tokens", "1560 tokens"])
def test_sparse_rollouts_agree_with_the_reference(backend: str, size: tuple[int, int]) -> None:
    """bf16, one plan a chunk: where scores tie within rounding, a block may differ."""
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())

    def made(name: str) -> Tensor:
        sparse = SparseSettings(
            schedule=make_schedule(0.7),
            query_block_tokens=128,
            key_block_tokens=64,
            backend=name,
        )
        noise = SeededNoise(4, (1, 16, *size), torch.device("cuda"))
        chunks = rollout(tree, RolloutSettings(9, 3, sparse=sparse), text, noise)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)

    expected = made("reference")
    assert float((made(backend) - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("backend", ["triton", "gluon", "triton int8", "triton engine"])
@pytest.mark.parametrize("size", [(64, 96), (60, 104)], ids=["1536 tokens", "1560 tokens"])
def test_a_rollout_compiles_before_its_first_chunk(
    backend: str, size: tuple[int, int], own_block: bool
) -> None:
    """36 frames: selection tiles of 32 and of 64 slots; gluon cuts tiles of some chunks."""
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    from lightforcing.kernels import (
        gluon_attention,
        triton_attention,
        triton_merge,
        triton_pooling,
        triton_projection,
        triton_quantisation,
        triton_selection,
    )

    backend, _, kind = backend.partition(" ")

    kernels = (
        triton_attention.block_sparse_attention_kernel,
        triton_pooling.pool_blocks_kernel,
        triton_selection.block_scores_kernel,
        triton_selection.select_blocks_kernel,
        triton_merge.merge_parts_kernel,
        triton_projection.project_blocks_kernel,
        triton_quantisation.quantise_blocks_kernel,
        gluon_attention.block_sparse_attention_gluon_kernel,
    )

    def compiled() -> list[int]:
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    for kernel in kernels:
        kernel.device_caches.clear()
    config = WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64, text_len=32)
    tree = WanModel(config).requires_grad_(False).cuda().bfloat16()
    with torch.no_grad():
        text = prepare_text(tree, torch.randn(1, 20, 64).cuda().bfloat16())
    sparse = SparseSettings(
        schedule=make_schedule(0.7),
        policy=make_policy(guarantee_own_block=own_block),
        query_block_tokens=128,
        key_block_tokens=64,
        plan_steps=None,
        qk_precision="int8" if kind == "int8" else "full",
        backend=backend,
    )
    noise = SeededNoise(4, (1, 16, *size), torch.device("cuda"))
    engine = ForwardEngine(tree) if kind == "engine" else None
    chunks = rollout(tree, RolloutSettings(36, 3, sparse=sparse), text, noise, engine=engine)
    next(chunks)  # dense
    ready = compiled()
    assert sum(ready) > 0
    for _ in chunks:
        pass
    assert compiled() == ready
