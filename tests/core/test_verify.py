"""`lightforcing verify` accepts the golden files and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightforcing.lightforcing_core import verify
from lightforcing.lightforcing_core.cli import main
from lightforcing.lightforcing_core.errors import UserError
from lightforcing.lightforcing_core.fast.engine import ForwardEngine
from lightforcing.lightforcing_core.rollout import Chunk, rollout
from lightforcing.lightforcing_core.verify import verify_files
from lightforcing.lightforcing_core.wan.modules import WanModel

ATTENTION = "light_forcing_attention.safetensors"
FILES = ("self_forcing_rollout.safetensors", "video_vae.safetensors", ATTENTION)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", FILES)
def test_every_golden_case_is_reproduced(golden_dir: Path, name: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(golden_dir / name), "--json", str(report)]) == 0
    cases = json.loads(report.read_text())["cases"]
    assert cases
    for case in cases:
        assert case["passed"] and case["rel_err"] <= 1e-4, case
    if name != FILES[1]:
        golden = json.loads(metadata_of(golden_dir / name)["golden"])["cases"]
        names = golden if isinstance(golden, dict) else [f"c{case['chunk']}" for case in golden]
        assert [c["case"] for c in cases] == list(names)
    else:
        assert {c["case"] for c in cases} == {"wan_decode", "wan_encode", "taehv_decode"}


def test_the_fast_engine_reproduces_the_published_rollouts(
    golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense, in float32, through the references of its kernels."""

    def fast(tree: WanModel, *arguments: Any, **more: Any) -> Iterator[Chunk]:
        return rollout(tree, *arguments, engine=ForwardEngine(tree), **more)

    monkeypatch.setattr(verify, "rollout", fast)
    cases = verify_files([golden_dir / FILES[0]])
    assert cases
    for case in cases:
        assert case.passed and case.rel_err <= 1e-5, case


@pytest.mark.parametrize("damage", ["value", "nan", "shape"])
def test_a_wrong_expectation_fails(golden_dir: Path, damage: str, tmp_path: Path) -> None:
    source = golden_dir / FILES[1]
    tensors = load_file(source)
    expected = tensors["taehv.frames_untrimmed"]
    if damage == "value":
        expected += 3e-4 * expected.abs().mean() * torch.randn_like(expected).sign()
    elif damage == "nan":
        expected[0, 0, 0, 0, 0] = float("nan")
    else:
        tensors["taehv.frames_untrimmed"] = expected[:, :-1].contiguous()
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata_of(source))
    report = tmp_path / "report.json"
    assert main(["verify", str(path), "--json", str(report)]) == 1
    failed = [c["case"] for c in json.loads(report.read_text())["cases"] if not c["passed"]]
    assert failed == ["taehv_decode"]


def test_a_wrong_rollout_fails(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / FILES[0]
    tensors = load_file(source)
    tensors["framewise.renoise"][5] *= 1.01
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata_of(source))
    results = {r.case: r.passed for r in verify_files([path])}
    assert [case for case, passed in results.items() if not passed] == ["framewise"]


def test_write_works_without_expectations(golden_dir: Path, tmp_path: Path) -> None:
    expected_names = {
        FILES[0]: lambda name: name.endswith(".latents"),
        FILES[1]: lambda name: name in ("wan.pixels", "wan.encode_out", "taehv.frames_untrimmed"),
        ATTENTION: lambda name: name.endswith((".kv_indices", ".out")),
    }
    for file, is_expected in expected_names.items():
        tensors = load_file(golden_dir / file)
        wanted = {k: v for k, v in tensors.items() if is_expected(k)}
        path = tmp_path / "inputs.safetensors"
        save_file(
            {k: v for k, v in tensors.items() if k not in wanted},
            path,
            metadata=metadata_of(golden_dir / file),
        )
        results = verify_files([path], write=tmp_path / "out.safetensors")
        assert all(r.rel_err is None and r.passed for r in results)
        written = load_file(tmp_path / "out.safetensors")
        assert written.keys() == wanted.keys()
        for name, value in wanted.items():
            assert written[name].dtype == value.dtype
            assert torch.allclose(written[name], value, rtol=1e-3, atol=1e-4), name
        again = load_file(path) | written
        save_file(again, path, metadata=metadata_of(golden_dir / file))
        assert all(r.rel_err == 0 and r.passed for r in verify_files([path]))


def damaged_attention(
    golden_dir: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object],
) -> Path:
    """A copy of the attention cases after `change(metadata, tensors)`."""
    source = golden_dir / ATTENTION
    tensors, metadata = load_file(source), metadata_of(source)
    golden = json.loads(metadata["golden"])
    change(golden, tensors)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata={"golden": json.dumps(golden)})
    return path


def failing(path: Path) -> list[str]:
    return [result.case for result in verify_files([path]) if not result.passed]


def _swap_one_block(golden: dict, tensors: dict[str, torch.Tensor]) -> None:
    row = tensors["c4.kv_indices"][0, 1, 7]
    absent = set(range(golden["cases"][4]["kv_blocks"])) - set(row.tolist())
    row[3] = min(absent)


@pytest.mark.parametrize(
    ("change", "cases"),
    [
        (lambda g, t: t["c4.out"][0, 5].mul_(1.01), ["c4"]),
        (lambda g, t: t["c4.out"][0, 5, 0, 0].fill_(float("nan")), ["c4"]),
        (lambda g, t: t["c4.q"][0, 5, 0, 0].fill_(float("nan")), ["c4"]),
        (_swap_one_block, ["c4"]),
        (lambda g, t: t["c4.kv_indices"][0, 1, 7, 1].copy_(t["c4.kv_indices"][0, 1, 7, 0]), ["c4"]),
        (lambda g, t: t.update({"c4.kv_indices": t["c4.kv_indices"][..., 1:].clone()}), ["c4"]),
        (lambda g, t: t.update({"c4.kv_indices": t["c4.kv_indices"].float()}), ["c4"]),
        (lambda g, t: g["sparsities"].__setitem__(4, g["sparsities"][4] + 2e-9), ["c4"]),
        (lambda g, t: g["sparsities"].__setitem__(4, float("nan")), ["c4"]),
        (lambda g, t: g["sparsities"].pop(), [f"c{i}" for i in range(7)]),
        (lambda g, t: g["cases"][4].update(sparsity=0.8), ["c4"]),
        (lambda g, t: g["cases"][4].update(topk=18), ["c4"]),
        (lambda g, t: g["cases"][4].update(kv_blocks=91), ["c4"]),
        (lambda g, t: g["cases"][4].update(past_frames=9), ["c4"]),
        (lambda g, t: g.update(keep_near=1), ["c3", "c4", "c5", "c6"]),
        (lambda g, t: g.update(s_target=0.81), [f"c{i}" for i in range(1, 7)]),
    ],
    ids=[
        "value", "nan", "nan input", "wrong block", "duplicate", "too few", "type", "schedule",
        "nan in schedule", "short schedule", "sparsity", "topk", "kv_blocks", "past_frames",
        "rule", "target",
    ],
)  # fmt: skip
def test_a_wrong_attention_case_fails(
    golden_dir: Path, change: Callable[..., object], cases: list[str], tmp_path: Path
) -> None:
    path = damaged_attention(golden_dir, tmp_path, change)
    assert failing(path) == cases
    report = tmp_path / "report.json"
    assert main(["verify", str(path), "--json", str(report)]) == 1
    rows = json.loads(report.read_text())["cases"]
    assert [row["case"] for row in rows if not row["passed"]] == cases


def test_index_lists_are_sets(golden_dir: Path, tmp_path: Path) -> None:
    path = damaged_attention(
        golden_dir,
        tmp_path,
        lambda g, t: t.update({"c4.kv_indices": t["c4.kv_indices"].flip(-1).contiguous()}),
    )
    assert failing(path) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda g, t: t.pop("c2.k"),
        lambda g, t: g.pop("s_base"),
        lambda g, t: g.update(heads=3),
        lambda g, t: g.update(block=0),
        lambda g, t: g.update(frame_tokens=95),
        lambda g, t: g["cases"][0].update(chunk=7),
        lambda g, t: g["cases"].append("c7"),
        lambda g, t: g.update(s_target=1.5),
    ],
)
def test_damaged_attention_files_are_refused(
    golden_dir: Path, change: Callable[..., object], tmp_path: Path
) -> None:
    assert main(["verify", str(damaged_attention(golden_dir, tmp_path, change))]) == 2


def test_other_sizes_and_a_window_are_reproduced(tmp_path: Path) -> None:
    """A file of the same format, its expectations written out in float64 loops."""
    heads, dim, block, tokens, own, window = 3, 20, 5, 30, 2, 8
    keep_frames, keep_sink, keep_near = 3, 1, 1
    per_frame = tokens // block
    ends = range(2 * own, 14 + 1, own)
    weights = [min(end, window) for end in ends]
    beta = 0.2 * sum(weights) / sum(w / math.sqrt(e) for e, w in zip(ends, weights, strict=True))
    sparsities = [0.0] + [0.9 - beta / math.sqrt(end) for end in ends]
    golden: dict[str, Any] = {
        "heads": heads, "head_dim": dim, "block": block, "frame_tokens": tokens,
        "frames_per_chunk": own, "total_frames": 14, "window": window, "s_target": 0.7,
        "s_base": 0.9, "keep_frames": keep_frames, "keep_sink": keep_sink, "keep_near": keep_near,
        "sparsities": sparsities, "cases": [],
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for chunk, sparsity in enumerate(sparsities):
        frames = min((chunk + 1) * own, window)
        past, blocks = frames - own, frames * per_frame
        top_k = int((1 - sparsity) * blocks)
        q = torch.randn(own * tokens, heads, dim)
        k, v = torch.randn(2, frames * tokens, heads, dim).unbind(0)
        out = torch.zeros(own * tokens, heads, dim, dtype=torch.float64)
        indices = torch.zeros(1, heads, own * per_frame, top_k, dtype=torch.int16)
        for head in range(heads):
            means = k[:, head].double().unflatten(0, (blocks, block)).mean(1)
            for row in range(own * per_frame):
                rows = slice(row * block, (row + 1) * block)
                scores = means @ q[rows, head].double().mean(0)
                eligible = set(range(frames))
                if past > keep_frames:
                    of_frame = scores.unflatten(0, (frames, per_frame)).mean(1)
                    middle = range(keep_sink, past - keep_near)
                    ranked = sorted(middle, key=lambda f, s=of_frame: -float(s[f]))
                    eligible -= set(ranked[keep_frames - keep_sink - keep_near :])
                allowed = [b for b in range(blocks) if b // per_frame in eligible]
                kept = sorted(sorted(allowed, key=lambda b, s=scores: -float(s[b]))[:top_k])
                indices[0, head, row] = torch.tensor(kept)
                at = torch.cat([torch.arange(b * block, (b + 1) * block) for b in kept])
                logits = q[rows, head].double() @ k[at, head].double().T / math.sqrt(dim)
                out[rows, head] = logits.softmax(-1) @ v[at, head].double()
        golden["cases"].append(
            {"chunk": chunk, "past_frames": past, "sparsity": sparsity, "topk": top_k,
             "kv_blocks": blocks}
        )  # fmt: skip
        parts = {"q": q, "k": k, "v": v, "out": out.float()}
        tensors |= {f"c{chunk}.{name}": x[None].contiguous() for name, x in parts.items()}
        tensors[f"c{chunk}.kv_indices"] = indices
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, metadata={"golden": json.dumps(golden)})
    results = verify_files([path])
    assert len(results) == 7
    assert all(r.passed and r.rel_err < 1e-5 for r in results), results


@pytest.mark.parametrize("damage", ["metadata", "weight", "renoise"])
def test_damaged_golden_files_are_refused(golden_dir: Path, damage: str, tmp_path: Path) -> None:
    source = golden_dir / FILES[0]
    tensors, metadata = load_file(source), metadata_of(source)
    if damage == "metadata":
        metadata["golden"] = "{nonsense"
    elif damage == "weight":
        del tensors["model.blocks.0.ffn.2.bias"]
    else:
        tensors["chunkwise.renoise"] = tensors["chunkwise.renoise"][:2].contiguous()
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata)
    assert main(["verify", str(path)]) == 2


def test_write_is_checked_before_the_work(golden_dir: Path, tmp_path: Path) -> None:
    source = golden_dir / FILES[1]
    assert main(["verify", str(source), "--write", str(tmp_path / "no" / "x")]) == 2
    assert main(["verify", str(source), "--write", str(source)]) == 2
    assert load_file(source)


def test_files_that_are_not_golden_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a golden file"):
        verify_files([path])
    save_file({"a": torch.zeros(1)}, path, metadata={"vae": "{}"})
    with pytest.raises(UserError, match="missing from the golden file"):
        verify_files([path])
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
