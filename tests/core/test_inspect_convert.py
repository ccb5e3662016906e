"""`inspect` and `convert`: the truth about a file, and a clean one; bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightforcing.lightforcing_core.checkpoints.inspect import inspect_checkpoint
from lightforcing.lightforcing_core.checkpoints.load import load_model
from lightforcing.lightforcing_core.cli import main
from lightforcing.lightforcing_core.kv_cache import KVCache
from lightforcing.lightforcing_core.layout import FrameSize
from lightforcing.lightforcing_core.memory import GIB
from lightforcing.lightforcing_core.rollout import RolloutSettings, cache_spec
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

CONFIG = WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)
ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "models" / "lightforcing_mini_256x128.safetensors"

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(0)
    return {k: v.detach() for k, v in WanModel(CONFIG).named_parameters()}


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's own checks
        return int(stopped.code or 0)


def report(path: Path, tmp_path: Path, *options: object) -> dict:
    out = tmp_path / "report.json"
    assert run("inspect", path, "--json", out, *options) == 0
    return json.loads(out.read_text())


def test_inspect_tells_what_the_embedded_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = report(EMBEDDED, tmp_path)
    assert said["format"] == "lightforcing"
    config = said["config"]
    assert (config["dim"], config["ffn_dim"], config["num_heads"]) == (256, 640, 2)
    assert (config["num_layers"], config["in_dim"], config["text_dim"]) == (7, 16, 4096)
    assert config["frames_per_chunk"] == 3
    assert said["missing"] == said["unexpected"] == []
    with safe_open(EMBEDDED, framework="pt") as file:
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert said["dtypes"] == {"bfloat16": numbers}
    assert said["parameters"] == numbers
    assert said["settings"]["steps"] == [1000, 937.5, 833.3333, 625]
    assert (said["memory"]["width"], said["memory"]["height"]) == (256, 128)
    assert said["memory"]["fits"]
    text = capsys.readouterr().out
    assert "width 256, 7 layers" in text
    assert "fits in" in text


def test_inspect_reads_no_weights(weights: Weights, tmp_path: Path) -> None:
    """The numbers of the file could be anything: only --header-only's absence looks at them."""
    path = tmp_path / "model.safetensors"
    damaged = {k: torch.full_like(v, float("nan")) for k, v in weights.items()}
    save_file(damaged, path)
    assert run("inspect", path, "--header-only") == 0
    assert run("inspect", path) == 2


def test_inspect_plans_the_memory_that_a_run_takes(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    said = inspect_checkpoint(path, size=FrameSize(64, 32), frames=13, device="cpu")
    tree = load_model(path).tree
    settings = RolloutSettings(num_frames=4)
    spec = cache_spec(tree, settings, batch=1, latent_height=4, latent_width=8, dtype=torch.float32)
    cache = KVCache(spec, "cpu")
    assert said.memory.cache_bytes == spec.total_bytes
    assert said.memory.cache_bytes == sum(
        tensor.nbytes for layers in (cache.keys, cache.values) for tensor in layers
    )
    assert said.memory.weight_bytes == sum(p.nbytes for p in tree.parameters())


def test_inspect_says_when_a_video_does_not_fit(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    said = report(path, tmp_path, "--size=8192x8192", "--frames=4001", "--device=cpu")
    assert not said["memory"]["fits"]
    assert said["memory"]["cache_gib"] * GIB > 1e11
    assert "does NOT fit" in capsys.readouterr().out


def test_inspect_names_what_is_missing_in_json_and_refuses(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "report.json"
    broken = {k: v for k, v in weights.items() if k != "blocks.1.ffn.0.bias"}
    save_file(broken | {"blocks.1.extra": torch.zeros(1)}, path)
    assert run("inspect", path, "--json", out) == 2
    said = json.loads(out.read_text())
    assert said["missing"] == ["blocks.1.ffn.0.bias"]
    assert said["unexpected"] == ["blocks.1.extra"]
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "blocks.1.ffn.0.bias" in output.err


def test_convert_keeps_every_bit_and_the_type(weights: Weights, tmp_path: Path) -> None:
    path, out = tmp_path / "self_forcing_dmd.pt", tmp_path / "out.safetensors"
    half = {f"model.{k}": v.half() for k, v in weights.items()}
    torch.save({"generator_ema": half}, path)
    said = tmp_path / "said.json"
    assert run("convert", path, out, "--json", said) == 0
    result = json.loads(said.read_text())
    assert (result["format"], result["tensors"]) == ("self_forcing", len(weights))
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["config"]) == {"transformer": {"causal_ar": True}}
        facts = json.loads(file.metadata()["lightforcing"])
        for name, tensor in weights.items():
            assert torch.equal(file.get_tensor(name), tensor.half()), name
    assert (facts["num_heads"], facts["frames_per_chunk"], facts["shift"]) == (1, 3, 5.0)
    assert (facts["window_frames"], facts["sink_frames"]) == (-1, 0)
    assert facts["steps"] == [1000.0, 937.5, 2500 / 3, 625.0]
    assert facts["family"] == "self_forcing"


def test_converting_twice_changes_nothing(weights: Weights, tmp_path: Path) -> None:
    path, once, twice = (tmp_path / f"{n}.safetensors" for n in ("longlive", "once", "twice"))
    save_file(weights, path)
    assert run("convert", path, once) == 0
    assert run("convert", once, twice) == 0
    with safe_open(once, framework="pt") as first, safe_open(twice, framework="pt") as second:
        assert first.metadata() == second.metadata()
        assert first.keys() == second.keys()
        for name in weights:
            assert torch.equal(first.get_tensor(name), second.get_tensor(name))


def test_convert_rounds_once_to_another_type(weights: Weights, tmp_path: Path) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(weights, path)
    assert run("convert", path, out, "--dtype=bfloat16") == 0
    with safe_open(out, framework="pt") as file:
        assert torch.equal(
            file.get_tensor("blocks.0.ffn.0.weight"), weights["blocks.0.ffn.0.weight"].bfloat16()
        )


def test_convert_merges_loras(weights: Weights, tmp_path: Path) -> None:
    path, lora, out = (tmp_path / f"{n}.safetensors" for n in ("model", "lora", "out"))
    save_file(weights, path)
    name = "blocks.0.self_attn.q"
    down, up = torch.randn(2, 128), torch.randn(128, 2)
    save_file(
        {
            f"diffusion_model.{name}.lora_A.weight": down,
            f"diffusion_model.{name}.lora_B.weight": up,
        },
        lora,
    )
    assert run("convert", path, out, f"--lora={lora}:0.25", f"--lora={lora}:0.5") == 0
    with safe_open(out, framework="pt") as file:
        made = file.get_tensor(f"{name}.weight")
    wanted = weights[f"{name}.weight"].double() + 0.75 * up.double() @ down.double()
    assert torch.allclose(made.double(), wanted, atol=1e-5)
    assert not torch.allclose(made, weights[f"{name}.weight"], atol=1e-2)


def other_kinds(weights: Weights) -> dict[str, Callable[[Path], None]]:
    def tensors(content: Weights) -> Callable[[Path], None]:
        return lambda path: save_file({k: v.clone() for k, v in content.items()}, path)

    image = weights | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
    wide = weights | {"blocks.0.ffn.0.weight": torch.zeros(64, 256)}
    no_block = {k: v for k, v in weights.items() if not k.startswith("blocks.0.")}
    not_finite = weights | {"head.head.bias": torch.full((64,), float("inf"))}
    return {
        "NaN": tensors(weights | {"head.head.bias": torch.full((64,), float("nan"))}),
        "infinite": tensors(not_finite),
        "image-to-video": tensors(image),
        "another shape": tensors(wide),
        "blocks are missing": tensors(no_block),
        "a Wan VAE": tensors({"decoder.middle.0.residual.0.gamma": torch.zeros(3)}),
        "a TAEHV": tensors({"decoder.22.bias": torch.zeros(3)}),
        "a LoRA": tensors({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}),
        "a T5 text encoder": tensors(
            {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
        ),
        "without its 'patch_embedding": tensors(
            {k: v for k, v in weights.items() if not k.startswith("patch_embedding")}
        ),
    }


@pytest.mark.parametrize(
    "what",
    [
        "NaN",
        "infinite",
        "image-to-video",
        "another shape",
        "blocks are missing",
        "a Wan VAE",
        "a TAEHV",
        "a LoRA",
        "a T5 text encoder",
        "without its 'patch_embedding",
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert", "generate"])
def test_a_file_of_another_kind_ends_in_one_line_and_leaves_nothing(
    what: str,
    command: str,
    weights: Weights,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.safetensors"
    other_kinds(weights)[what](path)
    models = ROOT / "models"
    status = {
        "inspect": lambda: run("inspect", path),
        "convert": lambda: run("convert", path, tmp_path / "out.safetensors"),
        "generate": lambda: run(
            "generate",
            "--prompt=a red circle",
            f"--model={path}",
            f"--vae={models / 'lightforcing_mini_vae.safetensors'}",
            f"--text-encoder={models / 'lightforcing_mini_text.safetensors'}",
            f"--out={tmp_path / 'out.mp4'}",
            "--frames=5",
            "--size=32x32",
        ),
    }[command]()
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert str(path) in error
    assert what in error
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_convert_does_not_overwrite_what_it_reads(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    before = path.read_bytes()
    assert run("convert", path, path) == 2
    assert "overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--family=nonsense", "unknown family"),
        ("--lora=nowhere.safetensors", "nowhere.safetensors"),
        ("--lora=lora.st:abc", "STRENGTH"),
        ("--dtype=int4", "--dtype"),
    ],
)
def test_wrong_options_end_in_one_line(
    option: str,
    message: str,
    weights: Weights,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    assert run("convert", path, tmp_path / "out.safetensors", option) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out.safetensors").exists()


def test_every_suggested_setting_is_shown_and_can_be_overridden(tmp_path: Path) -> None:
    said = report(EMBEDDED, tmp_path)["settings"]
    assert said["shift"] == 5.0
    assert said["context_timestep"] == 0.0
    out, result = tmp_path / "out.mp4", tmp_path / "result.json"
    arguments = ["--prompt=a red circle", f"--out={out}", f"--json={result}", "--frames=9"]
    options = ["--shift=1", "--clean-timestep=20", "--chunk=2", "--window=4", "--sink=1"]
    assert run("generate", *arguments, *options) == 0
    used = json.loads(result.read_text())["settings"]
    assert used["steps"] == pytest.approx([1000, 750, 500, 250])
    assert used["context_timestep"] == 20
    assert (used["frames_per_chunk"], used["window_frames"], used["sink_frames"]) == (2, 4, 1)
    assert run("generate", *arguments, "--shift=0") == 2
    assert run("generate", *arguments, "--clean-timestep=1000") == 2


def test_convert_never_destroys_what_it_reads(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lora, out = (tmp_path / f"{n}.safetensors" for n in ("model", "lora", "out"))
    save_file(weights, path)
    name = "diffusion_model.blocks.0.self_attn.q.lora"
    save_file(
        {f"{name}_A.weight": torch.ones(2, 128), f"{name}_B.weight": torch.ones(128, 2)}, lora
    )
    shards = tmp_path / "model-x"
    shards.mkdir()
    for number, part in enumerate(
        (dict(list(weights.items())[::2]), dict(list(weights.items())[1::2]))
    ):
        save_file(part, shards / f"m-0000{number + 1}-of-00002.safetensors")
    others = tmp_path / "out.safetensors.partial"
    others.write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments in (
        ("convert", path, lora, f"--lora={lora}"),
        ("convert", path, lora, f"--lora={lora}:0.5"),
        ("convert", path, out, f"--lora={lora}", f"--json={lora}"),
        ("convert", shards, shards / "m-00001-of-00002.safetensors"),
        ("convert", path, tmp_path / "out.pt"),
        ("convert", path, "/dev/null"),
    ):
        assert run(*arguments) == 2, arguments
        assert capsys.readouterr().err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert run("convert", path, out) == 0
    assert others.read_text() == "mine"


def test_a_link_stays_a_link(weights: Weights, tmp_path: Path) -> None:
    path, real, link = (tmp_path / f"{n}.safetensors" for n in ("model", "real", "link"))
    save_file(weights, path)
    link.symlink_to(real)
    assert run("convert", path, link) == 0
    assert link.is_symlink()
    assert real.stat().st_size > 1000


def test_convert_names_every_lora_key_without_a_place(weights: Weights, tmp_path: Path) -> None:
    path, lora, out = (tmp_path / f"{n}.safetensors" for n in ("model", "lora", "out"))
    save_file(weights, path)
    name = "diffusion_model.blocks.0.self_attn.q.lora"
    odd = {f"nowhere.{i}.lora_A.weight": torch.ones(2, 2) for i in range(5)}
    save_file(
        {f"{name}_A.weight": torch.ones(2, 128), f"{name}_B.weight": torch.ones(128, 2)} | odd, lora
    )
    said = tmp_path / "said.json"
    assert run("convert", path, out, f"--lora={lora}", f"--json={said}") == 0
    assert set(odd) <= set(json.loads(said.read_text())["unmatched_lora_keys"])


def test_inspect_says_what_comfyui_sees_and_how_large_the_files_are(
    weights: Weights, tmp_path: Path
) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(weights, path)
    assert not report(path, tmp_path)["marked_causal"]
    assert report(path, tmp_path)["file_bytes"] == path.stat().st_size
    assert run("convert", path, out) == 0
    assert report(out, tmp_path)["marked_causal"]
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "vae").mkdir()
    save_file(weights, pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.ones(1000)}, pipeline / "vae" / "vae.safetensors")
    said = report(pipeline, tmp_path)["file_bytes"]
    inner = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    assert said == inner.stat().st_size


def test_inspects_json_says_what_is_wrong(weights: Weights, tmp_path: Path) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "said.json"
    save_file(weights | {"head.head.bias": torch.full((64,), float("nan"))}, path)
    assert run("inspect", path, f"--json={out}") == 2
    assert "NaN" in json.loads(out.read_text())["problem"]
    save_file(weights, path)
    assert report(path, tmp_path)["problem"] is None


@pytest.mark.parametrize(
    "option", ["--frames=0", "--frames=2", "--device=meta", "--device=mps", "--size=7x7"]
)
def test_inspect_plans_only_for_what_can_run(option: str, capsys) -> None:
    assert run("inspect", EMBEDDED, option) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_settings_follow_what_the_user_overrides(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset's sink shrinks into a smaller window; what cannot fit is refused at once."""
    from lightforcing.lightforcing_core.checkpoints.families import family_by_name
    from lightforcing.lightforcing_core.request import GenerateRequest, settings_for

    longlive = family_by_name("longlive").preset

    def settings(**changes):
        request = GenerateRequest(prompt="x", out=tmp_path / "a.mp4", **changes)
        return settings_for(request, longlive)[0]

    assert (settings().window_frames, settings().sink_frames) == (12, 3)
    assert settings(window_frames=4).sink_frames == 1
    assert settings(window_frames=3).sink_frames == 0
    assert settings(window_frames=-1).sink_frames == 0
    two_step = family_by_name("causal_forcing_2step").preset
    plain = settings_for(GenerateRequest("x", tmp_path / "a.mp4"), two_step)[0]
    assert len(plain.first_chunk_steps) == 4
    own = GenerateRequest("x", tmp_path / "a.mp4", steps=(1000.0, 500.0))
    assert settings_for(own, two_step)[0].first_chunk_steps is None
    shifted = GenerateRequest("x", tmp_path / "a.mp4", shift=1.0)
    assert settings_for(shifted, two_step)[0].first_chunk_steps == pytest.approx(
        (1000, 750, 500, 250)
    )


def test_a_window_bounds_the_planned_cache(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)

    def cache(family: str) -> int:
        return inspect_checkpoint(
            path, family=family, size=FrameSize(64, 32), frames=241, device="cpu"
        ).memory.cache_bytes

    assert cache("longlive") * 61 == cache("self_forcing") * 12


def test_inspect_looks_for_nan_in_scales_too(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = tmp_path / "model.safetensors", "blocks.0.ffn.0"
    eight_bit = dict(weights)
    eight_bit[f"{name}.weight"] = torch.ones(64, 128).to(torch.float8_e4m3fn)
    eight_bit[f"{name}.weight_scale"] = torch.full((64, 1), float("nan"))
    save_file(eight_bit, path)
    assert run("inspect", path) == 2
    assert f"'{name}.weight' holds NaN" in capsys.readouterr().err


def test_numbers_too_large_for_a_type_are_told_from_damage(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lora, out = (tmp_path / f"{n}.safetensors" for n in ("model", "lora", "out"))
    name = "blocks.0.self_attn.q"
    save_file(weights | {f"{name}.weight": weights[f"{name}.weight"] + 1e5}, path)
    assert run("convert", path, out, "--dtype=float16") == 2
    assert "too large for float16" in capsys.readouterr().err
    save_file(weights, path)
    low = {f"{name}.lora_A.weight": torch.full((1, 128), 300.0)}
    save_file(low | {f"{name}.lora_B.weight": torch.full((128, 1), 300.0)}, lora)
    assert run("convert", path, out, f"--lora={lora}:100", "--dtype=float16") == 2
    assert "with the LoRA added; lower its strength" in capsys.readouterr().err
    assert run("convert", path, out, f"--lora={lora}", "--dtype=bfloat16") == 0


def test_a_models_own_text_length_and_depth_survive_conversion(
    weights: Weights, tmp_path: Path
) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(weights, path, metadata={"lightforcing": json.dumps({"text_len": 64})})
    assert run("convert", path, out) == 0
    assert load_model(out).config.text_len == 64
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["lightforcing"])["num_layers"] == 2


def test_generate_tells_what_its_user_should_know_and_spares_the_lora(
    weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lora = tmp_path / "rewardforcing.pt", tmp_path / "lora.mp4"
    wide = WanModel(WanConfig(dim=128, ffn_dim=64, num_heads=1, num_layers=1))
    torch.save({f"model.{k}": v.detach() for k, v in wide.named_parameters()}, path)
    models = ROOT / "models"
    arguments = [
        "--prompt=a red circle",
        f"--model={path}",
        f"--vae={models / 'lightforcing_mini_vae.safetensors'}",
        f"--text-encoder={models / 'lightforcing_mini_text.safetensors'}",
        "--frames=9",
        "--size=64x48",
    ]
    assert run("generate", *arguments, f"--out={tmp_path / 'a.mp4'}") == 0
    output = capsys.readouterr()
    assert "not reproduced of Reward Forcing: sink averaged" in output.err
    assert "3 frames a chunk, window 9" in output.out
    lora.write_bytes(b"mine")
    assert run("generate", *arguments, f"--out={lora}", f"--lora={lora}:0.5") == 2
    assert lora.read_bytes() == b"mine"
