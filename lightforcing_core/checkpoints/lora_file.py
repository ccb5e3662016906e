"""LoRA files of every common naming, read into updates of Wan's parameters.

A file may be written by PEFT (LongLive, MemFlow), diffusers, kohya's trainers or for ComfyUI; all
end as updates of parameters under Wan's own names. Low-rank pairs add scale * (up @ down) with
scale = alpha / rank. '.diff' and '.diff_b' (ComfyUI) add a whole tensor to a weight or a bias,
'.diff_m' (LightX2V; Comfy-Org/ComfyUI#8922) to a block's modulation.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .bounded_json import MAX_JSON_BYTES
from .files import read_state_dict
from .formats import describe
from .names import from_diffusers, from_kohya, is_diffusers, parameter_of, strip_noise, strip_outer

log = logging.getLogger("lightforcing")

# Trainers save the critic's LoRA beside these. The average of a generator comes first.
_TRAINED = ("generator_lora_ema.", "generator_lora.")
# Of alpha: LoRAs have the rank or a few times it, and a product of larger ones overflows.
_MAX_ALPHA = 1e6
# diffusers' oldest layout: 'attn1.processor.to_q_lora.down.weight'.
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out|add_[kv]_proj)_lora\.(?=(alpha$)?)")
# '.lora_A.weight', '.lora_A.default.weight', '.lora_down.weight', '.lora.down.weight', '.alpha'.
_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?:[._]lora[._]|\.lora_linear_layer\.)(?P<side>A|B|down|up)"
    r"(?:\.(?!weight$|bias$|alpha$)[^.]+)?(?:\.(?P<bias>bias)|\.weight)?"
    r"|\.(?P<other>alpha|diff|diff_b|diff_m|w_norm|b_norm))"
)
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_WHOLE = {"diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b"}
_OTHER_KINDS = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "DoRA"),
    (re.compile(r"\.hada_[wt]"), "LoHa"),
    (re.compile(r"\.lokr_[wt]"), "LoKr"),
    (re.compile(r"\.(oft_|boft_)"), "OFT or BOFT"),
    (re.compile(r"\.lora_mid\b"), "a LoRA with a middle factor (lora_mid)"),
)


@dataclass(frozen=True, eq=False)
class Pair:
    """A low-rank update, scale * (up @ down).

    Attributes:
        up: [out, rank] (of a convolution also [out, rank, 1, 1, 1]).
        down: [rank, in], of a convolution [rank, in, *kernel] or [rank, in * kernel].
        scale: alpha / rank.
    """

    up: Tensor
    down: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def fits(self, shape: Sequence[int]) -> bool:
        flat = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else ()
        return self.shape in (tuple(shape), flat) and len(shape) > 1

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add to a contiguous float32 weight in place; no product is stored beside it."""
        up = self.up.to(weight.device, torch.float32).flatten(1)
        down = self.down.to(weight.device, torch.float32).flatten(1)
        weight.view(weight.shape[0], -1).addmm_(up, down, alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class Difference:
    """A whole tensor to add: scale * value, of the parameter's own shape."""

    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        return self.shape == tuple(shape)

    def add_to(self, weight: Tensor, strength: float) -> None:
        """Add to a float32 weight in place."""
        weight.add_(self.value.to(weight.device, torch.float32), alpha=strength * self.scale)


@dataclass(frozen=True, eq=False)
class Lora:
    """The updates of one file. Tensors stay in the file's mapping until they are used.

    Attributes:
        name: of the file.
        updates: by Wan's parameter name ('blocks.0.self_attn.q.weight'); each parameter has one
            part, or two where a file has both a pair and a difference for it.
        unmatched: keys of the file that belong to no parameter of Wan.
        ranks: of all pairs, each once, ascending.
    """

    name: str
    updates: dict[str, tuple[Pair | Difference, ...]]
    unmatched: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Settings:
    """What PEFT's configuration says of the scale, where a file has no alpha tensors.

    Attributes:
        source: where it was found, for messages.
        patterns: alpha of some modules, by the end of their names; the first that fits counts.
        root: divide by the root of the rank (rank-stabilised LoRA).
    """

    source: str
    alpha: float
    patterns: dict[str, float] = field(default_factory=dict)
    root: bool = False

    def scale(self, module: str, rank: int) -> float:
        own = (v for k, v in self.patterns.items() if f".{module}".endswith(f".{k}"))
        return next(own, self.alpha) / (math.sqrt(rank) if self.root else rank)


def load_lora(path: str | Path) -> Lora:
    """Read a LoRA file of any known naming.

    Args:
        path: .safetensors, or a torch file (LongLive's lora.pt); beside a PEFT file an
            adapter_config.json is read for alpha. Also PEFT's folder with the two.

    Raises:
        UserError: no LoRA, one of another kind (DoRA, LoHa, LoKr, OFT), none of it for Wan, a
            pair without its other half or of two ranks, or numbers that are not finite.
    """
    path = Path(path)
    tensors, metadata = read_state_dict(path)
    try:
        lora = _read(path, tensors, metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    log.info(
        "%s: LoRA for %d parameters, rank %s",
        lora.name,
        len(lora.updates),
        ", ".join(map(str, lora.ranks)) or "none (whole differences)",
    )
    return lora


def _read(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Lora:
    trained = [start for start in _TRAINED if any(key.startswith(start) for key in tensors)]
    if trained:
        tensors = {key: value for key, value in tensors.items() if key.startswith(trained[0])}
    if trained[:1] == [_TRAINED[0]]:
        others = ", ".join(f"'{start}'" for start in trained[1:])
        passed = f", passed over {others}" if others else ""
        log.info("%s: took the averaged LoRA, '%s'%s", path.name, trained[0], passed)
    for pattern, kind in _OTHER_KINDS:
        example = next((key for key in tensors if pattern.search(key)), None)
        if example is not None:
            raise UserError(f"this is {kind} ('{example}'), which is not supported; use a LoRA")
    found = {key: _KEY.fullmatch(_plain(key)) for key in tensors}
    matches = {key: match for key, match in found.items() if match is not None}
    if not matches:
        raise UserError(
            f"this is {describe(tensors)}; no key has the name of a low-rank factor or a "
            "difference: give a LoRA file"
        )
    diffusers = is_diffusers(match["module"] for match in matches.values())
    # By Wan's module: the key of each role in the file, and the module as the file calls it.
    modules: dict[str, dict[str, str]] = {}
    called: dict[str, str] = {}
    for key, match in matches.items():
        module, role = _place(match, diffusers)
        if parameter_of(module) is None:
            continue
        called[module] = match["module"]
        roles = modules.setdefault(module, {})
        if role in roles:
            raise UserError(f"'{roles[role]}' and '{key}' are one update; use a file with one LoRA")
        roles[role] = key
    settings = _settings(path, metadata) if _wants_settings(modules, matches) else None
    updates: dict[str, tuple[Pair | Difference, ...]] = {}
    used: set[str] = set()
    for module, roles in modules.items():
        for kind in ("weight", "bias"):
            parts, keys = _parts(tensors, roles, kind, called[module], settings)
            name = parameter_of(module, kind)
            if parts and name is not None:
                updates[name] = parts
                used |= keys
    if not updates:
        raise UserError(
            f"this LoRA is not for Wan 2.1: none of its {len(tensors)} keys names a part of it "
            f"({_some(list(tensors))}); use a LoRA made for Wan 2.1"
        )
    pairs = [part for parts in updates.values() for part in parts if isinstance(part, Pair)]
    return Lora(
        name=path.name,
        updates=updates,
        unmatched=tuple(sorted(set(tensors) - used)),
        ranks=tuple(sorted({pair.down.shape[0] for pair in pairs})),
    )


def _plain(key: str) -> str:
    """A key without what stands before the model's own names, attention processors resolved."""
    return _PROCESSOR.sub(_without_processor, strip_outer(strip_noise(key)))


def _without_processor(match: re.Match[str]) -> str:
    module = "to_out.0" if match[1] == "to_out" else match[1]
    return f".{module}." if match[2] else f".{module}.lora."


def _place(match: re.Match[str], diffusers: bool) -> tuple[str, str]:
    """(Wan's module if it is one, role of the tensor in its update)."""
    module, other = match["module"], match["other"]
    if other == "diff_m":
        return f"{module}.modulation", "diff"
    dotted = from_kohya(module)
    if dotted is None:
        dotted = from_diffusers(module) if diffusers else module
    if other is not None:
        return dotted, _WHOLE.get(other, other)
    return dotted, _SIDES[match["side"]] + ("_bias" if match["bias"] else "")


def _wants_settings(
    modules: Mapping[str, Mapping[str, str]], matches: Mapping[str, re.Match[str]]
) -> bool:
    """Whether a pair in PEFT's naming has no alpha of its own."""
    return any(
        "alpha" not in roles and any(matches[key]["side"] in ("A", "B") for key in roles.values())
        for roles in modules.values()
    )


def _parts(
    tensors: Mapping[str, Tensor],
    roles: Mapping[str, str],
    kind: str,
    called: str,
    settings: _Settings | None,
) -> tuple[tuple[Pair | Difference, ...], set[str]]:
    """What one file adds to one parameter, and the keys it came from."""
    whole, low = ("diff", ("up", "down")) if kind == "weight" else ("diff_b", ("up_bias",))
    parts: list[Pair | Difference] = []
    keys = {roles[role] for role in (*low, whole) if role in roles}
    for key in keys:
        _check_numbers(key, tensors[key])
    if any(role in roles for role in low):
        # Of a bias, too: PEFT scales 'lora_B.bias' like the pair it stands beside.
        up, down = (tensors[roles[side]] for side in _both(roles))
        if min(up.ndim, down.ndim) < 2 or not 0 < down.shape[0] == math.prod(up.shape[1:]):
            raise UserError(
                f"'{roles['up']}' is {list(up.shape)} and '{roles['down']}' {list(down.shape)}: "
                "not two factors of one rank; the file is damaged"
            )
        rank, scale = down.shape[0], 1.0
        if "alpha" in roles:
            scale = _number(roles["alpha"], tensors[roles["alpha"]]) / rank
            keys.add(roles["alpha"])
        elif settings is not None:
            scale = settings.scale(called, rank)
        if kind == "weight":
            parts.append(Pair(up, down, scale))
        else:
            parts.append(Difference(tensors[roles["up_bias"]], scale))
    if whole in roles:
        parts.append(Difference(tensors[roles[whole]]))
    return tuple(parts), keys


def _both(roles: Mapping[str, str]) -> tuple[str, str]:
    for side, missing in (("up", "down"), ("down", "up")):
        if missing not in roles:
            there = roles.get(side) or next(iter(roles.values()))
            raise UserError(f"'{there}' has no '{missing}' factor beside it; the file is damaged")
    return "up", "down"


def _check_numbers(key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise UserError(
            f"'{key}' holds {tensor.dtype} ({tensor.layout}), expected plain floating point "
            "numbers; use a LoRA file that is not quantised"
        )
    # 8-bit floats have no isfinite of their own.
    values = tensor if tensor.element_size() > 1 else tensor.float()
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"'{key}' holds NaN or infinite numbers; the file is damaged")


def _number(key: str, tensor: Tensor) -> float:
    value = tensor.item() if tensor.numel() == 1 and not tensor.is_complex() else math.nan
    if not abs(value) <= _MAX_ALPHA:
        raise UserError(
            f"'{key}' must be one finite number, at most {_MAX_ALPHA:g}; the file is damaged"
        )
    return float(value)


def _settings(path: Path, metadata: Mapping[str, str]) -> _Settings | None:
    """The scale in the header (diffusers, or a plain 'lora_alpha') or in PEFT's file beside it.

    Args:
        path: a file, or the folder that holds the weights and PEFT's file.
        metadata: of the header.
    """
    folder = path if path.is_dir() else path.parent
    beside = folder / "adapter_config.json"
    inside = "lora_adapter_metadata" in metadata or "lora_alpha" in metadata
    source = "its metadata" if inside else f"{beside.name} {'in' if path.is_dir() else 'beside'} it"
    try:
        if "lora_adapter_metadata" in metadata:
            facts = json.loads(metadata["lora_adapter_metadata"])
        elif inside:
            facts = metadata
        elif beside.is_file():
            if beside.stat().st_size > MAX_JSON_BYTES:
                raise ValueError(f"{beside.stat().st_size} bytes of JSON are too much")
            facts = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return None
        # diffusers writes 'transformer.lora_alpha', PEFT 'lora_alpha'.
        facts = {key.removeprefix("transformer."): value for key, value in facts.items()}
        if facts.get("lora_alpha") is None:
            return None
        patterns = {
            strip_outer(key.removeprefix("^")): float(value)
            for key, value in (facts.get("alpha_pattern") or {}).items()
        }
        settings = _Settings(
            source, float(facts["lora_alpha"]), patterns, facts.get("use_rslora") is True
        )
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"alpha cannot be read from {source} ({error}); correct or remove it"
        ) from error
    # NaN is not smaller than anything.
    if not all(abs(alpha) <= _MAX_ALPHA for alpha in (settings.alpha, *patterns.values())):
        raise UserError(
            f"alpha in {source} is not a finite number of at most {_MAX_ALPHA:g}; correct or "
            "remove it"
        )
    log.info("%s: alpha %g is from %s", path.name, settings.alpha, source)
    return settings


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
