"""`lightforcing generate` from files to an mp4, with small random models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lightforcing.lightforcing_core.cli import main
from lightforcing.lightforcing_core.embedded import EMBEDDED_TEXT
from lightforcing.lightforcing_core.vae.taehv import TAEHV, TAEHVConfig
from lightforcing.lightforcing_core.video_io import read_video
from lightforcing.lightforcing_core.wan.config import WanConfig
from lightforcing.lightforcing_core.wan.modules import WanModel

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a tiny random model with its autoencoder and text encoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tree = WanModel(WanConfig(dim=128, ffn_dim=32, num_heads=1, num_layers=1))
    tensors = {f"model.{k}": v.detach() for k, v in tree.named_parameters()}
    torch.save({"generator_ema": tensors}, folder / "model.pt")
    vae = TAEHV(TAEHVConfig(decoder_widths=(8, 8, 8, 8), encoder_width=8))
    facts = {"kind": "taehv", "latents": "normalised", "encode_padding": "front"}
    metadata = {"lightforcing": json.dumps(facts)}
    save_file(vae.state_dict(), folder / "vae.safetensors", metadata=metadata)
    return [
        f"--model={folder / 'model.pt'}",
        f"--vae={folder / 'vae.safetensors'}",
        f"--text-encoder={EMBEDDED_TEXT}",
        "--device=cpu",
    ]


def generate(files: list[str], out: Path, *arguments: str) -> int:
    return main(["generate", f"--prompt={PROMPT}", f"--out={out}", *files, *arguments])


def test_a_prompt_becomes_a_video_and_a_report(files: list[str], tmp_path: Path) -> None:
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    arguments = ["--frames=29", "--size=64x48", f"--json={report}"]
    assert generate(files, out, *arguments) == 0
    frames, fps = read_video(out)
    assert frames.shape == (29, 48, 64, 3)
    assert fps == 16
    result = json.loads(report.read_text())
    assert (result["frames"], result["fps"]) == (29, 16)
    assert result["frames_per_second"] == pytest.approx(29 / result["seconds"])
    assert [c["pixel_frames"] for c in result["chunks"]] == [9, 12, 8]
    for chunk in result["chunks"]:
        assert (chunk["sparsity"], chunk["density"]) == (0, 1)
        assert 0 < chunk["seconds"] <= result["seconds"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4"]


def test_the_seed_decides_the_video(files: list[str], tmp_path: Path) -> None:
    videos = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.mp4"
        assert generate(files, out, "--frames=9", "--size=64x48", f"--seed={seed}") == 0
        videos.append(read_video(out)[0])
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_a_video_may_start_from_a_picture(files: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    Image.new("RGB", (100, 80), (200, 30, 30)).save(picture)
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    arguments = ["--frames=13", "--size=64x48", f"--image={picture}", f"--json={report}"]
    assert generate(files, out, *arguments) == 0
    assert read_video(out)[0].shape[0] == 13
    chunks = json.loads(report.read_text())["chunks"]
    assert [c["first_frame"] for c in chunks] == [1]
    assert chunks[0]["kv_frames"] == 4


def test_every_sampling_option_reaches_the_rollout(files: list[str], tmp_path: Path) -> None:
    report = tmp_path / "a.json"
    options = ["--chunk=1", "--window=3", "--sink=1", "--steps=1000,500", "--first-steps=1000"]
    arguments = ["--frames=17", "--size=64x48", f"--json={report}", "--dense", *options]
    assert generate(files, tmp_path / "a.mp4", *arguments) == 0
    chunks = json.loads(report.read_text())["chunks"]
    assert [c["kv_frames"] for c in chunks] == [1, 2, 3, 3, 3]
    assert [c["steps"] for c in chunks] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames=10"], "4k + 1"),
        (["--size=100x48"], "multiples of 16"),
        (["--size=large"], "WIDTHxHEIGHT"),
        (["--seed=-1"], "seed"),
        (["--window=2"], "does not fit a window"),
        (["--sink=2"], "without a window"),
        (["--steps=10,20"], "step list"),
        (["--chunk=0"], "at least 1"),
        (["--device=nonsense"], "nonsense"),
        (["--image=nowhere.png"], "nowhere.png"),
        (["--vae=nowhere.safetensors"], "nowhere.safetensors"),
        (["--model=nowhere.pt"], "nowhere.pt"),
        (["--frames=1", f"--image={__file__}"], "nothing to generate"),
        (["--image", __file__], "test_generate.py"),
        (["--frames=abc"], "--frames"),
        (["--size="], "WIDTHxHEIGHT"),
        (["--size=²x16"], "WIDTHxHEIGHT"),
        (["--json=nowhere/x.json"], "nowhere"),
        (["--device=meta"], "not supported"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(
    files: list[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status = generate(files, tmp_path / "a.mp4", "--frames=9", "--size=64x48", *arguments)
    except SystemExit as stopped:  # argparse's own checks
        status = stopped.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert message.replace("WIDTHxHEIGHT", "width x height") in error
    assert not list(tmp_path.iterdir())


def test_a_models_window_may_be_combined_with_a_sink_of_ones_own(
    files: list[str], tmp_path: Path
) -> None:
    """What the file says and what the user says are judged together, not one without the other."""
    path = tmp_path / "windowed.safetensors"
    tensors = torch.load(files[0].removeprefix("--model="), weights_only=True)["generator_ema"]
    facts = {"num_heads": 1, "window_frames": 6, "sink_frames": 1, "frames": 21}
    save_file(tensors, path, metadata={"lightforcing": json.dumps(facts)})
    for options, kept in ((["--sink=2"], [3, 6]), (["--window=-1"], [3, 6])):
        report = tmp_path / "a.json"
        arguments = [f"--model={path}", "--size=64x48", f"--json={report}", *options]
        assert generate(files, tmp_path / "a.mp4", *arguments) == 0
        chunks = json.loads(report.read_text())["chunks"]
        assert [c["kv_frames"] for c in chunks] == kept


def test_a_model_of_ones_own_needs_its_companions(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.mp4"
    assert main(["generate", "--prompt=x", f"--out={out}", files[0]]) == 2
    assert "--vae and --text-encoder missing" in capsys.readouterr().err


def test_a_missing_folder_is_noticed_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nowhere" / "a.mp4"
    assert main(["generate", "--prompt=x", f"--out={out}", "--model=missing.pt"]) == 2
    assert "folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_playable_part_that_says_so(
    files: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "a.mp4"
    command = [str(Path(sys.executable).with_name("lightforcing")), "generate"]
    command += [f"--prompt={PROMPT}", f"--out={out}", "--frames=4001", "--size=64x48", *files]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if "chunk 3/" in line:
            break
    process.send_signal(number)
    started = time.monotonic()
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode == 130
    part = tmp_path / "a.interrupted.mp4"
    assert f"in {part}" in rest
    assert [p.name for p in tmp_path.iterdir()] == [part.name]
    assert read_video(part)[0].shape[0] >= 21


def test_weights_that_blow_up_are_an_error_not_a_black_video(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(files[0].removeprefix("--model="))
    content = torch.load(path, weights_only=True)
    content["generator_ema"]["model.head.head.weight"] *= 1e38
    torch.save(content, tmp_path / "hot.pt")
    arguments = ["--frames=9", "--size=64x48", f"--model={tmp_path / 'hot.pt'}"]
    assert generate(files, tmp_path / "a.mp4", *arguments) == 2
    assert "NaN" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hot.pt"]


def test_the_shipped_model_is_the_default(tmp_path: Path) -> None:
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    prompt = "--prompt=a large red circle moving quickly right over a checkered slate background"
    arguments = [prompt, f"--out={out}", f"--json={report}", "--frames=9", "--device=cpu"]
    assert main(["generate", *arguments]) == 0
    frames, _ = read_video(out)
    assert frames.shape == (9, 128, 256, 3)
    red = (frames[..., 0] > 150) & (frames[..., 1] < 90) & (frames[..., 2] < 90)
    across = [np.nonzero(picture)[1].mean() for picture in red]
    # A circle of radius 24 has 1810 pixels, and quickly is 2.5 pixels a frame.
    assert 1200 < red.sum((1, 2)).mean() < 2400
    assert 12 < across[-1] - across[0] < 28


def test_an_output_may_not_overwrite_a_file_of_the_run(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    assert generate(files, out, f"--json={out}") == 2
    model = Path(files[0].removeprefix("--model="))
    assert generate(files, out, f"--json={model}") == 2
    assert model.stat().st_size > 1000
    assert not out.exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("Unable to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "numpy", "cpu"],
)
def test_running_out_of_memory_says_what_to_change(
    files: list[str],
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("lightforcing.lightforcing_core.rollout.wan_forward", fail)
    assert generate(files, tmp_path / "a.mp4", "--frames=9", "--size=64x48") == 2
    assert "smaller --size" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_late_names_the_frames_it_made(
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lightforcing.lightforcing_core.wan.forward import wan_forward

    calls = iter(range(99))

    def breaks_in_the_second_chunk(*arguments: object) -> torch.Tensor:
        velocity = wan_forward(*arguments)
        return velocity * float("nan") if next(calls) > 4 else velocity

    target = "lightforcing.lightforcing_core.rollout.wan_forward"
    monkeypatch.setattr(target, breaks_in_the_second_chunk)
    assert generate(files, tmp_path / "a.mp4", "--frames=33", "--size=64x48") == 2
    error = capsys.readouterr().err
    assert "NaN" in error
    assert f"the first 9 frames are in {tmp_path / 'a.interrupted.mp4'}" in error


def test_a_run_that_fails_waits_for_the_chunks_that_are_being_decoded(
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU, where a chunk is decoded while the next one is made."""
    from lightforcing.lightforcing_core.errors import UserError
    from lightforcing.lightforcing_core.fast.decode import ChunkDecoder
    from lightforcing.lightforcing_core.wan.forward import wan_forward

    calls, take = iter(range(99)), ChunkDecoder.take

    def breaks_in_the_third_chunk(*arguments: object) -> torch.Tensor:
        if next(calls) > 10:
            raise UserError("no more")
        return wan_forward(*arguments)

    monkeypatch.setattr(
        "lightforcing.lightforcing_core.rollout.wan_forward", breaks_in_the_third_chunk
    )
    monkeypatch.setattr(
        ChunkDecoder, "take", lambda self, wait: take(self, wait=True) if wait else ()
    )
    assert generate(files, tmp_path / "a.mp4", "--frames=33", "--size=64x48") == 2
    error = capsys.readouterr().err
    assert "no more" in error
    assert f"the first 21 frames are in {tmp_path / 'a.interrupted.mp4'}" in error


def test_a_reader_that_leaves_does_not_change_the_status(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("lightforcing")), "verify"]
    pipe = f"{' '.join(command)} {tmp_path / 'nowhere'} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", pipe], stderr=subprocess.DEVNULL).returncode == 2


def test_doctor_says_what_is_on_and_why(tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    assert main(["doctor", f"--json={report}"]) == 0
    content = json.loads(report.read_text())
    assert content["versions"]["torch"] == torch.__version__
    for backend in content["backends"]:
        assert backend["name"] and isinstance(backend["available"], bool) and backend["reason"]


@pytest.mark.parametrize("command", [[], ["generate"], ["verify"], ["doctor"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: lightforcing" in capsys.readouterr().out
