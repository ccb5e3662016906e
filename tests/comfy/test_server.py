"""Our nodes in a running ComfyUI server, as a user's graphs meet them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.embedded import EMBEDDED_MODEL
from lightforcing.lightforcing_core.noise import SeededNoise
from lightforcing.lightforcing_core.rollout import RolloutSettings, rollout
from lightforcing.lightforcing_core.text.load import load_text_encoder
from lightforcing.lightforcing_core.vae.latent_stats import normalise_latents
from lightforcing.lightforcing_core.wan.forward import prepare_text

EMBEDDED = "embedded model (256x128, no download)"
PROMPT = "a large red circle moves right quickly over a checkered slate background"
Graph = dict[str, Any]


def node(name: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": name, "inputs": inputs}


def video_graph(
    *, frames: int = 9, seed: int = 0, width: int = 256, height: int = 128, **changes: Any
) -> Graph:
    """Text to latents with the embedded model, in API format; `changes` replaces nodes by id."""
    graph = {
        "model": node(
            "LightForcingLoadModel",
            model_name=EMBEDDED,
            family="from the file",
            weight_dtype="auto",
            lora="none",
            lora_strength=1.0,
        ),
        "prompt": node("CLIPTextEncode", clip=["model", 1], text=PROMPT),
        "noise": node("RandomNoise", noise_seed=seed),
        "guider": node("BasicGuider", model=["model", 0], conditioning=["prompt", 0]),
        "sampler": node(
            "LightForcingChunkSampler",
            frames_per_chunk=0,
            window_frames=0,
            sink_frames=-1,
            noise_rule="seeded",
        ),
        "sigmas": node(
            "BasicScheduler", model=["model", 0], scheduler="simple", steps=4, denoise=1.0
        ),
        "empty": node(
            "EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=1
        ),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "latent": node("SaveLatent", samples=["sample", 0], filename_prefix="latent"),
    }
    return {**graph, **changes}


def sparse_node(**values: Any) -> dict[str, Any]:
    defaults = {
        "enabled": True,
        "preset": "custom",
        "target_sparsity": 0.6,
        "base_sparsity": 0.8,
        "schedule": "chunk_aware",
        "policy": "hierarchical",
        "keep_frames": 6,
        "sink_frames": 1,
        "near_frames": 2,
        "dense_chunks": 0,
        "block_size": "auto",
        "keep_blocks": 0,
        "plan": "once a chunk",
        "dense_first_layers": 0,
        "dense_last_layers": 0,
        "backend": "auto",
        "token_order": "raster",
    }
    return node("LightForcingSparseAttention", model=["model", 0], **{**defaults, **values})


def with_sparsity(graph: Graph, **values: Any) -> Graph:
    guider = node("BasicGuider", model=["sparse", 0], conditioning=["prompt", 0])
    return {**graph, "sparse": sparse_node(**values), "guider": guider}


def latents(server: Any, graph: Graph) -> Tensor:
    """Normalised latents that a graph saves."""
    return normalise_latents(load_file(server.output(server.run(graph), "latent"))["latent_tensor"])


# ---- the pack as the server sees it


def test_every_node_is_there_and_explains_itself(server: Any) -> None:
    _, nodes = server.ask("/object_info")
    ours = {name: info for name, info in nodes.items() if name.startswith("LightForcing")}
    assert {name.removeprefix("LightForcing") for name in ours} >= {
        *("LoadModel", "SparseAttention", "ChunkSampler", "PromptSchedule"),
        *("StreamingVAEDecode", "StreamingVAEEncode", "GrowthSchedule"),
    }
    for name, info in ours.items():
        assert info["category"] == "LightForcing" and info["description"], name
        assert info["python_module"] == "custom_nodes.comfyui-light-forcing", name
        for kind in ("required", "optional"):
            for widget, (_, *details) in info["input"].get(kind, {}).items():
                assert details and details[0].get("tooltip"), f"{name}.{widget} has no tooltip"
    loader = ours["LightForcingLoadModel"]["input"]["required"]
    assert loader["model_name"][1]["default"] == EMBEDDED


def test_the_manual_has_every_node_and_input(server: Any) -> None:
    manual = (Path(__file__).resolve().parents[2] / "docs" / "NODES.md").read_text()
    sections = {text.split("\n", 1)[0]: text for text in manual.split("\n## ")[1:]}
    _, nodes = server.ask("/object_info")
    for name, info in nodes.items():
        if not name.startswith("LightForcing"):
            continue
        section = sections[info["display_name"].removesuffix(" (Light Forcing)")]
        assert f"`{name}`" in section
        widgets = {*info["input"]["required"], *info["input"].get("optional", {})}
        missing = [widget for widget in widgets if f"`{widget}`" not in section]
        assert not missing, f"docs/NODES.md, {name}: {missing}"


def test_nothing_went_wrong_while_loading(server: Any) -> None:
    log = server.log.read_text()
    assert "comfyui-light-forcing" in log
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_files_of_the_models_folder_are_offered(server: Any) -> None:
    _, info = server.ask("/object_info/LightForcingLoadModel")
    kind, *details = info["LightForcingLoadModel"]["input"]["required"]["model_name"]
    names = kind if isinstance(kind, list) else details[0]["options"]
    assert names[0] == EMBEDDED and {"self_forcing_tiny.pt", "tiny_wan.safetensors"} <= {*names}


# ---- graphs that work


def test_a_prompt_becomes_an_mp4(server: Any) -> None:
    graph = video_graph(
        frames=17,
        images=node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        video=node("CreateVideo", images=["images", 0], fps=16.0),
        save=node("SaveVideo", video=["video", 0], filename_prefix="v", format="mp4", codec="h264"),
    )
    path = server.output(server.run(graph), "save")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert (path.suffix, frames, seconds) == (".mp4", 17, pytest.approx(17 / 16, abs=0.1))


def engine(prompt: str, frames: int, seed: int) -> Tensor:
    """The same video without ComfyUI."""
    tree = load_model(EMBEDDED_MODEL, dtype=torch.float32).tree
    embeds = load_text_encoder(None, "cpu", torch.float32).encode(prompt)
    noise = SeededNoise(seed, (1, 16, 16, 32))
    with torch.no_grad():
        chunks = rollout(tree, RolloutSettings(frames), prepare_text(tree, embeds), noise)
        return torch.cat([chunk.latents for chunk in chunks], dim=2)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_latents_are_those_of_the_command(server: Any) -> None:
    """The engine without ComfyUI, its own loader, text encoder and step list: the same video."""
    assert error(latents(server, video_graph(seed=3)), engine(PROMPT, 3, 3)) < 1e-4


def test_sparse_attention_acts_and_its_switch_is_dense(server: Any) -> None:
    graph = video_graph(frames=33)
    dense = latents(server, graph)
    assert error(latents(server, with_sparsity(graph)), dense) > 1e-3
    assert torch.equal(latents(server, with_sparsity(graph, enabled=False)), dense)


def test_inputs_reach_the_attention(server: Any) -> None:
    """Every one of them changes the video, so none is read and dropped."""
    graph = video_graph(frames=33)
    base = {"keep_frames": 4}  # of six past ones in the last chunk
    plain = latents(server, with_sparsity(graph, **base))
    for change in (
        {"preset": "5 seconds"},
        {"target_sparsity": 0.75},
        {"base_sparsity": 0.99},
        {"schedule": "uniform"},
        {"policy": "sliding_window"},
        {"keep_frames": 3},
        {"sink_frames": 0},
        {"near_frames": 0},
        {"dense_chunks": 2},
        {"block_size": "64"},
        {"keep_blocks": 2},
        {"plan": "every pass"},
        {"dense_first_layers": 1},
        {"dense_last_layers": 1},
        {"token_order": "tiles"},
    ):
        assert not torch.equal(latents(server, with_sparsity(graph, **(base | change))), plain), (
            change
        )


def test_two_runs_in_a_row_are_equal(server: Any) -> None:
    first = latents(server, with_sparsity(video_graph()))
    server.forget()
    assert torch.equal(latents(server, with_sparsity(video_graph())), first)


def test_a_picture_becomes_a_video(server: Any) -> None:
    """The first latent frame of a video, decoded, encoded and gone on with."""
    graph = video_graph(
        frames=17,
        first=node("LightForcingStreamingVAEDecode", samples=["still", 0], vae=["model", 2]),
        still=node("LightForcingStreamingVAEEncode", pixels=["picture", 0], vae=["model", 2]),
        picture=node("EmptyImage", width=256, height=128, batch_size=1, color=0x4070A0),
        show=node("PreviewImage", images=["first", 0]),
    )
    graph["sampler"]["inputs"]["initial_latent"] = ["still", 0]
    graph["still_saved"] = node("SaveLatent", samples=["still", 0], filename_prefix="still")
    outputs = server.run(graph)
    video, still = (
        load_file(server.output(outputs, name))["latent_tensor"]
        for name in ("latent", "still_saved")
    )
    assert video.shape == (1, 16, 5, 16, 32) and still.shape == (1, 16, 1, 16, 32)
    assert torch.allclose(video[:, :, :1], still, atol=1e-4)


def test_a_prompt_schedule_runs(server: Any) -> None:
    schedule = node(
        "LightForcingPromptSchedule", clip=["model", 1], prompts=f"0: {PROMPT}\n0.5: a blue square"
    )
    plain = latents(server, video_graph(frames=33))
    changed = latents(server, video_graph(frames=33, prompt=schedule))
    assert error(changed[:, :, :3], plain[:, :, :3]) < 1e-6
    assert error(changed[:, :, 3:], plain[:, :, 3:]) > 1e-2


def test_streaming_and_core_decode_give_the_same_pictures(server: Any) -> None:
    graph = video_graph(
        streamed=node("LightForcingStreamingVAEDecode", samples=["sample", 0], vae=["model", 2]),
        at_once=node("VAEDecode", samples=["sample", 0], vae=["model", 2]),
        save_a=node("SaveImage", images=["streamed", 0], filename_prefix="a"),
        save_b=node("SaveImage", images=["at_once", 0], filename_prefix="b"),
    )
    outputs = server.run(graph)
    files = [
        [server.base / "output" / file["filename"] for file in outputs[name]["images"]]
        for name in ("save_a", "save_b")
    ]
    assert len(files[0]) == 9
    for a, b in zip(*files, strict=True):
        assert _pixels(a) == _pixels(b)


def _pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()


def test_a_vae_of_core_streams(server: Any) -> None:
    graph = {
        "vae": node("VAELoader", vae_name="tiny_vae.safetensors"),
        "picture": node("EmptyImage", width=64, height=64, batch_size=9, color=0x808080),
        "encode": node("LightForcingStreamingVAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "decode": node("LightForcingStreamingVAEDecode", samples=["encode", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="tiny"),
    }
    assert len(server.run(graph)["save"]["images"]) == 9


def test_the_growth_schedule_shows_its_plot(server: Any) -> None:
    plot = node(
        "LightForcingGrowthSchedule",
        length=81,
        width=768,
        height=512,
        frames_per_chunk=3,
        window_frames=-1,
        target_sparsity=0.88,
        base_sparsity=0.98,
        schedule="chunk_aware",
    )
    outputs = server.run({"plot": plot})
    assert (server.base / "temp" / outputs["plot"]["images"][0]["filename"]).is_file()


@pytest.mark.parametrize("loader", ["LightForcingLoadModel", "UNETLoader"])
def test_checkpoints_of_any_loader_run(server: Any, loader: str) -> None:
    """Ours with a raw training file, core's with a clean one; CLIP is the embedded model's."""
    graph = with_sparsity(video_graph(width=64, height=64))
    if loader == "UNETLoader":
        own = node(loader, unet_name="tiny_causal_wan.safetensors", weight_dtype="default")
    else:
        own = node(loader, **{**graph["model"]["inputs"], "model_name": "self_forcing_tiny.pt"})
    graph["own"] = own
    for name in ("sparse", "sigmas"):
        graph[name]["inputs"]["model"] = ["own", 0]
    assert latents(server, graph).isfinite().all()


@pytest.mark.parametrize("loader", ["UNETLoader", "LightForcingLoadModel"])
def test_cores_own_autoregressive_sampler_runs_dense_and_sparse(server: Any, loader: str) -> None:
    _, info = server.ask("/object_info/SamplerARVideo")
    if not info:
        pytest.skip("this ComfyUI has no SamplerARVideo (0.21 and newer have)")
    graph = with_sparsity(video_graph(width=64, height=64, frames=33))
    if loader == "UNETLoader":
        own = node(loader, unet_name="tiny_causal_wan.safetensors", weight_dtype="default")
    else:
        own = node(loader, **{**graph["model"]["inputs"], "model_name": "self_forcing_tiny.pt"})
    graph["own"] = own
    graph["sampler"] = node("SamplerARVideo", num_frame_per_block=3)
    for name in ("sparse", "sigmas"):
        graph[name]["inputs"]["model"] = ["own", 0]
    sparse = latents(server, graph)
    graph["guider"]["inputs"]["model"] = ["own", 0]
    dense = latents(server, graph)
    assert error(sparse[:, :, :3], dense[:, :, :3]) < 1e-4  # the first chunk is dense
    assert error(sparse[:, :, 3:], dense[:, :, 3:]) > 1e-4


# ---- graphs that cannot work


def refused(server: Any, graph: Graph) -> tuple[str, list[dict[str, Any]]]:
    status, answer = server.ask("/prompt", {"prompt": graph})
    assert status == 400
    ((name, found),) = answer["node_errors"].items()
    return name, found["errors"]


def test_a_missing_file_is_refused_before_running(server: Any) -> None:
    graph = video_graph()
    graph["model"]["inputs"]["model_name"] = "gone.safetensors"
    name, errors = refused(server, graph)
    assert name == "model"
    assert "model_name has no 'gone.safetensors'" in errors[0]["details"]


@pytest.mark.parametrize(
    ("at", "widget"),
    [
        ("model", "weight_dtype"),
        ("sparse", "policy"),
        ("sparse", "backend"),
        ("sampler", "noise_rule"),
    ],
)
def test_an_unknown_choice_is_refused_before_running(server: Any, at: str, widget: str) -> None:
    graph = with_sparsity(video_graph())
    graph[at]["inputs"][widget] = "magic"
    name, errors = refused(server, graph)
    assert name == at and f"{widget} has no 'magic'; choose" in errors[0]["details"]


def test_a_slider_out_of_range_is_refused_before_running(server: Any) -> None:
    name, errors = refused(server, with_sparsity(video_graph(), target_sparsity=1.5))
    assert (name, errors[0]["type"]) == ("sparse", "value_bigger_than_max")


def _with_model(name: str) -> Graph:
    graph = video_graph()
    graph["model"]["inputs"]["model_name"] = name
    return graph


def _guidance() -> Graph:
    guider = node(
        "CFGGuider",
        model=["model", 0],
        positive=["prompt", 0],
        negative=["prompt", 0],
        cfg=4.0,
    )
    return video_graph(guider=guider)


@pytest.mark.parametrize(
    ("graph", "at", "message"),
    [
        (_with_model("not_a_denoiser.safetensors"), "model", "not_a_denoiser.safetensors"),
        (_with_model("truncated.safetensors"), "model", "truncated.safetensors"),
        (_with_model("tiny_wan.safetensors"), "prompt", "add a Load CLIP node"),
        (_guidance(), "sample", "guidance must be 1"),
        (video_graph(width=72), "sample", "multiples of 16 pixels"),
        (video_graph(noise=node("DisableNoise")), "sample", "connect a RandomNoise node"),
        (
            with_sparsity(video_graph(), target_sparsity=0.9, base_sparsity=0.5),
            "sparse",
            "base sparsity",
        ),
        (
            with_sparsity(video_graph(), backend="triton"),
            "sample",
            "triton",
        ),
    ],
    ids=["no denoiser", "truncated", "no CLIP", "guidance", "size", "noise", "base", "backend"],
)
def test_bad_input_ends_in_one_clear_message(
    server: Any, graph: Graph, at: str, message: str
) -> None:
    failure = server.error(graph)
    assert failure["node_id"] == at
    assert message in failure["exception_message"]
    assert failure["exception_type"].endswith(("UserError", "MissingPartError"))


def test_the_server_goes_on_after_errors(server: Any) -> None:
    server.error(_guidance())
    assert latents(server, video_graph(seed=8)).shape == (1, 16, 3, 16, 32)


# ---- runs that are stopped, and runs in a row


def test_an_interrupt_stops_between_two_forwards(server: Any) -> None:
    """In mid-run, within a few steps; and the next run is as if it had never been."""
    expected = latents(server, video_graph(seed=21))
    server.forget()
    with server.events() as (client, events):
        prompt_id = server.submit(video_graph(frames=321, seed=1), client)
        steps = 0
        for event, data in events:
            if event == "progress" and data.get("node") == "sample":
                steps = data["value"]
                assert data["max"] == 27 * 4
                if steps == 6:
                    server.ask("/interrupt", {})
            if event == "execution_interrupted":
                assert data["prompt_id"] == prompt_id and data["node_id"] == "sample"
                break
            assert event not in ("execution_error", "execution_success"), data
    assert 6 <= steps < 54  # of 108
    assert torch.equal(latents(server, video_graph(seed=21)), expected)


def test_a_queue_of_three_gives_three_videos(server: Any) -> None:
    ids = [server.submit(video_graph(seed=seed)) for seed in (31, 32, 33)]
    videos = []
    for prompt_id in ids:
        entry = server.finished(prompt_id)
        assert entry["status"]["status_str"] == "success"
        videos.append(load_file(server.output(entry["outputs"], "latent"))["latent_tensor"])
    assert error(videos[0], videos[1]) > 0.1 and error(videos[1], videos[2]) > 0.1


def test_memory_comes_back(server: Any) -> None:
    """Three videos and two failures later the server is not larger by two of their caches."""
    process = psutil.Process(server.process.pid)

    def size_after(graph: Graph) -> int:
        server.finished(server.submit(graph))
        server.forget()
        time.sleep(0.5)
        return process.memory_info().rss

    # 33 frames at 384x192: a cache of 9 x 288 tokens in 6 layers is 30 MiB.
    sizes = []
    for seed in range(4):
        graph = video_graph(frames=33, seed=seed, width=384, height=192)
        graph["sigmas"]["inputs"]["steps"] = 1
        sizes.append(size_after(graph))
    for _ in range(2):
        sizes.append(size_after(_guidance()))
    assert sizes[-1] - sizes[0] < 60 << 20, [size >> 20 for size in sizes]
