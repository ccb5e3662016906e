"""Recompute golden files: inputs with the outputs of the published implementations.

Everything runs in float32 on the CPU. All sizes come from the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints.files import read_state_dict
from .errors import UserError
from .outputs import check_output, replacing
from .rollout import rollout
from .rollout_settings import RolloutSettings
from .vae.taehv import TAEHV
from .vae.wan_vae import WanVAE
from .verify_attention import attention_cases
from .wan.config import WanConfig
from .wan.forward import prepare_text
from .wan.modules import WanModel

TOLERANCE = 1e-4  # relative L2 error in float32


@dataclass(frozen=True)
class CaseResult:
    """Outcome of one case.

    Attributes:
        rel_err: relative L2 error of the output; None when the file holds no expectation.
        detail: why it failed where the error does not say it.
    """

    file: str
    case: str
    rel_err: float | None
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class _Computed:
    """One case: tensors by the names of the expected ones, and what was wrong beside them."""

    case: str
    tensors: Mapping[str, Tensor]
    problems: tuple[str, ...] = ()


def verify_files(paths: Sequence[str | Path], write: str | Path | None = None) -> list[CaseResult]:
    """Recompute every case of every file.

    Args:
        paths: golden files, their format told by their metadata.
        write: also store what was computed, under the names of the expected tensors.

    Raises:
        UserError: a file is unreadable, of an unknown format, or lacks inputs.
    """
    if write is not None:
        check_output(Path(write), inputs=[Path(path) for path in paths])
    results: list[CaseResult] = []
    computed: dict[str, Tensor] = {}
    for path in paths:
        tensors, metadata = read_state_dict(path)
        try:
            for item in _recompute(tensors, metadata):
                for name, value in item.tensors.items():
                    if write is not None and name in computed:
                        raise UserError(
                            f"two files expect a tensor '{name}'; "
                            "write the results of one file at a time"
                        )
                    computed[name] = value.contiguous()
                results.append(_compare(Path(path), item, tensors))
        except KeyError as error:
            raise UserError(f"{path}: {error.args[0]} is missing from the golden file") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path}: damaged golden file, its tensors and metadata do not fit together "
                f"({str(error).splitlines()[0]})"
            ) from error
    if write is not None:
        with replacing(Path(write)) as temporary:
            save_file(computed, temporary)
    return results


def _compare(path: Path, item: _Computed, file: Mapping[str, Tensor]) -> CaseResult:
    problems = list(item.problems)
    errors: list[float] = []
    for name, value in item.tensors.items():
        expected = file.get(name)
        if not bool(torch.isfinite(value).all()):
            problems.append(f"{name}: computed NaN or infinity")
        if expected is None:
            continue
        if value.dtype.is_floating_point:
            errors.append(relative_error(value, expected))
        else:
            problems += _set_problems(name, value, expected)
    error = max(errors, default=None)
    passed = not problems and (error is None or error <= TOLERANCE)
    return CaseResult(path.name, item.case, error, passed, "; ".join(problems))


def _set_problems(name: str, value: Tensor, expected: Tensor) -> list[str]:
    """Whether the rows of two index tensors are the same sets."""
    if value.shape != expected.shape or expected.dtype.is_floating_point:
        return [f"{name}: {_described(expected)}, computed {_described(value)}"]
    differ = (value.long().sort(-1).values != expected.long().sort(-1).values).any(-1)
    if not bool(differ.any()):
        return []
    return [f"{name}: {int(differ.sum())} of {differ.numel()} rows are other sets"]


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def relative_error(value: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expectation, in float64.

    Infinite for shapes that differ and for NaN anywhere.
    """
    if value.shape != expected.shape:
        return math.inf
    expected = expected.double()
    difference = float((value.double() - expected).norm())
    if difference == 0:
        return 0.0
    size = float(expected.norm())
    error = difference / size if size else math.inf
    return error if math.isfinite(error) else math.inf


def _recompute(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[_Computed]:
    described = {key: json.loads(metadata[key]) for key in ("golden", "vae") if key in metadata}
    if "vae" in described:
        yield from _vae_cases(tensors)
        return
    cases = described.get("golden", {}).get("cases")
    if isinstance(cases, dict):
        yield from _rollout_cases(tensors, described["golden"])
    elif isinstance(cases, list):
        for case in attention_cases(tensors, described["golden"]):
            recomputed = {f"{case.name}.kv_indices": case.kv_indices, f"{case.name}.out": case.out}
            yield _Computed(case.name, recomputed, case.problems)
    else:
        raise UserError(
            "not a golden file this version can check; expected metadata 'golden' with rollout or "
            f"attention cases, or 'vae'; got {sorted(metadata) or 'no metadata'}"
        )


class RecordedNoise:
    """Noise of a golden case: given, not drawn. See `noise.NoiseSource`."""

    def __init__(
        self,
        initial: Tensor,
        renoise: Tensor,
        *,
        first_frame: int,
        frames_per_chunk: int,
        steps: int,
    ) -> None:
        """
        Args:
            initial: [1, frames, C, h, w].
            renoise: [chunks * (steps - 1), frames_per_chunk, C, h, w], in the order drawn.
            first_frame: absolute index of the first generated frame.
        """
        self._initial = initial.transpose(1, 2)
        self.shape = (*self._initial.shape[:2], *self._initial.shape[3:])
        self.device = initial.device
        self._renoise = renoise.transpose(1, 2)
        self._first_frame = first_frame
        self._frames_per_chunk = frames_per_chunk
        self._draws_per_chunk = steps - 1

    def initial(self, frames: Sequence[int]) -> Tensor:
        start = frames[0] - self._first_frame
        return self._initial[:, :, start : start + len(frames)]

    def renoise(self, frames: Sequence[int], step: int) -> Tensor:
        chunk = (frames[0] - self._first_frame) // self._frames_per_chunk
        draw = chunk * self._draws_per_chunk + step - 1
        return self._renoise[draw : draw + 1, :, : len(frames)]


def _rollout_cases(tensors: Mapping[str, Tensor], golden: Mapping[str, Any]) -> Iterator[_Computed]:
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    sizes = golden["config"]
    config = WanConfig.from_tensors(
        weights, num_heads=sizes["num_heads"], text_len=sizes["text_len"]
    )
    tree = WanModel(config)
    tree.load_state_dict(weights)
    for name, case in golden["cases"].items():
        steps = case["warped_steps"]
        given = tensors.get(f"{name}.initial_latent")
        first_frame = 0 if given is None else given.shape[1]
        noise = RecordedNoise(
            tensors[f"{name}.noise"],
            tensors[f"{name}.renoise"],
            first_frame=first_frame,
            frames_per_chunk=case["npb"],
            steps=len(steps),
        )
        settings = RolloutSettings(
            num_frames=case["nf"],
            frames_per_chunk=case["npb"],
            steps=steps,
            window_frames=case.get("local", -1),
            sink_frames=case.get("sink", 0),
        )
        with torch.no_grad():
            text = prepare_text(tree, tensors[f"{name}.prompt_embeds"])
        parts = [] if given is None else [given]
        for chunk in rollout(
            tree,
            settings,
            text,
            noise,
            given_latents=None if given is None else given.transpose(1, 2),
        ):
            parts.append(chunk.latents.transpose(1, 2))
        yield _Computed(name, {f"{name}.latents": torch.cat(parts, dim=1)})


@torch.no_grad()
def _vae_cases(tensors: Mapping[str, Tensor]) -> Iterator[_Computed]:
    def weights(prefix: str) -> dict[str, Tensor]:
        inputs = (f"{prefix}latent", f"{prefix}frames_untrimmed")
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix) and name not in inputs
        }
        if not found:
            raise KeyError(f"'{prefix}*'")
        return found

    wan = WanVAE.from_state_dict(weights("wan_vae."))
    pixels, _ = wan.decode(tensors["wan.latent"])
    yield _Computed("wan_decode", {"wan.pixels": pixels})
    latents, _ = wan.encode(tensors["wan.encode_in"])
    yield _Computed("wan_encode", {"wan.encode_out": latents})
    taehv = TAEHV.from_state_dict(weights("taehv."))
    frames, _ = taehv.decode(tensors["taehv.latent"])
    yield _Computed("taehv_decode", {"taehv.frames_untrimmed": frames})


def results_to_json(results: Sequence[CaseResult]) -> dict[str, Any]:
    """JSON form; an infinite error becomes null beside `passed: false`."""
    cases = []
    for result in results:
        row = asdict(result)
        if row["rel_err"] is not None and not math.isfinite(row["rel_err"]):
            row["rel_err"] = None
        cases.append(row)
    return {"cases": cases}
