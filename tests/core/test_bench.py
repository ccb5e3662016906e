"""The measurements run at a small size, refuse wrong results, and say what they measured on."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lightforcing.kernels import reference
from lightforcing.lightforcing_core.bench import (
    attention,
    kernel_parts,
    profile,
    report,
    rollout,
    vae,
    video,
    waterfall,
)
from lightforcing.lightforcing_core.bench.case import SMALL, ChunkTimes, Run
from lightforcing.lightforcing_core.bench.plain_loop import PlainLoop
from lightforcing.lightforcing_core.bench.profile_plot import plot_profile
from lightforcing.lightforcing_core.bench.video import PassMarks
from lightforcing.lightforcing_core.bench.waterfall_plot import plot_waterfall
from lightforcing.lightforcing_core.cli.main import main
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.rollout import rollout as core_rollout
from lightforcing.lightforcing_core.rollout_settings import RolloutSettings
from lightforcing.lightforcing_core.sparse_settings import SparseSettings, make_schedule
from lightforcing.lightforcing_core.video_io import frames_to_uint8

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def test_attention_rows_hold_dense_sparse_and_selection() -> None:
    result = attention.bench_attention(attention.SMALL, CPU, runs=2)
    kinds = {row["kind"] for row in result["rows"]}
    assert kinds >= {"dense", "attend", "select"}
    assert result["device"] == "cpu"
    assert result["versions"]["torch"] == torch.__version__
    assert result["failed"] == []
    sparse = [row for row in result["rows"] if row["kind"] == "attend"]
    assert {row["chunk"] for row in sparse} == set(attention.SMALL.chunks)
    assert all(0 < row["density"] < 0.5 and row["rel_err"] < 1e-4 for row in sparse)


def test_a_wrong_method_has_no_time_but_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.block_sparse_attention

    def wrong(q, *rest, **grids):
        out = right(q, *rest, **grids)
        return out if q.dtype == torch.float64 else out * 1.01

    monkeypatch.setattr(reference, "block_sparse_attention", wrong)
    result = attention.bench_attention(attention.SMALL, CPU, runs=1)
    assert len(result["failed"]) == len(attention.SMALL.chunks)
    assert all("ms" not in row for row in result["rows"] if row["kind"] == "attend")


def test_the_restated_rule_selects_what_ours_selects() -> None:
    """Both stages, in float32: rounding means to 16 bits, as published, changes some sets."""
    case = attention.SMALL
    x = attention._inputs(case, 4, CPU)
    pooled = (
        reference.pool_blocks(x.q, case.query_grid, padded=False),
        reference.pool_blocks(x.k, case.key_grid, padded=True),
    )
    ours, counts = reference.select_blocks(
        *pooled,
        blocks_per_segment=case.key_grid.blocks_per_segment,
        roles=x.roles,
        keep_candidates=x.rule.keep_candidates,
        top_k=x.rule.top_k,
        own_blocks=None,
    )
    assert bool((counts == x.rule.top_k).all())
    published = attention.released_selection(case, x).sort(-1).values
    assert torch.equal(ours.long(), published)


SPARSE = SparseSettings(schedule=make_schedule(0.5))


def test_every_method_makes_whole_videos() -> None:
    result = rollout.bench_rollout([SMALL], CPU, SPARSE, repeats=1)
    whole = {row["method"]: row for row in result["rows"] if row["chunk"] == "all"}
    assert set(whole) == {"plain loop", "dense", "sparse"}
    assert set(result["left_out"]) == set(rollout.METHODS) - set(whole)
    for row in whole.values():
        assert row["frames_per_second"] == pytest.approx(SMALL.frames / row["seconds"], rel=0.01)
        chunks = [r for r in result["rows"] if r["method"] == row["method"]]
        assert len(chunks) == 3 + 1
        assert row["frames_per_second_decoded"] < row["frames_per_second"]
        assert 0 < row["first_frames_ms"] < 1e3 * row["seconds_decoded"]
        assert "taehv small" in row["includes"] and "2 clean passes" in row["includes"]
        assert row["peak_allocated_gib"] is None  # nobody counts it on the CPU
    assert len(rollout.rollout_table(result["rows"])) == 1 + 3 + 1
    json.dumps(result)


def test_density_is_that_of_the_schedule() -> None:
    rows = rollout.bench_rollout([SMALL], CPU, SPARSE, 1, ["sparse"])["rows"]
    assert rows[0]["density"] == 1.0 and rows[0]["sparsity"] == 0.0
    assert all(0 < row["density"] < 0.6 for row in rows[1:3])


def test_without_a_decoder_nothing_is_said_about_frames() -> None:
    case = replace(SMALL, decoder="none", window_frames=6, sink_frames=3)
    result = rollout.bench_rollout([case], CPU, SPARSE, repeats=1)
    assert "plain loop" in result["left_out"]  # it has no window
    for row in result["rows"]:
        assert row["decode_ms"] is None and "first_frames_ms" not in row
    assert "frames_per_second_decoded" not in result["rows"][-1]
    assert "decoded" not in result["rows"][-1]["includes"]


def test_the_last_chunk_over_the_second_counts_clean_passes() -> None:
    chunks = [ChunkTimes(9.0, 0.0, None), ChunkTimes(1.0, 1.0, None), ChunkTimes(2.0, 1.0, None)]
    assert Run(chunks, 14.0, None).growth == pytest.approx(1.5)
    assert Run(chunks[:2], 11.0, None).growth is None


@pytest.mark.parametrize(
    ("methods", "case", "message"),
    [
        (["fast"], SMALL, "no method 'fast'"),
        (["sparse fp8"], SMALL, "choose among plain loop, dense, sparse"),
        (["plain loop"], replace(SMALL, window_frames=6), "whole history"),
    ],
)
def test_a_method_that_cannot_run_says_why(methods, case, message) -> None:
    with pytest.raises(UserError, match=message):
        rollout.bench_rollout([case], CPU, SPARSE, 1, methods)


def test_decoding_in_line_makes_the_same_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the waterfall's last step would compare two different things."""
    seen: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for beside in seen:
        right = frames_to_uint8

        def noted(frames: torch.Tensor, to=seen[beside], right=right) -> np.ndarray:
            to.append(right(frames))
            return to[-1]

        monkeypatch.setattr("lightforcing.lightforcing_core.fast.decode.frames_to_uint8", noted)
        monkeypatch.setattr(f"{video.__name__}.frames_to_uint8", noted)
        run = video.Video(SMALL, video.Parts(beside=beside), SPARSE, CPU)()
        assert len(run.chunks) == 3 and run.first_frames < run.seconds
    assert len(seen[True]) == 3
    for ours, other in zip(*seen.values(), strict=True):
        assert np.array_equal(ours, other)


def test_the_plain_loop_computes_what_the_engine_computes() -> None:
    """Or its time would say nothing."""
    loop = PlainLoop(SMALL, CPU)
    made: list[torch.Tensor] = []
    forward = loop._forward

    def listening(latents: torch.Tensor, timestep: float, first: int) -> torch.Tensor:
        if timestep == 0.0:
            made.append(latents)
        return forward(latents, timestep, first)

    loop._forward = listening
    with torch.no_grad():
        loop()
    noise = SMALL.noise(CPU)
    chunks = core_rollout(loop.tree, SMALL.settings(None), loop.text, noise)
    for ours, plain in zip([chunk.latents for chunk in chunks], made, strict=False):
        assert torch.allclose(ours, plain, atol=1e-4)
    assert len(made) == 2  # the last chunk has no clean pass


# ---- waterfall


def test_a_waterfall_adds_and_switches_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that can do all, with times that are known."""
    saves = {"sparse": 4.0, "fused": 2.0, "graphs": 1.5, "eight_bit": 1.25, "beside": 1.1}

    class Made:
        def __init__(self, case, parts, sparse, device) -> None:
            self.seconds = 100.0
            for part, factor in saves.items():
                self.seconds /= factor if getattr(parts, part) else 1.0

        def __call__(self) -> Run:
            return Run([], self.seconds, None)

        def release(self) -> None: ...

    monkeypatch.setattr(waterfall, "Video", Made)
    monkeypatch.setattr(waterfall, "_left_out", lambda case, device: {})
    rows = waterfall.bench_waterfall(SMALL, CPU, SPARSE, 1)["rows"]
    assert [row["step"] for row in rows] == ["dense", *waterfall.STEPS.values()]
    assert rows[0]["seconds"] == 100.0 and "gain_added" not in rows[0]
    for row, factor in zip(rows[1:], saves.values(), strict=True):
        assert row["gain_added"] == pytest.approx(factor, rel=1e-3)
        # Graphs cannot stay without fused forwards: what is switched off is named.
        both = row["step"] == waterfall.STEPS["fused"]
        assert row["off_too"] == ("graphs" if both else "")
        assert row["gain_off"] == pytest.approx(factor * (saves["graphs"] if both else 1), rel=1e-3)
    assert rows[-1]["frames_per_second"] == pytest.approx(33 / (100 / 16.5), rel=1e-3)


def test_a_waterfall_leaves_out_what_a_device_cannot_do(tmp_path: Path) -> None:
    result = waterfall.bench_waterfall(SMALL, CPU, SPARSE, 1)
    assert [row["step"] for row in result["rows"]] == ["dense", "+ sparse attention"]
    assert set(result["left_out"]) == {"fused", "graphs", "eight_bit", "beside"}
    pytest.importorskip("matplotlib")
    path = tmp_path / "waterfall.png"
    plot_waterfall(result, path)
    assert Image.open(path).size == (1920, 1080)


# ---- profile


def _regions(*marks: tuple[str, int, float]) -> list[profile.Region]:
    return [profile.Region(*mark) for mark in marks]


def test_every_moment_belongs_to_one_part() -> None:
    """Forwards before decoding before copies; what decodes behind a forward is hidden."""
    regions = _regions(("denoise", 0, 1.0), ("clean", 1, 5.0), ("denoise", 1, 6.0), ("end", 1, 9.0))
    events = [
        profile.Event("block_scores_kernel", 1.0, 1.5, 7),
        profile.Event("nvjet_tst_128x256", 2.0, 4.0, 7),
        profile.Event("conv_fprop", 3.0, 4.5, 9),  # a second of it behind the product
        profile.Event("Memcpy DtoH", 4.25, 4.75, 9),
        profile.Event("nvjet_tst_128x256", 5.0, 6.0, 7),  # in the clean pass
        profile.Event("cudnn_sdpa_flash_fprop", 7.0, 8.0, 7),
        profile.Event("elementwise_kernel", 8.0, 8.5, 7),
        profile.Event("elementwise_kernel", 9.5, 9.9, 7),  # after the end
    ]
    found = profile.split_by_part(events, regions, 7, is_cuda=True)
    first, second = found.chunks
    assert first.parts == {
        "select": 0.5, "attend": 0.0, "linears": 2.0, "glue": 0.0, "clean pass": 0.0,
        "decode": 0.5, "copy": 0.25, "idle": 0.75,
    }  # fmt: skip
    assert first.decode_beside == 1.5
    assert second.parts["clean pass"] == 1.0 and second.parts["linears"] == 0.0
    assert second.parts["attend"] == 1.0 and second.parts["glue"] == 0.5
    assert [sum(chunk.parts.values()) for chunk in found.chunks] == [4.0, 4.0]
    assert found.kernels[0].name == "nvjet_tst_128x256" and found.kernels[0].launches == 1


@pytest.mark.parametrize("method", ["dense", "sparse"])
def test_parts_sum_to_the_time_of_a_chunk(method: str) -> None:
    started = time.perf_counter()
    result = profile.profile_rollout(SMALL, CPU, SPARSE, method, repeats=1)
    elapsed = 1e3 * (time.perf_counter() - started)
    *chunks, whole = result["rows"]
    keys = [f"{part.replace(' ', '_')}_ms" for part in kernel_parts.PARTS]
    for row in result["rows"]:
        assert min(row[key] for key in keys) >= 0
        assert sum(row[key] for key in keys) == pytest.approx(row["wall_ms"], abs=0.01)
    assert [row["chunk"] for row in chunks] == [0, 1, 2]
    assert sum(row["wall_ms"] for row in chunks) == pytest.approx(whole["wall_ms"], abs=0.01)
    assert whole["wall_ms"] + whole["unprofiled_ms"] < elapsed
    assert chunks[0]["clean_pass_ms"] == 0 < min(row["clean_pass_ms"] for row in chunks[1:])
    for part in ("attend", "linears", "glue", "decode"):
        assert all(row[f"{part}_ms"] > 0 for row in chunks), part
    assert (whole["select_ms"] > 0) == (method == "sparse")
    assert profile.profile_table(result["rows"])[-1].startswith("the same video unprofiled")
    json.dumps(result)


def _gpu_timeline(*kernels: tuple[str, float, float, int]) -> profile.Timeline:
    """As a GPU would have left it: two marks were launched, kernels in microseconds."""

    def recorded(name: str, start: float, end: float, stream: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=end),
            device_type=torch.autograd.DeviceType.CUDA,
            device_resource_id=stream,
        )

    timeline = profile.Timeline(CPU)
    timeline._is_cuda = True
    timeline._labels = [("denoise", 0), ("end", 0)]
    timeline._profiler = SimpleNamespace(events=lambda: [recorded(*kernel) for kernel in kernels])
    return timeline


def test_marks_on_a_gpu_are_kernels_in_the_stream() -> None:
    mark = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    kernels = [(mark, 9.0, 10.0, 7), ("nvjet", 11.0, 14.0, 7), ("conv_fprop", 12.0, 15.0, 20)]
    waits = [("Stream Wait Event", 9.0, 19.0, 7)]
    found = _gpu_timeline((mark, 19.0, 20.0, 7), *kernels, *waits).result()
    assert [kernel.name for kernel in found.kernels] == ["nvjet", "conv_fprop"]
    parts = {part: round(1e6 * spent, 6) for part, spent in found.chunks[0].parts.items() if spent}
    assert parts == {"linears": 3.0, "decode": 1.0, "idle": 6.0}
    with pytest.raises(profile.ProfileError, match="kept 1 of 2 marks"):
        _gpu_timeline(*kernels).result()


def test_linears_are_counted_once() -> None:
    """Operators call others: only the outermost counts, or a product would be two."""
    event = profile.Event
    nested = [event("aten::addmm", 1.5, 2.5, 0), event("aten::linear", 1.0, 3.0, 0)]
    assert [e.name for e in profile.outermost(nested)] == ["aten::linear"]


OURS = [
    name
    for file in sorted((ROOT / "kernels").glob("*.py"))
    for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("name", OURS)
def test_every_kernel_of_ours_has_its_part(name: str) -> None:
    """By a rule of its own or as glue, never as a product of matrices."""
    part = kernel_parts.part_of(name, is_cuda=True)
    wanted = "glue"
    if "select" in name or "scores" in name:
        wanted = "select"
    if "attend" in name or "attention" in name or "merge_parts" in name:
        wanted = "attend"
    assert part == wanted


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_qqtst_128x256_128x6_1x2_h_bz_coopA_scale_TNN", "linears"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linears"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal>", "linears"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "linears"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attend"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attend"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attend"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("Memset (Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4>", "glue"),
    ],
)
def test_library_kernels_have_their_part(name: str, part: str) -> None:
    assert kernel_parts.part_of(name, is_cuda=True) == part


def test_a_profile_is_drawn(tmp_path: Path) -> None:
    regions = _regions(("denoise", 0, 0.0), ("denoise", 1, 1.0), ("end", 1, 3.0))
    events = [profile.Event("nvjet", 0.1, 0.9, 7), profile.Event("nvjet", 1.0, 3.0, 7)]
    rows = profile.split_by_part(events, regions, 7, is_cuda=True).rows()
    path = tmp_path / "profile.png"
    plot_profile(rows, "Time", "of a test", path)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (560, 1080, 3)
    red = (np.abs(picture.astype(int) - (214, 93, 59)).max(-1) < 4).sum(0)
    assert red[200] and red[600] / red[200] == pytest.approx(2.5, rel=0.05)  # 2.0 s over 0.8 s
    with pytest.raises(UserError, match="no picture format"):
        plot_profile(rows, "", "", tmp_path / "profile.csv")


# ---- the page for an issue


def test_the_page_says_what_its_frames_per_second_include() -> None:
    chunks = [ChunkTimes(0.25, 0.0, 0.1), ChunkTimes(0.2, 0.05, 0.1, 0.8, 0.2)]
    runs = [Run(chunks, seconds, 0.4) for seconds in (1.0, 0.8, 1.25)]
    found = report.Benchmark(CPU, 20, runs, report.whole_passes(runs), "no marks")
    text = report.report_text(found)
    assert "40.0 frames per second (40.0 to 40.0): denoising and clean passes alone" in text
    assert "20.0 frames per second (16.0 to 25.0): also decoding, every frame on the host" in text
    assert "400 ms until the first chunk's frames lie on the host" in text
    assert "not told apart here: no marks" in text and "GiB" not in text
    assert found.rows[-1] == {
        "chunk": "all", "wall_ms": 700.0, "denoise_ms": 450.0, "clean_pass_ms": 50.0,
        "decode_ms": 200.0,
    }  # fmt: skip


def test_a_page_without_a_decoder_says_nothing_about_frames_on_the_host() -> None:
    runs = [Run([ChunkTimes(0.5, 0.0, None)], 0.5, None)]
    text = report.report_text(report.Benchmark(CPU, 9, runs, report.whole_passes(runs), "x"))
    assert "18.0 frames per second" in text and "host" not in text and "decode" not in text


# ---- the command


def test_bench_rollout_profiles_and_refuses(tmp_path: Path, capsys) -> None:
    out, table, picture = tmp_path / "p.json", tmp_path / "p.csv", tmp_path / "p.png"
    command = ["bench", "rollout", "--profile", "--runs", "1", "--device", "cpu"]
    files = ["--json", str(out), "--csv", str(table), "--plot", str(picture)]
    assert main([*command, *files]) == 0
    result = json.loads(out.read_text())
    assert {"rows", "device", "versions"} <= result.keys() and result["method"] == "sparse"
    assert len(table.read_text().splitlines()) == 1 + len(result["rows"])
    assert picture.exists() and "clean pass" in capsys.readouterr().out
    for wrong, says in (
        (["bench", "vae", "--profile"], "--profile is an option of bench rollout, not of vae"),
        (["bench", "rollout", "--plot", "x.png"], "add --waterfall or --profile"),
        (["bench", "rollout", "--profile", "--methods", "plain loop"], "takes one method"),
        (["bench", "rollout", "--sink", "3"], "without a window"),
        (["bench", "rollout", "--methods", "dense,quick"], "no method 'quick'"),
    ):
        assert main([*wrong, "--device", "cpu"]) == 2
        assert says in capsys.readouterr().err


# ---- decoders


def test_decoders_are_timed_by_chunk(tmp_path: Path) -> None:
    result = vae.bench_vae([vae.SMALL], CPU, small=True, repeats=2)
    assert {row["method"] for row in result["rows"]} == {"wan small", "taehv small"}
    assert all(row["frames"] == 12 for row in result["rows"])
    json.dumps(result)


@pytest.mark.parametrize("is_early", [False, True], ids=["clean pass after", "clean pass before"])
def test_a_clean_pass_is_told_apart_whenever_it_runs(is_early: bool) -> None:
    """On CUDA it is under way before its chunk is handed out, elsewhere it comes after."""
    marked: list[tuple[str, int]] = []
    settings = RolloutSettings(9, steps=(1000.0, 500.0), first_chunk_steps=(1000.0,))
    marks = PassMarks(lambda label, chunk: marked.append((label, chunk)), settings)
    passes = []
    for chunk, steps in enumerate((1, 2, 2)):
        kinds = ["step"] * steps + ["clean", "out"] * (chunk < 2) + ["out"] * (chunk == 2)
        if not is_early and chunk < 2:
            kinds[-2:] = ["out", "clean"]
        for kind in kinds:
            if kind == "out":
                marks.before_decoding()
                assert marked[-1] == ("decode", chunk)
                marks.chunk_done()
            else:
                marks.before_pass()
                passes.append((kind, *marked[-1]))
    assert passes == [
        ("step", "denoise", 0), ("clean", "clean", 1),
        ("step", "denoise", 1), ("step", "denoise", 1), ("clean", "clean", 2),
        ("step", "denoise", 2), ("step", "denoise", 2),
    ]  # fmt: skip
