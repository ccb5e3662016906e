"""The measurements run at a small size, refuse wrong results, and say what they measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightforcing.kernels import reference
from lightforcing.lightforcing_core.bench import attention, rollout, vae
from lightforcing.lightforcing_core.sparse_settings import SparseSettings, make_schedule
from lightforcing.lightforcing_core.vae.streaming import VideoVAE

CPU = torch.device("cpu")


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


def test_every_method_makes_whole_videos() -> None:
    settings = SparseSettings(schedule=make_schedule(0.5))
    result = rollout.bench_rollout([rollout.SMALL], CPU, settings, repeats=1)
    whole = {row["method"]: row for row in result["rows"] if row["chunk"] == "all"}
    assert set(whole) == {"plain loop", "dense", "sparse"}
    for row in whole.values():
        assert row["frames_per_second"] == pytest.approx(
            rollout.SMALL.frames / row["seconds"], rel=0.01
        )
        chunks = [r for r in result["rows"] if r["method"] == row["method"]]
        assert len(chunks) == 3 + 1
        assert row["frames_per_second_decoded"] < row["frames_per_second"]


def test_the_plain_loop_computes_what_the_engine_computes() -> None:
    """Or its time would say nothing."""
    case = rollout.SMALL
    tree = rollout.random_denoiser(case, CPU)
    with torch.no_grad():
        text = rollout.prepare_text(tree, torch.randn(1, 4, case.config.text_dim))
    noise = rollout._noise(case, CPU)
    settings = rollout._settings(case, None)
    chunks = [chunk.latents for chunk in rollout.rollout(tree, settings, text, noise)]
    made: list[torch.Tensor] = []
    decoder = VideoVAE(vae.decoder_network(case.decoder).eval())
    loop = rollout.PlainLoop(case, tree, text, CPU, decoder)
    forward = loop._forward

    def listening(latents: torch.Tensor, timestep: float, first: int) -> torch.Tensor:
        if timestep == 0.0:
            made.append(latents)
        return forward(latents, timestep, first)

    loop._forward = listening
    with torch.no_grad():
        loop()
    for ours, plain in zip(chunks, made, strict=False):
        assert torch.allclose(ours, plain, atol=1e-4)
    assert len(made) == 2  # the last chunk has no clean pass


def test_decoders_are_timed_by_chunk(tmp_path: Path) -> None:
    result = vae.bench_vae([vae.SMALL], CPU, small=True, repeats=2)
    assert {row["method"] for row in result["rows"]} == {"wan small", "taehv small"}
    assert all(row["frames"] == 12 for row in result["rows"])
    json.dumps(result)
