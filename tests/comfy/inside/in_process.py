"""Claims about our nodes in ComfyUI's own process; `test_inside.py` starts it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import weakref
from unittest.mock import MagicMock

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.sd
import pytest
import torch
from host import (
    BASE,
    FRAMES,
    LATENT,
    NODES,
    PROMPT,
    Interrupted,
    UserError,
    caches_alive,
    core,
    engine,
    engines,
    error,
    host_nodes,
    options,
    ours,
    run_node,
    sample,
    sampling,
    settings_of,
    sigmas_of,
    sparse_node,
    with_sparsity,
)

# ---- the sampler and the engine


def test_latents_are_those_of_the_engine(model, prompt):
    """For the same seed: over ComfyUI's own modules, and over the core's with its own loader."""
    load = ours("lightforcing_core.checkpoints.load").load_model
    embedded = ours("lightforcing_core.embedded").EMBEDDED_MODEL
    tree = load(embedded, dtype=torch.float32).tree
    latents = sample(model, prompt)
    assert error(latents, engine(model, prompt)) < 1e-5
    assert error(latents, engine(model, prompt, tree=tree)) < 1e-5
    assert error(latents, engine(model, prompt, seed=1)) > 0.1


def test_sparse_latents_are_those_of_the_engine(model, prompt):
    sparse = with_sparsity(model)
    settings = options.sparse_of(sparse.model_options["transformer_options"]).settings
    latents = sample(sparse, prompt)
    assert error(latents, engine(model, prompt, sparse=settings)) < 1e-4
    assert error(latents, engine(model, prompt)) > 1e-3


def test_two_runs_in_a_row_are_equal(model, prompt):
    for used in (model, with_sparsity(model)):
        assert torch.equal(sample(used, prompt), sample(used, prompt))


def test_any_loader_will_do(prompt):
    """ComfyUI's own Load Diffusion Model gives the same video, under the same shift."""
    path = BASE / "models" / "diffusion_models" / "tiny_causal_wan.safetensors"
    mine = run_node("LoadModel", model_name=path.name)[0]
    stock = comfy.sd.load_diffusion_model(str(path))
    shifted = stock.clone()
    shifted.add_object_patch("model_sampling", mine.get_model_object("model_sampling"))
    assert torch.equal(sample(mine, prompt), sample(shifted, prompt))
    sparse = [sample(with_sparsity(m), prompt) for m in (mine, shifted)]
    assert torch.equal(*sparse)


def test_a_raw_training_file_is_the_same_model(prompt):
    raw = run_node("LoadModel", model_name="self_forcing_tiny.pt")[0]
    clean = run_node("LoadModel", model_name="tiny_wan.safetensors", family="self_forcing")[0]
    assert torch.equal(sample(raw, prompt), sample(clean, prompt))


def test_the_file_says_how_to_sample(prompt):
    """A family's chunk length, window and sink hold unless the sampler's own are set."""
    model = run_node("LoadModel", model_name="tiny_wan.safetensors", family="reward_forcing")[0]
    explicit = {"frames_per_chunk": 3, "window_frames": 9, "sink_frames": 3}
    by_file = sample(model, prompt, frames=15)
    assert torch.equal(by_file, sample(model, prompt, frames=15, **explicit))
    assert not torch.equal(by_file, sample(model, prompt, frames=15, window_frames=-1))
    assert float(model.get_model_object("model_sampling").shift) == 5.0


def test_what_a_user_should_know_of_a_file_is_logged(caplog):
    run_node("LoadModel", model_name="tiny_wan.safetensors")
    assert "which family these weights are of is not known" in caplog.text
    assert "choose: family self_forcing" in caplog.text
    caplog.clear()
    run_node("LoadModel", model_name="tiny_wan.safetensors", family="longlive")
    assert "give the LoRA too (lora)" in caplog.text


def test_lora_loaders_act(model, prompt):
    weight = "blocks.0.ffn.0.weight"
    shape = dict(model.model.diffusion_model.named_parameters())[weight].shape
    lora = {"diffusion_model.blocks.0.ffn.0.diff": 0.05 * torch.randn(shape)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    plain = sample(model, prompt)
    assert error(sample(changed, prompt), plain) > 1e-2
    assert torch.equal(sample(model, prompt), plain)


def test_weights_and_arithmetic_may_be_narrow(model, prompt):
    """Eight-bit weights are widened for computing; computing in bfloat16 stays near float32."""
    wide = sample(model, prompt)
    for name in ("bfloat16", "fp8_e4m3fn"):
        narrow = run_node("LoadModel", weight_dtype=name)[0]
        assert narrow.model.get_dtype() == getattr(torch, name.replace("fp8", "float8"))
        assert error(sample(narrow, prompt), wide) < 0.5
    cast = model.clone()
    cast.set_model_compute_dtype(torch.bfloat16)
    assert 0 < error(sample(cast, prompt), wide) < 0.2


def test_newer_versions_may_load_a_model_again(prompt, monkeypatch):
    """For another GPU, or without dynamic memory: what they call gives the same MODEL."""
    asked = []
    build = comfy.sd.load_diffusion_model_state_dict

    def recorded(*args, disable_dynamic=False, **kwargs):
        asked.append(disable_dynamic)
        return build(*args, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", recorded)
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher, "cached_patcher_init", None, raising=False
    )
    model = run_node("LoadModel")[0]
    load, arguments = model.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert asked == [False, True] and again.model is not model.model
    assert torch.equal(sample(again, prompt, frames=3), sample(model, prompt, frames=3))


# ---- nothing is left behind


def test_bypassing_restores_stock_behaviour(model, prompt):
    """The MODEL before the node is untouched, and the one after it samples as before elsewhere."""

    def euler(used):
        guider = comfy.samplers.CFGGuider(used)
        guider.inner_set_conds({"positive": prompt})
        noise = torch.randn((1, 16, 3, *LATENT), generator=torch.Generator().manual_seed(1))
        sampler = comfy.samplers.ksampler("euler")
        return guider.sample(
            noise, torch.zeros_like(noise), sampler, sigmas_of(used), seed=1, disable_pbar=True
        )

    before, dense = euler(model), sample(model, prompt)
    patched = with_sparsity(model)
    assert not torch.equal(sample(patched, prompt), dense)
    assert torch.equal(euler(patched), before)
    assert torch.equal(euler(model), before) and torch.equal(sample(model, prompt), dense)
    assert "diffusion_model.forward" not in model.object_patches
    assert options.sparse_of(model.model_options["transformer_options"]) is None


def test_switched_off_is_dense_bit_for_bit(model, prompt):
    assert torch.equal(sample(with_sparsity(model, enabled=False), prompt), sample(model, prompt))


def test_nothing_survives_a_run(model, prompt):
    before = repr(model.model_options)
    sample(with_sparsity(model), prompt)
    sample(model, prompt)
    assert caches_alive() == 0
    assert repr(model.model_options) == before


@pytest.mark.parametrize("step", [0, 5])
def test_an_interrupted_run_frees_its_memory(model, prompt, step):
    expected = sample(model, prompt)

    def stop(done, clean, noisy, total):
        if done == step:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(Interrupted):
        sample(model, prompt, callback=stop)
    assert caches_alive() == 0
    assert torch.equal(sample(model, prompt), expected)


def test_a_failed_run_frees_its_memory(model, prompt):
    def fail(done, clean, noisy, total):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        sample(model, prompt, callback=fail)
    assert caches_alive() == 0


# ---- the fast engine


@pytest.fixture
def fused(monkeypatch):
    """Every run gets the engine, which on the CPU takes the reference operations; a list of weak
    references to those engines."""
    made = []

    def engine(patcher, tree, dtype, speed, *, tally, **more):
        engine = engines.HostedEngine(patcher, tree, dtype, tally=tally)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(sampling, "run_engine", engine)
    return made


def alive(references) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_the_engine_makes_the_same_video(model, prompt, loaded, monkeypatch, request):
    """In float32, where it sums in another order only; a prompt that changes and a beginning too.

    Sixteen forwards of four layers amplify a rounding of 6e-8 to about 1e-5.
    """
    clip = loaded[1]
    schedule = run_node("PromptSchedule", clip=clip, prompts=f"0: {PROMPT}\n1: a green sea")[0]
    start = {"samples": model.model.process_latent_out(sample(model, prompt, frames=3))}["samples"]
    cases = (
        (model, prompt, {}),
        (with_sparsity(model), prompt, {}),
        (with_sparsity(model), schedule, {"frames": 12}),
        (with_sparsity(model), prompt, {"window_frames": 6, "sink_frames": 1}),
        (model, prompt, {"initial_latent": start}),
    )
    plain = [sample(used, text, **own) for used, text, own in cases]
    made = request.getfixturevalue("fused")
    for expected, (used, text, own) in zip(plain, cases, strict=True):
        assert 0 < error(sample(used, text, **own), expected) < 1e-4
    assert len(made) == len(cases) and alive(made) == 0 and caches_alive() == 0


def test_an_allocator_that_cannot_record_is_named_once(model, monkeypatch, caplog):
    """ComfyUI takes cudaMallocAsync by itself; Benchmark reports what the tally says."""
    monkeypatch.setattr(engines, "graphs_obstacle", lambda device: "the other allocator")
    monkeypatch.setattr(engines, "_told", set())
    tree = model.model.diffusion_model
    tallies = [engines.ForwardTally("fast") for _ in range(2)]
    with caplog.at_level(logging.INFO, logger="lightforcing"):
        made = [engines.HostedEngine(model, tree, torch.float32, tally=t) for t in tallies]
    assert [tally.reason for tally in tallies] == ["the other allocator"] * 2
    assert not any(engine._graphs for engine in made)
    assert caplog.messages == [
        "forwards are fused but not recorded, which can be slower: the other allocator"
    ]


@pytest.mark.parametrize("modes", [(True, True), (True, False), (False, True)])
def test_an_engine_may_be_used_in_inference_mode_and_outside(model, prompt, modes):
    """Nodes run in inference mode, whose tensors cannot be written outside of it."""
    tree = model.model.diffusion_model
    sparse = options.sparse_of(with_sparsity(model).model_options["transformer_options"]).settings
    steps = tuple(1000 * float(s) for s in sigmas_of(model)[:-1])
    for settings in (sparse, None):
        expected = engine(model, prompt, sparse=settings, frames=6)
        for keep in (False, True):
            fast = ours("lightforcing_core.fast.engine").ForwardEngine(tree, keep=keep)
            for mode in modes:
                with torch.inference_mode(mode):
                    text = ours("lightforcing_core.wan.forward").prepare_text(
                        tree, prompt[0][0].float()
                    )
                    noise = ours("lightforcing_core.noise").SeededNoise(0, (1, 16, *LATENT))
                    run = core.RolloutSettings(6, 3, steps, sparse=settings)
                    chunks = core.rollout(tree, run, text, noise, engine=fast)
                    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
                assert error(latents, expected) < 1e-4
            fast.release()


def test_the_engine_runs_in_inference_mode_like_a_node(model, prompt, fused):
    outside = sample(with_sparsity(model), prompt)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(sample(with_sparsity(model), prompt), outside)
    assert torch.equal(sample(with_sparsity(model), prompt), outside)


def test_sliders_act_under_the_engine(model, prompt, request):
    """Other sparsity, dense, and sparse again, from the next chunk on."""
    answers = {2: settings_of(target_sparsity=0.3, base_sparsity=0.5), 3: None}
    before, after = Watcher(answers), Watcher(answers)
    expected = sample(with_sparsity(model), prompt, frames=15, watch=before)
    request.getfixturevalue("fused")
    assert error(sample(with_sparsity(model), prompt, frames=15, watch=after), expected) < 1e-3
    densities = [[c.statistics.density for c in w.done] for w in (before, after)]
    assert densities[0] == pytest.approx(densities[1]) and densities[1][3] == 1
    assert 0 < densities[1][1] < densities[1][2] < 1


@pytest.mark.parametrize("what", ["interrupt", "error", "memory"])
def test_a_run_that_ends_early_releases_the_engine(model, prompt, fused, what):
    def stop(done, clean, noisy, total):
        if done < 5:
            return
        if what == "interrupt":
            comfy.model_management.interrupt_current_processing()
        else:
            raise {"error": RuntimeError, "memory": torch.OutOfMemoryError}[what]("no more")

    kinds = (Interrupted, RuntimeError, torch.OutOfMemoryError)
    for used in (model, with_sparsity(model)):
        with pytest.raises(kinds):
            sample(used, prompt, callback=stop)
    assert len(fused) == 2 and alive(fused) == 0 and caches_alive() == 0
    assert error(sample(model, prompt), engine(model, prompt)) < 1e-4


def test_weights_that_change_between_runs_are_the_next_runs(model, prompt, request):
    """A LoRA put on, and taken off: no engine outlives its run."""
    weight = "blocks.0.ffn.0.weight"
    shape = dict(model.model.diffusion_model.named_parameters())[weight].shape
    lora = {"diffusion_model.blocks.0.ffn.0.diff": 0.05 * torch.randn(shape)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    expected = [sample(used, prompt) for used in (model, changed, model)]
    request.getfixturevalue("fused")
    for used, plain in zip((model, changed, model), expected, strict=True):
        assert error(sample(used, prompt), plain) < 1e-4
    assert error(expected[1], expected[0]) > 1e-2


@pytest.mark.parametrize("sparse", [False, True])
def test_weights_that_move_in_mid_run(model, prompt, fused, monkeypatch, caplog, sparse):
    """Recordings are forgotten; while weights are away, forwards take their modules' own path.

    With a plan in every pass: one for the whole chunk is chosen anew where the path changes.
    """
    used = with_sparsity(model, plan="every pass") if sparse else model
    expected = sample(used, prompt, frames=12)
    parameters = dict(model.model.diffusion_model.named_parameters())
    forgotten, done = [], []
    forget = engines.HostedEngine.forget_recordings
    monkeypatch.setattr(
        engines.HostedEngine,
        "forget_recordings",
        lambda self: (forgotten.append(len(done)), forget(self))[1],
    )
    away = []
    monkeypatch.setattr(
        engines,
        "weights_obstacles",
        lambda *args: ["1 of 2 weights are not on cuda:0"] if away else [],
    )

    def move(step, clean, noisy, total):
        done.append(step)
        if step in (5, 9):
            away[:] = [True] if step == 5 else []
            for parameter in parameters.values():
                parameter.data = parameter.data.clone()

    caplog.set_level("INFO")
    moved = sample(used, prompt, frames=12, callback=move)
    assert error(moved, expected) < 1e-4 and not torch.equal(moved, expected)
    assert [at for at in forgotten if 0 < at < 16] == [6, 10]  # others: begin and end of the run
    assert "forwards as they stand from here on: 1 of 2 weights are not on cuda:0" in caplog.text


def comfy_wan(operations, dtype):
    """A small model of ComfyUI's own class with its own layers, in a model patcher."""
    wan = importlib.import_module("comfy.ldm.wan.model").WanModel
    torch.manual_seed(0)
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 64}
    tree = wan(model_type="t2v", **sizes, dtype=dtype, device="cpu", operations=operations)
    for parameter in tree.parameters():
        parameter.data.normal_(std=0.02)
    cpu = torch.device("cpu")
    outer = torch.nn.Module()
    outer.diffusion_model = tree
    return comfy.model_patcher.ModelPatcher(outer, load_device=cpu, offload_device=cpu), tree


def test_what_is_in_the_way_of_the_engine():
    """On ComfyUI's own modules, each state that its memory management brings about."""
    ops, bf16 = comfy.ops.disable_weight_init, torch.bfloat16
    patcher, tree = comfy_wan(ops, bf16)
    assert engines.weights_obstacles(patcher, tree, bf16) == []
    assert engines.eight_bit_bytes(tree) > 2 * 6 * 256 * 256 + 2 * 2 * 256 * 512
    on_cpu = engines.engine_obstacles(patcher, tree, bf16, "fp8")
    assert len(on_cpu) == 2 and all("CUDA device" in reason for reason in on_cpu)
    # Eight-bit integers can be multiplied here; only the kernels cannot run.
    assert engines.engine_obstacles(patcher, tree, bf16, "int8") == on_cpu[:1]

    # ComfyUI keeps the patch embedding in float32, which is no obstacle; other types are.
    assert tree.patch_embedding.weight.dtype == torch.float32
    (reason,) = engines.weights_obstacles(patcher, tree, torch.float16)
    assert "are stored in another type than float16" in reason and "blocks.0" in reason

    patcher.load_device = torch.device("cuda:0")
    (reason,) = engines.weights_obstacles(patcher, tree, bf16)
    assert "weights are not on cuda:0 (offloaded)" in reason
    patcher.load_device = torch.device("cpu")

    layer = tree.blocks[1].ffn[0]
    for name in ("weight_function", "bias_function"):
        setattr(layer, name, [lambda weight: weight])
        (reason,) = engines.weights_obstacles(patcher, tree, bf16)
        assert "1 layers have patches (LoRA)" in reason and "blocks.1.ffn.0" in reason
        delattr(layer, name)

    layer.forward = layer.forward
    (reason,) = engines.weights_obstacles(patcher, tree, bf16)
    assert "1 layers were replaced" in reason
    del layer.forward
    handle = layer.register_forward_hook(lambda *_: None)
    (reason,) = engines.weights_obstacles(patcher, tree, bf16)
    assert "1 layers have hooks" in reason
    handle.remove()
    layer.weight = torch.nn.Parameter(
        torch.nn.Buffer(layer.weight.data).as_subclass(type("Packed", (torch.Tensor,), {})), False
    )
    (reason,) = engines.weights_obstacles(patcher, tree, bf16)
    assert "1 layers have weights of a format of their own" in reason

    patcher.is_dynamic = lambda: True
    (reason,) = engines.weights_obstacles(patcher, tree, bf16)
    assert "--disable-dynamic-vram" in reason


def test_weights_that_are_widened_for_computing_go_through_their_modules():
    eight = torch.float8_e4m3fn
    tree = comfy_wan(comfy.ops.manual_cast, torch.float32)[1].to(eight)
    patcher = comfy_wan(comfy.ops.manual_cast, torch.float32)[0]
    (reason,) = engines.weights_obstacles(patcher, tree, torch.bfloat16)
    assert "are stored in another type than bfloat16" in reason


def test_partly_loaded_and_patched_models_as_comfyui_makes_them():
    """Low memory leaves LoRAs to be computed at each call; full loading puts them into weights."""
    patcher, tree = comfy_wan(comfy.ops.disable_weight_init, torch.bfloat16)
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    shape = tree.blocks[0].self_attn.q.weight.shape
    patcher.add_patches({key: ("diff", (torch.ones(shape),))})
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    reasons = engines.weights_obstacles(patcher, tree, torch.bfloat16)
    assert any("1 layers have patches (LoRA)" in reason for reason in reasons)
    patcher.unpatch_model(torch.device("cpu"))
    patcher.patch_model(torch.device("cpu"))
    assert patcher.backup and engines.weights_obstacles(patcher, tree, torch.bfloat16) == []


def test_a_chosen_speed_that_cannot_be_had_says_every_reason(model, prompt, caplog):
    with pytest.raises(UserError, match="the speed 'fast' cannot be used: the kernels need a CUDA"):
        sample(model, prompt, speed="fast")
    with pytest.raises(UserError, match=r"the kernels need .*; eight-bit layers: they need a"):
        sample(model, prompt, speed="fp8")
    with pytest.raises(UserError, match="the speed 'int8' cannot be used: the kernels need a CUDA"):
        sample(model, prompt, speed="int8")
    assert caches_alive() == 0
    speeds = "auto, plain, fast, fp8, int8"
    with pytest.raises(UserError, match=f"no speed 'warp'; choose one of {speeds}"):
        sample(model, prompt, speed="warp")
    plain = sample(model, prompt, speed="plain")
    engines._told.clear()
    caplog.set_level("INFO")
    for _ in range(2):
        assert torch.equal(sample(model, prompt, speed="auto"), plain)
    assert caplog.text.count("not fused: the kernels need a CUDA device") == 1


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
def test_eight_bit_speeds_are_refused_as_the_core_refuses_them(monkeypatch, capability):
    """In its words: by the card, by the numbers computed in, by widths."""
    presets, linears = ours("lightforcing_core.presets"), ours("lightforcing_core.fast.linears")
    cuda, bf16 = torch.device("cuda:0"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for module in (presets, engines):
        monkeypatch.setattr(module, "fused_obstacles", lambda device, dtype: [])
    monkeypatch.setattr(engines, "weights_obstacles", lambda *args: [])
    patcher, tree = comfy_wan(comfy.ops.disable_weight_init, bf16)
    patcher.load_device = cuda
    for speed, least in (("fp8", (8, 9)), ("int8", (8, 0))):
        found = engines.engine_obstacles(patcher, tree, bf16, speed)
        assert found == presets.eight_bit_obstacles(speed, cuda, bf16)
        assert (not found) == (capability >= least)
    if capability >= (8, 0):
        assert engines.engine_obstacles(patcher, tree, torch.float16, "int8") == []
        tree.blocks[0].ffn[0].weight.data = torch.zeros(300, 256, dtype=bf16)
        (reason,) = engines.engine_obstacles(patcher, tree, bf16, "int8")
        assert "eight-bit layers: they need widths that are multiples of 8, not 300" in reason
        assert reason == presets.eight_bit_obstacles("int8", cuda, bf16, (300,))[0]
    assert linears.EIGHT_BIT_SPEEDS.keys() <= set(engines.SPEEDS)


def test_int8_runs_the_blocks_in_integers(model, prompt, monkeypatch):
    """Near the video in full, with copies: the MODEL's own layers stay as they are."""
    expected = sample(with_sparsity(model), prompt, frames=6)
    monkeypatch.setattr(engines, "engine_obstacles", lambda *args: [])
    asked, made = [], []
    monkeypatch.setattr(sampling, "reserve", lambda patcher, needed, also: asked.append(needed))
    run_engine = sampling.run_engine
    monkeypatch.setattr(
        sampling, "run_engine", lambda *args, **kw: made.append(run_engine(*args, **kw)) or made[-1]
    )
    rounded = sample(with_sparsity(model), prompt, frames=6, speed="int8")
    sample(with_sparsity(model), prompt, frames=6, speed="fast")
    numbers = [engine.tree.blocks[0].self_attn.o.weight.dtype for engine in made]
    assert numbers == [torch.int8, torch.float32]
    assert 1e-3 < error(rounded, expected) < 0.2
    tree = model.model.diffusion_model
    assert asked[0] - asked[1] == engines.eight_bit_bytes(tree) > 0
    assert tree.blocks[0].self_attn.o.weight.dtype == torch.float32
    assert made[0]._seen is not made[1]._seen
    made.clear()


def test_auto_does_without_the_engine_rather_than_without_memory(model, monkeypatch, caplog):
    monkeypatch.setattr(engines, "engine_obstacles", lambda *args, **kinds: [])
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1 << 30)
    caplog.set_level("INFO")
    arguments = model, model.model.diffusion_model, torch.float32
    engines._told.clear()
    assert engines.run_engine(*arguments, "auto", needed_bytes=3 << 30) is None
    assert "3.0 GiB are needed with it, 1.0 are free" in caplog.text
    assert engines.run_engine(*arguments, "fast", needed_bytes=3 << 30) is not None
    assert engines.run_engine(*arguments, "plain", needed_bytes=0) is None
    first, second, other = (
        engines.run_engine(*arguments, "auto", needed_bytes=0, kind=kind) for kind in (1, 1, 2)
    )
    assert first._seen is second._seen and first._seen is not other._seen


def test_forwards_that_cannot_be_recorded_run_all_the_same(
    model, prompt, fused, monkeypatch, caplog
):
    """Another node's layer that waits for the device, or memory that is short."""
    expected = sample(with_sparsity(model), prompt)
    attention = ours("lightforcing_core.fast.attention").FastSparseAttention
    tried = []

    def record(self, *arguments):
        tried.append(self)
        raise torch.OutOfMemoryError("operation not permitted when stream is capturing\nmore")

    create = engines.HostedEngine.__init__

    def recording(self, *arguments, **more):
        create(self, *arguments, **more)
        self._graphs = True

    monkeypatch.setattr(attention, "is_recordable", True)
    monkeypatch.setattr(engines.ForwardEngine, "_record", record)
    monkeypatch.setattr(engines.HostedEngine, "__init__", recording)
    watcher = Watcher()
    assert torch.equal(sample(with_sparsity(model), prompt, watch=watcher), expected)
    assert len(tried) == 1
    assert "not recorded as CUDA graphs from here on: operation not permitted" in caplog.text
    assert str(watcher.info.forwards) == (
        "fast, none of 14 replayed from CUDA graphs (recording failed: operation not permitted "
        "when stream is capturing)"
    )
    tried.clear()
    watcher.done.clear()
    assert alive(fused) == 0 and caches_alive() == 0


def test_a_benchmark_says_what_ran_the_forwards(loaded, fused, monkeypatch) -> None:
    """Counted as it ran: three kinds of forwards are recorded in each video, and the first video
    runs each once as it stands. Recordings are faked; what they would replay is run instead."""
    model, size = loaded[0], {"width": 128, "height": 64, "length": 33, "videos": 2}

    def line(used=None) -> str:
        report, _ = run_node("Benchmark", model=used or with_sparsity(model), **size)
        (found,) = (x for x in report.splitlines() if x.startswith("forwards"))
        return found.removeprefix("forwards").strip()

    # Three videos of three chunks with four steps, and two clean passes.
    assert line() == "fast, none of 42 replayed from CUDA graphs"

    seen = set()
    attention = ours("lightforcing_core.fast.attention").FastSparseAttention
    create, forward = engines.HostedEngine.__init__, engines.ForwardEngine._forward
    monkeypatch.setattr(attention, "is_recordable", True)

    def recording(self, *arguments, **more):
        create(self, *arguments, **more)
        self._graphs, self._seen = True, seen

    def record(self, *arguments):
        assert self._forward(*arguments) is not None  # as it is captured
        recording = MagicMock()
        recording.graph.replay = lambda: held.update(velocity=forward(self, *held["now"]))
        recording.velocity.clone = lambda: held["velocity"]
        return recording

    held = {}
    call = engines.ForwardEngine.__call__

    def called(self, *arguments):
        held["now"] = arguments
        return call(self, *arguments)

    monkeypatch.setattr(engines.ForwardEngine, "__call__", called)
    monkeypatch.setattr(engines.ForwardEngine, "_record", record)
    monkeypatch.setattr(engines.HostedEngine, "__init__", recording)
    assert line() == "fast, all replayed from CUDA graphs"
    assert line(model) == "fast, none of 42 replayed from CUDA graphs"  # dense

    monkeypatch.setattr(engines.HostedEngine, "_has_moved", lambda self: True)
    monkeypatch.setattr(engines, "weights_obstacles", lambda *args: ["2 weights are away"])
    assert line() == "plain, not fast (2 weights are away)"


def test_prompts_lie_where_and_as_the_model_takes_them(model, prompt):
    """ComfyUI would send and round them anew in every forward."""
    cast = model.clone()
    cast.set_model_compute_dtype(torch.bfloat16)
    kinds = set()

    def listen(executor, x, t, concat, context, *others, **more):
        kinds.add((context.dtype, context.device))
        return executor(x, t, concat, context, *others, **more)

    cast.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, listen)
    sample(cast, prompt)
    assert kinds == {(torch.bfloat16, torch.device("cpu"))}


def test_newer_versions_keep_models_that_fit_whole(monkeypatch):
    """The engine needs weights that stay; dynamic memory is for models that take more."""
    loading = ours("nodes.adapter.loading")
    management = comfy.model_management
    state = {"a": torch.zeros(50, 10)}
    bf16 = torch.bfloat16
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(management, "get_total_memory", lambda _: 2000)
    monkeypatch.setattr(
        comfy.sd, "load_diffusion_model_state_dict", lambda sd, disable_dynamic=False: None
    )
    assert loading._stays_whole(state, bf16) and not loading._stays_whole(state, torch.float32)
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda sd: None)
    assert not loading._stays_whole(state, bf16)
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cpu"))
    assert not loading._stays_whole(state, bf16)


def test_what_was_compiled_is_forgotten_with_the_model(monkeypatch):
    monkeypatch.setattr(engines, "engine_obstacles", lambda *args, **kinds: [])
    patcher, tree = comfy_wan(comfy.ops.disable_weight_init, torch.bfloat16)
    before = len(engines._seen)
    engines.run_engine(patcher, tree, torch.bfloat16, "fast", needed_bytes=0)
    assert len(engines._seen) == before + 1
    del patcher, tree
    gc.collect()
    assert len(engines._seen) == before


# ---- watching and changing a run


class Watcher:
    """Follows a run, and answers with the settings of each chunk."""

    def __init__(self, answers=None):
        self.answers = answers or {}
        self.asked, self.done, self.left = [], [], False

    @contextlib.contextmanager
    def __call__(self, info):
        self.info = info
        try:
            yield self
        finally:
            self.left = True

    def settings_for_chunk(self, chunk):
        self.asked.append(chunk)
        return self.answers.get(chunk, self.info.choice.settings)

    def chunk_done(self, chunk):
        self.done.append(chunk)


def test_a_watcher_gets_every_chunk_and_changes_the_next(model, prompt):
    other = settings_of(target_sparsity=0.3, base_sparsity=0.5)
    watcher = Watcher({2: other, 3: None})
    latents = sample(with_sparsity(model), prompt, frames=15, watch=watcher)
    assert watcher.asked == [0, 1, 2, 3, 4] and watcher.left
    assert error(torch.cat([c.latents for c in watcher.done], dim=2), latents) < 1e-6
    assert watcher.info.timeline.chunk_frames == (3,) * 5
    sparsity = [chunk.statistics.sparsity for chunk in watcher.done]
    plain = Watcher()
    sample(with_sparsity(model), prompt, frames=15, watch=plain)
    unchanged = [chunk.statistics.sparsity for chunk in plain.done]
    assert sparsity[:2] == unchanged[:2] and sparsity[4] == unchanged[4]
    assert 0 < sparsity[2] < unchanged[2] and sparsity[3] == 0
    for before, after in zip(plain.done[:2], watcher.done[:2], strict=True):
        assert torch.equal(before.latents, after.latents)


def test_sparse_attention_can_be_switched_on_in_mid_run(model, prompt):
    off = with_sparsity(model, enabled=False)
    choice = options.sparse_of(off.model_options["transformer_options"])
    watcher = Watcher({0: None, 1: None, 2: choice.settings})
    sample(off, prompt, watch=watcher)
    assert [chunk.statistics.density == 1 for chunk in watcher.done] == [True, True, False]


def test_a_watcher_is_left_when_a_run_fails(model, prompt):
    watcher = Watcher()

    def fail(*step):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        sample(with_sparsity(model), prompt, watch=watcher, callback=fail)
    assert watcher.left


def test_progress_counts_every_step_of_the_video(model, prompt):
    seen = []
    latents = sample(model, prompt, callback=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == [*range(12), 11]
    assert {step[3] for step in seen} == {12}
    # The last one is the whole video, for SamplerCustomAdvanced's second output.
    assert error(seen[-1][1], latents) < 1e-6


def test_nodes_can_sample_without_a_guider_of_their_own(model, prompt):
    watcher = Watcher()
    latents = sampling.sample_chunks(
        with_sparsity(model),
        prompt,
        sigmas_of(model),
        sampling.ChunkSettings(),
        seed=0,
        latent_image=torch.zeros(1, 16, FRAMES, *LATENT),
        watch=watcher,
    )
    assert torch.equal(model.model.process_latent_in(latents), sample(with_sparsity(model), prompt))
    assert len(watcher.done) == 3


# ---- what the sampler honours


def test_a_prompt_schedule_changes_what_comes_after(loaded, model, prompt):
    """0.6 s are in the third latent frame: the chunk from frame 3 on is the first to change."""
    (schedule,) = run_node(
        "PromptSchedule", clip=loaded[1], prompts=f"0: {PROMPT}\n0.5: a blue square moves left"
    )
    plain, changed = sample(model, prompt), sample(model, schedule)
    assert torch.equal(changed[:, :, :3], plain[:, :, :3])
    assert error(changed[:, :, 3:6], plain[:, :, 3:6]) > 1e-2


def test_a_schedule_of_one_prompt_is_that_prompt(loaded, model, prompt):
    (schedule,) = run_node("PromptSchedule", clip=loaded[1], prompts=f"0: {PROMPT}")
    assert torch.equal(sample(model, schedule), sample(model, prompt))


@pytest.mark.parametrize("text", ["", "1: late", "0: a\n0: b", "2: a\n1: b"])
def test_a_schedule_that_makes_no_sense_is_refused(loaded, text):
    with pytest.raises(UserError, match="prompt schedule"):
        run_node("PromptSchedule", clip=loaded[1], prompts=text)


def test_a_video_begins_with_the_initial_latent(model, prompt):
    """It takes the first frames, unchanged; the rest is what the engine makes of it."""
    start = sample(model, prompt, frames=3)[:, :, :1]
    latent = model.model.process_latent_out(start)
    video = sample(model, prompt, initial_latent=latent)
    assert error(video[:, :, :1], start) < 1e-6
    expected = engine(model, prompt, frames=FRAMES - 1, given=start)
    assert error(video[:, :, 1:], expected) < 1e-4


def test_a_latent_image_may_be_denoised_in_part(model, prompt):
    """With noise levels from below 1 the video starts from the latent image, near it at the end."""
    base = sample(model, prompt, frames=3)
    out = model.model.process_latent_out(base)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    sampler = sampling.ChunkSampler(sampling.ChunkSettings())
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    errors = []
    for first in (0.3, 1.0):
        sigmas = torch.tensor([first, 0.0])
        latents = guider.sample(noise, out, sampler, sigmas, seed=5)
        errors.append(error(model.model.process_latent_in(latents), base))
    assert errors[0] < 0.5 * errors[1]


def test_a_batch_is_its_videos(model, prompt):
    """The first of two is the one that is made alone, and the second another."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    noise = torch.randn((2, 16, FRAMES, *LATENT), generator=torch.Generator().manual_seed(0))
    sampler = sampling.ChunkSampler(sampling.ChunkSettings())
    both = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas_of(model), seed=0)
    both = model.model.process_latent_in(both)
    assert error(both[:1], sample(model, prompt)) < 1e-4
    assert error(both[1:], both[:1]) > 0.1


def test_noise_rules_differ_and_repeat(model, prompt):
    videos = {rule: sample(model, prompt, noise=rule) for rule in sampling.NOISE_RULES}
    for rule, video in videos.items():
        assert torch.equal(video, sample(model, prompt, noise=rule)), rule
        others = [other for name, other in videos.items() if name != rule]
        assert min(error(video, other) for other in others) > 0.1


def test_the_first_chunk_may_have_its_own_noise_levels(model, prompt):
    """Two steps for all but the first chunk, which is that of a four-step video."""
    watcher = Watcher()
    watcher.settings_for_chunk = lambda chunk: None
    first = tuple(sigmas_of(model).tolist())
    video = sample(model, prompt, steps=2, first_chunk_sigmas=first, watch=watcher)
    assert [chunk.statistics.steps for chunk in watcher.done] == [4, 2, 2]
    assert torch.equal(video[:, :, :3], sample(model, prompt)[:, :, :3])


def test_wrappers_of_other_nodes_see_every_forward(model, prompt):
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(args[0].shape[2])
        return executor(*args, **kwargs)

    wrapped = model.clone()
    types = comfy.patcher_extension.WrappersMP
    for kind in (types.APPLY_MODEL, types.DIFFUSION_MODEL):
        wrapped.add_wrapper_with_key(kind, "test", wrapper)
    assert torch.equal(sample(wrapped, prompt), sample(model, prompt))
    assert calls == [3] * 2 * (3 * 4 + 2)


# ---- what it refuses


def refused(message, run):
    with pytest.raises(UserError, match=message):
        run()
    assert caches_alive() == 0


def test_guidance_is_refused_with_the_reason(model, prompt):
    def run(cfg, negative):
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": prompt, "negative": negative})
        guider.set_cfg(cfg)
        shape = (1, 16, 3, *LATENT)
        sampler = sampling.ChunkSampler(sampling.ChunkSettings())
        guider.sample(torch.randn(shape), torch.zeros(shape), sampler, sigmas_of(model), seed=0)

    refused("guidance must be 1 .* got cfg 4", lambda: run(4.0, prompt))
    model_twice = prompt + prompt
    refused("several prompts", lambda: sample(model, model_twice))


@pytest.mark.parametrize(
    ("message", "own"),
    [
        ("does not fit a window", {"window_frames": 2}),
        ("fewer frames", {"initial_latent": torch.zeros(1, 16, FRAMES, *LATENT)}),
        ("given latents must be", {"initial_latent": torch.zeros(1, 16, 1, 8, 8)}),
        ("sink frames must be fewer", {"window_frames": 6, "sink_frames": 6}),
        ("must fall to 0", {"first_chunk_sigmas": (1.0, 0.5)}),
    ],
)
def test_settings_that_cannot_work_are_refused(model, prompt, message, own):
    refused(message, lambda: sample(model, prompt, **own))


def test_a_node_that_skips_forwards_is_refused(model, prompt):
    def skip(executor, x, *args, **kwargs):
        return torch.zeros_like(x)

    skipping = model.clone()
    skipping.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "cache", skip)
    refused("ran 0 times", lambda: sample(skipping, prompt))


def test_other_models_are_refused_by_what_to_load():
    class Other(torch.nn.Module):
        pass

    other = comfy.model_patcher.ModelPatcher(
        torch.nn.Module(), torch.device("cpu"), torch.device("cpu")
    )
    other.model.diffusion_model = Other()
    with pytest.raises(UserError, match=r"Other, not a Wan .*Self Forcing"):
        with_sparsity(other)


def test_wan_models_of_other_kinds_are_refused():
    """Image to video by its own encoder, or other latents: the tree says it before any run."""
    from comfy.ldm.wan.model import WanModel

    sizes = {"dim": 256, "ffn_dim": 64, "num_heads": 2, "num_layers": 1, "device": "meta"}
    operations = comfy.ops.disable_weight_init
    tree = ours("nodes.adapter.wan_tree").wan_tree
    for own, message in (
        ({"model_type": "i2v", "in_dim": 36}, "another kind of Wan model .*img_emb"),
        ({"in_dim": 48, "out_dim": 48}, "48 latent channels .*expected 16"),
    ):
        other = torch.nn.Module()
        other.diffusion_model = WanModel(**sizes, **own, operations=operations)
        with pytest.raises(UserError, match=message):
            tree(other)


@pytest.mark.parametrize(
    ("name", "message"),
    [("not_a_denoiser.safetensors", "not_a_denoiser"), ("truncated.safetensors", "truncated")],
)
def test_files_that_are_no_denoiser_are_refused_by_name(name, message):
    with pytest.raises(UserError, match=message):
        run_node("LoadModel", model_name=name)


def test_a_checkpoint_of_ones_own_says_where_clip_and_vae_come_from():
    _, clip, vae = run_node("LoadModel", model_name="tiny_wan.safetensors")
    with pytest.raises(UserError, match=r"tiny_wan.*Load CLIP"):
        clip.tokenize("a")
    with pytest.raises(UserError, match=r"tiny_wan.*Load VAE"):
        vae.decode(torch.zeros(1, 16, 1, 4, 4))


# ---- VAE


@pytest.fixture(scope="module")
def stock_vae():
    path = BASE / "models" / "vae" / "tiny_vae.safetensors"
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def test_streaming_is_what_cores_vae_does_at_once(stock_vae):
    latents = torch.randn(1, 16, 6, 8, 8)
    (pictures,) = run_node("StreamingVAEDecode", samples={"samples": latents}, vae=stock_vae)
    assert pictures.shape == (21, 64, 64, 3)
    assert torch.allclose(pictures, stock_vae.decode(latents)[0], atol=1e-4)
    (encoded,) = run_node("StreamingVAEEncode", pixels=pictures, vae=stock_vae)
    assert error(encoded["samples"], stock_vae.encode(pictures)) < 1e-3


def test_the_embedded_vae_answers_core_nodes(loaded, model, prompt):
    vae = loaded[2]
    latents = model.model.process_latent_out(sample(model, prompt))
    pictures = host_nodes.VAEDecode().decode(vae, {"samples": latents})[0]
    (streamed,) = run_node("StreamingVAEDecode", samples={"samples": latents}, vae=vae)
    assert pictures.shape == (33, 64, 128, 3) and torch.equal(pictures, streamed)
    tiled = host_nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, 512, 64, 64, 8)[0]
    assert torch.equal(tiled, pictures)
    one = host_nodes.VAEEncode().encode(vae, pictures[:1])[0]["samples"]
    assert one.shape == (1, 16, 1, *LATENT)


def test_the_embedded_vae_gives_back_what_it_was_given(loaded):
    pictures = torch.full((9, 128, 256, 3), 0.5)
    pictures[:, 40:90, 100:160] = torch.tensor([0.9, 0.2, 0.1])
    latent = host_nodes.VAEEncode().encode(loaded[2], pictures)[0]
    assert latent["samples"].shape == (1, 16, 3, 16, 32)
    assert (host_nodes.VAEDecode().decode(loaded[2], latent)[0] - pictures).abs().mean() < 0.05


def test_the_embedded_clip_answers_core_nodes(loaded):
    clip = loaded[1]
    encode = host_nodes.CLIPTextEncode().encode
    red, blue = (encode(clip, f"a {color} circle")[0][0][0] for color in ("red", "blue"))
    assert red.shape == (1, 512, 4096) and not torch.equal(red, blue)
    assert torch.equal(red, encode(clip.clone(), "a red circle")[0][0][0])


def test_a_vae_for_other_latents_is_refused():
    class Empty:
        first_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(UserError, match=r"not for Wan 2.1 .* Load VAE"):
        run_node("StreamingVAEDecode", samples={"samples": torch.zeros(1, 16, 1, 4, 4)}, vae=Empty)


# ---- ComfyUI's own autoregressive sampler


class NativeLoop:
    """The protocol of SamplerARVideo as a sampler: caches in `ar_state`, rewinds, clean passes."""

    def __init__(self, frames_per_chunk: int, given=None) -> None:
        self.frames_per_chunk, self.given = frames_per_chunk, given

    def max_denoise(self, *args):
        return True

    def sample(self, guider, sigmas, extra_args, callback, noise, *args):
        tree = guider.inner_model.diffusion_model
        batch, _, frames, height, width = noise.shape
        tokens = height * width // 4
        head_dim = tree.dim // tree.num_heads
        shape = (batch, frames * tokens, tree.num_heads, head_dim)
        caches = [{"k": torch.zeros(shape), "v": torch.zeros(shape), "end": 0} for _ in tree.blocks]
        transformer = extra_args["model_options"]["transformer_options"]
        out = torch.zeros_like(noise)

        def call(x, sigma, start):
            transformer["ar_state"] = {
                "start_frame": start,
                "kv_caches": caches,
                "crossattn_caches": [{} for _ in tree.blocks],
            }
            return guider(x, torch.full((batch,), float(sigma)), **extra_args)

        first = 0
        if self.given is not None:
            transformer["ar_config"] = {"initial_latent": self.given}
            first = self.given.shape[2]
            out[:, :, :first] = self.given
            call(self.given, 0, 0)
        for chunk, start in enumerate(range(first, frames, self.frames_per_chunk)):
            x = noise[:, :, start : start + self.frames_per_chunk]
            for i, sigma in enumerate(sigmas[:-1]):
                clean = call(x, sigma, start)
                for cache in caches:
                    cache["end"] -= x.shape[2] * tokens
                if sigmas[i + 1] > 0:
                    generator = torch.Generator().manual_seed(extra_args["seed"] + 1000 * chunk + i)
                    fresh = torch.randn(x.shape, generator=generator)
                    x = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * fresh
            out[:, :, start : start + self.frames_per_chunk] = clean
            call(clean, 0, start)
        self.run = caches[0].get("lightforcing_run")
        return out


def native(model, prompt, given=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    noise = torch.randn((1, 16, FRAMES, *LATENT), generator=torch.Generator().manual_seed(0))
    loop = NativeLoop(3, given)
    out = guider.sample(noise, torch.zeros_like(noise), loop, sigmas_of(model), seed=0)
    return model.model.process_latent_in(out), loop


def test_the_native_sampler_gets_the_same_sparse_video(model, prompt):
    """Its protocol, over our cache: the video of our sampler under its noise rule."""
    sparse = with_sparsity(model)
    video, loop = native(sparse, prompt)
    assert error(video, sample(sparse, prompt, noise="native")) < 1e-4
    assert error(video, sample(model, prompt, noise="native")) > 1e-3
    assert loop.run is not None
    del loop
    assert caches_alive() == 0


def test_the_native_sampler_continues_from_a_picture(model, prompt):
    sparse = with_sparsity(model)
    start = sample(model, prompt, frames=3)[:, :, :1]
    video, loop = native(sparse, prompt, given=start)
    latent = model.model.process_latent_out(start)
    expected = sample(sparse, prompt, noise="native", initial_latent=latent)
    assert error(video, expected) < 1e-4
    assert loop.run is not None


def test_the_native_sampler_is_left_alone_when_switched_off(model, prompt):
    _, loop = native(with_sparsity(model, enabled=False), prompt)
    assert loop.run is None


def test_comfyuis_own_sampler_agrees(prompt):
    """SamplerARVideo itself, with the causal class: dense as ours, and sparse as ours."""
    if "ar_video" not in comfy.samplers.KSAMPLER_NAMES and not hasattr(
        comfy.k_diffusion.sampling, "sample_ar_video"
    ):
        pytest.skip("this ComfyUI has no SamplerARVideo (0.21 and newer have)")
    path = BASE / "models" / "diffusion_models" / "tiny_causal_wan.safetensors"
    model = comfy.sd.load_diffusion_model(str(path))
    assert type(model.model.diffusion_model).__name__ == "CausalWanModel"

    def run(used):
        guider = comfy.samplers.CFGGuider(used)
        guider.inner_set_conds({"positive": prompt})
        noise = torch.randn((1, 16, FRAMES, *LATENT), generator=torch.Generator().manual_seed(0))
        sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
        out = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas_of(used), seed=0)
        return used.model.process_latent_in(out)

    dense, sparse = run(model), run(with_sparsity(model))
    assert error(dense, sample(model, prompt, noise="native")) < 1e-3
    assert error(sparse, sample(with_sparsity(model), prompt, noise="native")) < 1e-3
    assert error(sparse, dense) > 1e-4
    assert torch.equal(run(model), dense)


# ---- what a page sends


def test_values_of_a_page_become_settings():
    settings, enabled = sparse_node.read_settings(
        {"target_sparsity": 0.5, "base_sparsity": 0.7, "enabled": False, "model": "ignored"}
    )
    assert (settings.schedule.target, settings.schedule.base, enabled) == (0.5, 0.7, False)
    assert settings == settings_of(target_sparsity=0.5, base_sparsity=0.7)


def test_presets_overrule_the_sliders():
    long = settings_of(preset="long video", target_sparsity=0.1, keep_frames=50)
    assert (long.schedule.target, long.policy.keep_frames) == (0.85, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"target_sparsity": 1.0},
        {"target_sparsity": "0.5"},
        {"keep_frames": 1.5},
        {"keep_frames": True},
        {"enabled": 1},
        {"policy": "magic"},
        {"target_sparsity": float("nan")},
        {"target_sparsity": 0.9, "base_sparsity": 0.5},
        {"keep_frames": 2, "sink_frames": 2, "near_frames": 2},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(UserError):
        sparse_node.read_settings(values)


def test_the_growth_schedule_is_a_picture_and_a_list():
    picture, sparsities = run_node("GrowthSchedule", length=81, width=768, height=512)
    assert picture.shape == (1, 540, 960, 3) and 0 <= picture.min() < picture.max() <= 1
    assert len(sparsities) == 7 and sparsities[0] == 0 and sparsities == sorted(sparsities)


def test_benchmark_says_how_fast_and_where_the_time_goes(loaded) -> None:
    model, _, vae, *_ = loaded
    size = {"width": 128, "height": 64, "length": 33, "videos": 2}
    report, picture = run_node("Benchmark", model=with_sparsity(model), vae=vae, **size)
    facts = ["33 frames of 128x64", "torch " + torch.__version__, "3 of 3 latent frames"]
    facts += [
        "chunk_aware",
        "forwards   plain (the kernels need a CUDA device",
        "2 after one to warm up",
        "ComfyUI    0.",
        "every frame on the host",
    ]
    for fact in facts:
        assert fact in report, fact
    speeds = [float(line.split()[0]) for line in report.splitlines() if "frames per second" in line]
    assert speeds[0] > speeds[1] > 0  # without decoding, with it
    *rows, whole, _ = (line.split() for line in report.splitlines()[-5:])
    assert [row[0] for row in rows] == ["1", "2", "3"] and whole[0] == "all"
    for row in (*rows, whole):
        wall, *parts = map(float, row[1:])
        assert sum(parts) == pytest.approx(wall, abs=0.1) and min(parts) >= 0
    clean = [float(row[6]) for row in rows]
    assert clean[0] == 0 and min(clean[1:]) > 0  # the first chunk has none before it
    assert picture.shape == (1, 560, 1080, 3) and 0 <= picture.min() < picture.max() <= 1
    assert caches_alive() == 0


def test_benchmark_needs_no_vae_and_makes_up_nothing(model, monkeypatch) -> None:
    """Where kernels cannot be told apart the report says so, and draws whole passes."""
    profiling = ours("lightforcing_core.bench.profile")

    def lost(self):
        raise profiling.ProfileError("no marks")

    monkeypatch.setattr(profiling.Timeline, "result", lost)
    report, picture = run_node("Benchmark", model=model, width=128, height=64, length=9, videos=1)
    assert "dense" in report and "not told apart here: no marks" in report
    assert "frames on the host" not in report and "glue" not in report
    assert picture.shape == (1, 560, 1080, 3)


def test_a_missing_clip_or_vae_is_an_error_only_to_who_uses_it() -> None:
    """ComfyUI asks every output whether it can say its size; that must not end in an error."""
    part = ours("nodes.adapter.embedded").OwnPart.vae("sf.pt")
    assert not hasattr(part, "get_ram_usage") and getattr(part, "anything", 7) == 7
    with pytest.raises(UserError, match=r"'sf\.pt' holds no VAE"):
        part.decode(None)


def test_making_room_for_the_cache_keeps_the_vae_that_the_run_needs(monkeypatch) -> None:
    memory = ours("nodes.adapter.memory")
    asked = []
    management = comfy.model_management
    monkeypatch.setattr(management, "get_free_memory", lambda *_: 10)
    monkeypatch.setattr(
        management, "load_models_gpu", lambda models, **kinds: asked.append((models, kinds))
    )

    class Patcher:
        load_device = torch.device("cpu")

        def memory_required(self, shape) -> int:
            assert shape == [1, 16, 3, 8, 16]
            return 100

    model, vae = Patcher(), Patcher()
    assert memory.chunk_bytes(model, (1, 16, 21, 8, 16), 3) == 100
    memory.reserve(model, 1120, [vae])
    assert asked == [([model, vae], {"memory_required": 1120})]


def test_two_nodes_of_equal_inputs_do_not_share_a_result() -> None:
    """A MODEL names the node whose sliders act on it, and so does a SAMPLER."""
    for name in ("SparseAttention", "ChunkSampler"):
        assert NODES[f"LightForcing{name}"].GET_SCHEMA().not_idempotent
