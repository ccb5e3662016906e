"""A denoiser's file, opened: what it is and its tensors, none of them read yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..wan.config import WanConfig
from ..wan.modules import WanModel
from .families import Identification, identify
from .files import read_state_dict
from .formats import Recognised, recognise
from .lora import Lora, check_loras, merge
from .metadata import is_marked_causal, read_facts, whole_number
from .presets import Preset
from .quantised import check_plain, is_eight_bit

log = logging.getLogger("lightforcing")

LATENT_CHANNELS = 16  # of the Wan 2.1 VAE, the only latents this engine makes
WIDENED = torch.bfloat16  # what eight-bit weights become when nobody asks for something else

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Checkpoint:
    """A recognised denoiser. Tensors are memory-mapped and have not been looked at.

    Attributes:
        path: file or folder.
        config: sizes.
        shapes: of every parameter of the model, by name.
        recognised: layout, prefix, tensors under Wan's names.
        identification: family and settings.
        missing, unexpected: names of tensors.
        misshapen: what is wrong with tensors of another shape, a text each.
        merged_loras: LoRAs that are in the weights already, as the file's metadata says.
        marked_causal: whether ComfyUI sees an autoregressive model in the file.
    """

    path: Path
    config: WanConfig
    shapes: dict[str, torch.Size]
    recognised: Recognised
    identification: Identification
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    unexpected: tuple[str, ...]
    merged_loras: tuple[str, ...] = ()
    marked_causal: bool = False

    @property
    def preset(self) -> Preset:
        return self.identification.preset

    @property
    def stored_types(self) -> dict[str, int]:
        """Number of parameters by type, the commonest first, as in the file."""
        counts: dict[str, int] = {}
        for name in self.shapes:
            tensor = self.recognised.weights.tensors.get(name)
            if tensor is not None:
                kind = str(tensor.dtype).removeprefix("torch.")
                counts[kind] = counts.get(kind, 0) + tensor.numel()
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def check_whole(self) -> None:
        """Raise unless every tensor is there, has its shape, and is of a type that is understood.

        Raises:
            UserError: says what is wrong with which.
        """
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} tensors are missing ({some(self.missing)})")
        if self.misshapen:
            parts.append(f"{len(self.misshapen)} have another shape ({some(self.misshapen)})")
        if parts:
            raise UserError(
                f"{self.path}: {' and '.join(parts)}; the file does not fit a Wan 2.1 denoiser of "
                f"width {self.config.dim}: download it again or ask who made it"
            )
        weights = self.recognised.weights
        try:
            check_plain({name: weights.tensors[name] for name in self.shapes}, weights.scales)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def read(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        loras: Sequence[tuple[Lora, float]] = (),
        as_stored: Collection[str] = (),
        on_progress: Progress = lambda done, total: None,
    ) -> dict[str, Tensor]:
        """All parameters, each straight to its device and type; call `check_whole` before.

        On the CPU, tensors that need no change stay memory-mapped and cost no memory of their own.

        Args:
            device: where to.
            dtype: None keeps each tensor's own; eight-bit ones become bfloat16.
            loras: with strengths, added in float32.
            as_stored: names of eight-bit weights that stay numbers without their scale.
            on_progress: told how many of the file's bytes are done.

        Raises:
            UserError: a weight is NaN or infinite, or a LoRA does not fit.
        """
        if loras:
            check_loras([lora for lora, _ in loras], self.shapes)
        stored = self.recognised.weights.tensors
        total = sum(stored[name].nbytes for name in self.shapes)
        done = 0
        result = {}
        ranges: list[tuple[Tensor, Tensor]] = []
        for name in self.shapes:
            if name in as_stored:
                result[name] = stored[name].to(device)
                ranges.append(_range(result[name], self.scale(name)))
            else:
                result[name] = self._parameter(name, torch.device(device), dtype, loras)
                ranges.append(torch.aminmax(result[name]))
            done += stored[name].nbytes
            on_progress(done, total)
        # Asked at the end, and together: on a GPU every answer waits for the device.
        for name, right in zip(result, are_finite(ranges), strict=True):
            if not right:
                raise UserError(f"{self.path}: {self._not_finite(name, result[name].dtype, loras)}")
        return result

    def stored_as(
        self, numbers: torch.dtype, layers: Sequence[str], loras: Sequence[tuple[Lora, float]] = ()
    ) -> list[str]:
        """Which of every block's layers have weights of these numbers, and no LoRA to be added."""
        stored = self.recognised.weights.tensors
        names = [f"blocks.{i}.{name}" for i in range(self.config.num_layers) for name in layers]
        updated = {name for lora, _ in loras for name in lora.updates}
        return [
            name
            for name in names
            if stored[f"{name}.weight"].dtype == numbers and f"{name}.weight" not in updated
        ]

    def scale(self, name: str) -> Tensor:
        """What the numbers of a weight are multiplied with: one, or one for each output."""
        return self.recognised.weights.scales.get(name, torch.ones(()))

    def _parameter(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype | None,
        loras: Sequence[tuple[Lora, float]],
    ) -> Tensor:
        weights = self.recognised.weights
        stored = weights.tensors[name]
        kept = WIDENED if is_eight_bit(stored) else stored.dtype
        tensor = stored.to(device)
        if is_eight_bit(stored):
            # With a LoRA to come, in float32: the sum is rounded once.
            tensor = weights.widened(name, tensor, torch.float32 if loras else dtype or kept)
        return (merge(name, tensor, loras) if loras else tensor).to(dtype or kept)

    def _not_finite(
        self, name: str, dtype: torch.dtype, loras: Sequence[tuple[Lora, float]]
    ) -> str:
        weights = self.recognised.weights
        kind = str(dtype).removeprefix("torch.")
        wide = weights.widened(name, weights.tensors[name], torch.float32)
        if not is_finite(wide):
            return f"'{name}' holds NaN or infinite weights; the file is damaged: download it again"
        if any(name in lora.updates for lora, _ in loras):
            return f"'{name}' is NaN or infinite with the LoRA added; lower its strength"
        return f"'{name}' holds numbers too large for {kind}; use bfloat16 or float32"


def open_checkpoint(
    path: str | Path, *, num_heads: int | None = None, family: str | None = None
) -> Checkpoint:
    """Recognise a denoiser's file in any known layout without reading its weights.

    Args:
        path: a .safetensors or torch file, a shard of one, or a diffusers folder.
        num_heads: overrides the file's metadata and the rule width / 128.
        family: name of the family (`families.FAMILIES`) when the user says it.

    Raises:
        UserError: it is no denoiser for Wan 2.1 text to video.
    """
    path = Path(path)
    tensors, metadata = read_state_dict(path)
    facts = read_facts(metadata, path)
    try:
        recognised = recognise(tensors, metadata)
        stored = recognised.weights.tensors
        if num_heads is None and "num_heads" in facts:
            num_heads = whole_number(facts, "num_heads", 1)
        text_len = whole_number(facts, "text_len", 1) if "text_len" in facts else 512
        num_layers = whole_number(facts, "num_layers", 1) if "num_layers" in facts else None
        config = WanConfig.from_tensors(
            stored, num_heads=num_heads, text_len=text_len, num_layers=num_layers
        )
        _refuse_other_wans(config, stored)
        identification = identify(config.dim, facts, path, family)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    expected = parameter_shapes(config)
    merged = facts.get("merged_loras", [])
    return Checkpoint(
        path=path,
        config=config,
        shapes=expected,
        recognised=recognised,
        identification=identification,
        missing=tuple(name for name in expected if name not in stored),
        misshapen=tuple(
            f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ),
        unexpected=tuple(sorted(set(stored) - set(expected))),
        merged_loras=tuple(map(str, merged)) if isinstance(merged, list) else (),
        marked_causal=is_marked_causal(metadata),
    )


def _refuse_other_wans(config: WanConfig, tensors: dict[str, Tensor]) -> None:
    image = any(name.startswith("img_emb.") or ".k_img." in name for name in tensors)
    if image or config.in_dim > config.out_dim:
        raise UserError(
            f"this is a Wan image-to-video checkpoint ({config.in_dim} channels in, "
            f"{config.out_dim} out); use a text-to-video one: it continues from a first frame by "
            "itself"
        )
    if any(name.startswith("vace_") for name in tensors):
        raise UserError("this is a Wan VACE checkpoint; use a text-to-video one")
    if config.in_dim != LATENT_CHANNELS or config.out_dim != LATENT_CHANNELS:
        raise UserError(
            f"this Wan model has {config.in_dim} latent channels, expected {LATENT_CHANNELS} "
            "(Wan 2.1); Wan 2.2 5B needs another autoencoder and is not supported"
        )


def are_finite(ranges: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Which of some tensors hold neither NaN nor infinity, by their smallest and largest value.

    NaN goes through both. `torch.aminmax` is one pass at the speed of memory without a second
    tensor, where `isfinite` takes five times as long as a copy.

    Args:
        ranges: of each tensor, on one device; numbers of any floating-point type.
    """
    verdicts = [True] * len(ranges)
    by_type: dict[torch.dtype, list[int]] = {}
    for i, (low, _) in enumerate(ranges):
        by_type.setdefault(low.dtype, []).append(i)
    for places in by_type.values():
        both = torch.stack([torch.stack([ranges[i][side] for i in places]) for side in (0, 1)])
        for i, right in zip(places, torch.isfinite(both).all(0).tolist(), strict=True):
            verdicts[i] = right
    return verdicts


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return are_finite([torch.aminmax(tensor)])[0]


def _range(numbers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Finite only if number x scale is, everywhere; of a type that `are_finite` compares."""
    low, high = torch.aminmax(scale.to(numbers.device).float())
    if numbers.is_floating_point():  # int8 is always finite
        least, most = torch.aminmax(numbers.to(torch.bfloat16))
        low, high = low + 0 * least, high + 0 * most
    return low, high


def parameter_shapes(config: WanConfig) -> dict[str, torch.Size]:
    """Shape of every parameter of a model, in its order; all blocks are alike."""
    with torch.device("meta"):
        one = {k: p.shape for k, p in WanModel(replace(config, num_layers=1)).named_parameters()}
    inside = {k.removeprefix("blocks.0."): s for k, s in one.items() if k.startswith("blocks.0.")}
    shapes: dict[str, torch.Size] = {}
    for name, shape in one.items():
        if not name.startswith("blocks."):
            shapes[name] = shape
        elif "blocks.0." + next(iter(inside)) == name:
            for layer in range(config.num_layers):
                shapes |= {f"blocks.{layer}.{k}": s for k, s in inside.items()}
    return shapes


def some(names: Sequence[str]) -> str:
    """The first three of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
