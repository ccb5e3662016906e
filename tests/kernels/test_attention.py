"""Attention over index lists: the softmax over the listed keys that exist, and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from lightforcing.kernels import BlockGrid, block_sparse_attention, check_block_lists
from lightforcing.kernels.configs import AttentionConfig
from lightforcing.kernels.gluon_attention import block_sparse_attention_gluon
from lightforcing.kernels.ops import block_sparse_attention_triton

IMPLEMENTATIONS = pytest.mark.parametrize(
    "attend", [block_sparse_attention, block_sparse_attention_triton], ids=["reference", "triton"]
)
# Relative L2 errors against float64: a few roundings of the inputs' type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """Inputs whose padding rows are NaN, and lists of distinct random blocks."""

    q_grid: BlockGrid
    kv_grid: BlockGrid
    q_segments: int = 1
    slots: int = 2
    width: int = 2
    batch: int = 1
    heads: int = 2
    head_dim: int = 64

    def make(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        rows = self.slots * self.kv_grid.slot_tokens
        q = torch.randn(self.batch, self.q_segments * self.q_grid.segment_tokens, self.heads,
                        self.head_dim)  # fmt: skip
        k, v = (torch.randn(self.batch, rows, self.heads, self.head_dim) for _ in "kv")
        for x in (k, v):
            x.unflatten(1, (self.slots, -1))[:, :, self.kv_grid.segment_tokens :] = float("nan")
        lists = self.q_segments * self.q_grid.blocks_per_segment
        blocks = self.slots * self.kv_grid.blocks_per_segment
        shuffled = torch.rand(self.batch, self.heads, lists, blocks).argsort(3)
        indices = shuffled[..., : self.width].sort(3).values.int()
        counts = torch.randint(0, self.width + 1, (self.batch, self.heads, lists)).int()
        counts[0, 0, 0] = self.width
        unmeant = torch.arange(self.width) >= counts[..., None]
        return {
            "q": q.to(device, dtype),
            "k": k.to(device, dtype),
            "v": v.to(device, dtype),
            "kv_indices": indices.masked_fill(unmeant, -1).to(device),
            "kv_counts": counts.to(device),
            "q_grid": self.q_grid,
            "kv_grid": self.kv_grid,
        }


def attend_by_hand(
    q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, kv_counts: Tensor | None,
    q_grid: BlockGrid, kv_grid: BlockGrid, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """float64, one query row at a time, over a list of key rows."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, h, row in ((b, h, r) for b in range(q.shape[0]) for h in range(q.shape[2])
                      for r in range(q.shape[1])):  # fmt: skip
        segment, token = divmod(row, q_grid.segment_tokens)
        block = segment * q_grid.blocks_per_segment + token // q_grid.block_tokens
        listed = kv_indices[b, h, block].tolist()
        listed = listed if kv_counts is None else listed[: int(kv_counts[b, h, block])]
        rows = []
        for one in listed:
            slot, slot_block = divmod(one, kv_grid.blocks_per_segment)
            for token in range(kv_grid.block_tokens):
                if slot_block * kv_grid.block_tokens + token < kv_grid.segment_tokens:
                    start = slot * kv_grid.slot_tokens + slot_block * kv_grid.block_tokens
                    rows.append(start + token)
        if rows:
            scores = k[b, rows, h].double().cpu() @ q[b, row, h].double().cpu() * scale
            out[b, row, h] = torch.softmax(scores, 0) @ v[b, rows, h].double().cpu()
    return out


def assert_close(out: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[out.dtype] if tolerance is None else tolerance
    assert not out.isnan().any()
    error = (out.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


CASES = {
    "one query, one key": Case(BlockGrid(1, 64), BlockGrid(1, 64), width=1),
    "63 and 65": Case(BlockGrid(63, 64), BlockGrid(65, 64), width=3),
    "65 and 63": Case(BlockGrid(65, 64), BlockGrid(63, 64), width=2),
    "no short block": Case(BlockGrid(64, 64), BlockGrid(128, 64), width=3),
    "segments of queries": Case(BlockGrid(40, 32), BlockGrid(50, 16), 3, 3, 7),
    "batches": Case(BlockGrid(65, 64), BlockGrid(100, 64), 1, 3, 4, batch=2),
    "batches of whole blocks": Case(BlockGrid(64, 64), BlockGrid(64, 64), 1, 3, 2, batch=2),
    "wide blocks in parts": Case(BlockGrid(130, 128), BlockGrid(150, 128), 1, 2, 3, heads=1),
    "small blocks": Case(BlockGrid(40, 16), BlockGrid(40, 16), 2, 3, 5),
    "head dim 128": Case(BlockGrid(70, 64), BlockGrid(70, 32), 1, 2, 4, heads=1, head_dim=128),
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_outputs_are_those_of_a_loop(attend, case: Case, dtype: torch.dtype, device) -> None:
    made = case.make(dtype, device)
    assert_close(attend(**made), attend_by_hand(**made))


@pytest.mark.parametrize("use_tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "name", ["63 and 65", "batches", "batches of whole blocks", "wide blocks in parts"]
)
def test_descriptors_and_tiles_change_nothing(
    name: str, use_tma: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if use_tma and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need compute capability 9.0")
    case = CASES[name]
    made = case.make(dtype, device)
    config = AttentionConfig(
        case.q_grid.block_tokens // 2, case.kv_grid.block_tokens // 2, 4, 2, use_tma
    )
    assert_close(block_sparse_attention_triton(**made, config=config), attend_by_hand(**made))


@IMPLEMENTATIONS
def test_the_full_list_is_dense_attention(attend, dtype: torch.dtype, device) -> None:
    case = Case(BlockGrid(100, 64), BlockGrid(80, 32), slots=2, width=6)
    made = case.make(dtype, device)
    full = torch.arange(6, dtype=torch.int32, device=device).expand(1, 2, 2, 6)
    valid = [made[x].unflatten(1, (2, -1))[:, :, :80].flatten(1, 2) for x in "kv"]
    dense = F.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (made["q"], *valid))
    ).transpose(1, 2)
    out = attend(**made | {"kv_indices": full, "kv_counts": None})
    assert_close(out, dense.cpu())


@IMPLEMENTATIONS
def test_first_and_last_blocks_are_masked_attention(attend, dtype: torch.dtype, device) -> None:
    case = Case(BlockGrid(64, 64), BlockGrid(64, 32), slots=4, width=4)
    made = case.make(dtype, device)
    ids = torch.tensor([0, 1, 6, 7], dtype=torch.int32, device=device).expand(1, 2, 1, 4)
    mask = torch.ones(256, dtype=torch.bool, device=device)
    mask[64:192] = False
    dense = F.scaled_dot_product_attention(
        *(made[x].double().transpose(1, 2) for x in "qkv"), attn_mask=mask.expand(64, 256)
    ).transpose(1, 2)
    assert_close(attend(**made | {"kv_indices": ids, "kv_counts": None}), dense.cpu())


@IMPLEMENTATIONS
def test_a_cache_may_grow(attend, device: torch.device) -> None:
    dtype = torch.float16
    full = Case(BlockGrid(64, 64), BlockGrid(40, 32), slots=4, width=3).make(dtype, device)
    for slots in (2, 3, 4):
        indices = full["kv_indices"] % (2 * slots)
        indices = indices.sort(3).values
        part = full | {
            "k": full["k"][:, : slots * 64],
            "v": full["v"][:, : slots * 64],
            "kv_indices": indices[..., :1].contiguous(),
            "kv_counts": full["kv_counts"].clamp_max(1),
        }
        assert_close(attend(**part), attend_by_hand(**part))


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", ["heads first", "part of a capacity", "one projection"])
def test_strides_may_be_any(attend, layout: str, device: torch.device) -> None:
    dtype = torch.float16
    case = Case(BlockGrid(65, 64), BlockGrid(65, 64), slots=2, width=3, batch=2)
    made = case.make(dtype, device)
    expected = attend_by_hand(**made)
    out = torch.full_like(made["q"], float("nan"))
    match layout:
        case "heads first":
            strided = {x: made[x].transpose(1, 2).contiguous().transpose(1, 2) for x in "qkv"}
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        case "part of a capacity":
            strided = {
                x: F.pad(made[x], (0, 0, 0, 0, 0, 130))[:, : made[x].shape[1]] for x in "qkv"
            }
        case _:
            k, v = torch.cat([made["k"], made["v"]], 3).split(64, 3)
            strided = {"k": k, "v": v}
    returned = attend(**made | strided, out=out)
    assert returned is out
    assert_close(out, expected)


@IMPLEMENTATIONS
def test_empty_lists_give_zeros(attend, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(BlockGrid(65, 64), BlockGrid(65, 64))
    made = case.make(dtype, device)
    made["kv_counts"].zero_()
    assert (attend(**made, out=torch.full_like(made["q"], float("nan"))) == 0).all()


def test_nothing_to_attend_to_gives_zeros(device: torch.device) -> None:
    made = Case(BlockGrid(65, 64), BlockGrid(65, 64)).make(torch.float16, device)
    no_ids = made["kv_indices"][..., :0]
    out = block_sparse_attention_triton(**made | {"kv_indices": no_ids, "kv_counts": None})
    assert (out == 0).all()


@IMPLEMENTATIONS
def test_order_of_a_list_and_what_lies_after_its_count_do_not_matter(attend, device) -> None:
    made = Case(BlockGrid(65, 64), BlockGrid(65, 64), slots=3, width=4).make(torch.float16, device)
    made["kv_counts"].fill_(3)
    for rest in (-1, 5, 2**31 - 1):
        for order in ((1, 2, 4), (4, 1, 2)):
            ids = torch.tensor([*order, rest], dtype=torch.int32, device=device)
            made["kv_indices"] = ids.expand(1, 2, 2, 4)
            out = attend(**made)
            if order == (1, 2, 4):
                expected = attend_by_hand(**made)
            assert_close(out, expected)


@IMPLEMENTATIONS
def test_large_scores_do_not_overflow(attend, device: torch.device) -> None:
    made = Case(BlockGrid(64, 64), BlockGrid(65, 64), width=4).make(torch.float16, device)
    made["q"] *= 100
    assert_close(attend(**made, scale=1.0), attend_by_hand(**made, scale=1.0), 5e-3)


@IMPLEMENTATIONS
def test_the_released_outputs(attend, golden_dir: Path, device: torch.device) -> None:
    with safe_open(golden_dir / "light_forcing_attention.safetensors", "pt") as file:
        golden = json.loads(file.metadata()["golden"])
        grid = BlockGrid(golden["frame_tokens"], golden["block"])
        is_reference = attend is block_sparse_attention
        dtype = torch.float32 if is_reference or device.type == "cpu" else torch.float16
        for case in golden["cases"][:: 1 if is_reference else 6]:
            name = f"c{case['chunk']}"
            q, k, v = (file.get_tensor(f"{name}.{x}").to(device, dtype) for x in "qkv")
            indices = file.get_tensor(f"{name}.kv_indices").int().to(device)
            out = attend(q, k, v, indices, None, q_grid=grid, kv_grid=grid)
            tolerance = 1e-4 if dtype == torch.float32 else TOLERANCE[dtype]
            assert_close(out, file.get_tensor(f"{name}.out").double(), tolerance)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(1, 60, 2, 64)}, "q must be .* segments of 65 rows"),
        ({"k": torch.zeros(1, 65, 2, 64)}, "k must be .* slots of 128 rows"),
        ({"v": torch.zeros(1, 128, 2, 64)}, "v must have k's shape"),
        ({"kv_indices": torch.zeros(1, 2, 3, 2, dtype=torch.int32)}, "kv_indices must be"),
        ({"kv_counts": torch.zeros(1, 2, 3, dtype=torch.int32)}, "kv_counts must be"),
        ({"out": torch.zeros(1, 65, 2, 64)}, "out must be like q"),
    ],
)
def test_what_does_not_fit_is_refused(attend, change: dict, message: str, device) -> None:
    made = Case(BlockGrid(65, 64), BlockGrid(65, 64)).make(torch.float16, device)
    with pytest.raises(ValueError, match=message):
        attend(**made | change)


@pytest.mark.parametrize(
    "case, change, message",
    [
        (Case(BlockGrid(64, 64), BlockGrid(64, 64), head_dim=80), {}, r"head dim of \(64, 128\)"),
        (Case(BlockGrid(64, 48), BlockGrid(64, 64)), {}, r"got \(48, 64\)"),
        (Case(BlockGrid(64, 64), BlockGrid(64, 64)), {"scale": -1.0}, "scale above 0, got -1"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(case: Case, change, message: str, device) -> None:
    made = case.make(torch.float16, device)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention_triton(**made, **change)


def test_descriptors_refuse_strides_they_cannot_express(device: torch.device) -> None:
    made = Case(BlockGrid(64, 64), BlockGrid(64, 64)).make(torch.float16, device)
    made["k"] = made["k"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="heads of a token of k must lie side by side"):
        block_sparse_attention_triton(**made, config=AttentionConfig(64, 64, 4, 2, use_tma=True))


def test_the_gluon_kernel_says_what_it_cannot_do(device: torch.device) -> None:
    made = Case(BlockGrid(64, 64), BlockGrid(64, 64)).make(torch.float16, device)
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    message = "query blocks of 128" if is_hopper else "capability 9"
    with pytest.raises(ValueError, match=message):
        block_sparse_attention_gluon(**made)


def test_types_must_agree(device: torch.device) -> None:
    made = Case(BlockGrid(64, 64), BlockGrid(64, 64)).make(torch.float16, device)
    with pytest.raises(ValueError, match=r"v must be like q, torch\.float16"):
        block_sparse_attention_triton(**made | {"v": made["v"].float()})
    with pytest.raises(ValueError, match="kv_indices must be int32"):
        block_sparse_attention_triton(**made | {"kv_indices": made["kv_indices"].long()})


def test_wrong_lists_are_found() -> None:
    good = torch.tensor([[[[0, 3, -1], [2, 1, 0]]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 3]]], dtype=torch.int32)
    check_block_lists(good, counts, num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"outside 0..2 in the list of batch 0, head 0, query blo"):
        check_block_lists(good, counts, num_kv_blocks=3)
    with pytest.raises(ValueError, match=r"outside 0..3 .* block 0: 3 ids of \[0, 3, -1\]"):
        check_block_lists(good, None, num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"a count outside 0..3 in the list"):
        check_block_lists(good, counts + 1, num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"a duplicate block id .* block 1: 3 ids of \[2, 0, 2\]"):
        twice = torch.tensor([[[[0, 3, -1], [2, 0, 2]]]], dtype=torch.int32)
        check_block_lists(twice, counts, num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"kv_indices must be int32, got torch\.int64"):
        check_block_lists(good.long(), counts, num_kv_blocks=4)
