"""Which layout a Wan denoiser's file has, and its tensors under Wan's own names.

Everything is decided by the names of the tensors, never by the name of the file. A denoiser lies
under every prefix P for which 'P patch_embedding.weight' exists; a training checkpoint has several
(generator, its average, critics), and `_rank` says which is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .archive import one_line
from .metadata import OUR_KEY
from .names import from_diffusers, is_diffusers, strip_noise
from .quantised import Unscaled, take_scales

_MARKER = "patch_embedding.weight"
_TIES = "blocks.0."  # a denoiser has blocks; an embedding alone is something else
_HOST_PREFIXES = ("", "diffusion_model.", "model.diffusion_model.")
_MAX_ROOTS = 64  # every one costs a pass over the names; trainers write three
_AVERAGES = frozenset({"ema", "averaged", "average", "avg", "swa"})
_SIDES = frozenset({"critic", "score", "discriminator", "teacher", "reward", "real", "fake"})


@dataclass(frozen=True)
class Recognised:
    """A denoiser found in a file.

    Attributes:
        format: identifier, see docs/CHECKPOINTS.md.
        root: what stood before Wan's names, 'generator_ema.model.' or ''.
        weights: tensors under Wan's own names, scales apart.
        passed_over: prefixes of other denoisers in the same file that were not read.
    """

    format: str
    root: str
    weights: Unscaled
    passed_over: tuple[str, ...]

    @property
    def is_average(self) -> bool:
        """Whether these are the averaged (EMA) weights of a training checkpoint."""
        return bool(_words(self.root) & _AVERAGES)


def recognise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Recognised:
    """Find the denoiser in a file.

    Raises:
        UserError: there is none (says what there is), there are several and nothing says which
            is meant, two tensors have one name, or scales do not fit their weights.
    """
    clean: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = strip_noise(name)
        if short in clean:
            raise UserError(f"two tensors become '{short}'; the file mixes several models")
        clean[short] = tensor
    roots = sorted(_roots(clean), key=lambda root: (_rank(root), root))
    if not roots:
        raise UserError(
            f"this file is {describe(clean)}, not a Wan denoiser; expected a tensor "
            f"'{_MARKER}': give the diffusion model's file here{_instead(clean)}"
        )
    root, *others = roots
    if others and _rank(others[0]) == _rank(root):
        raise UserError(
            f"this file holds two denoisers, under '{one_line(root, 100)}' and "
            f"'{one_line(others[0], 100)}', and which to use cannot be known; give a file with "
            "one of them"
        )
    inner = {k.removeprefix(root): v for k, v in clean.items() if k.startswith(root)}
    # A shorter prefix ('' beside 'ema.') also covers the names of the longer ones.
    nested = [other.removeprefix(root) for other in others if other.startswith(root)]
    inner = {k: v for k, v in inner.items() if not k.startswith(tuple(nested))} if nested else inner
    diffusers = is_diffusers(inner)
    if diffusers:
        inner = {from_diffusers(name): tensor for name, tensor in inner.items()}
    weights = take_scales(inner, metadata)
    if diffusers:
        layout = "diffusers"
    elif weights.layout is not None:
        layout = weights.layout
    elif OUR_KEY in metadata:
        layout = "lightforcing"
    else:
        layout = "comfyui" if root in _HOST_PREFIXES else "self_forcing"
    return Recognised(layout, root, weights, tuple(others))


def _roots(tensors: Mapping[str, Tensor]) -> list[str]:
    found = []
    for name in tensors:
        root = name.removesuffix(_MARKER)
        if name.endswith(_MARKER) and (not root or root.endswith(".")):
            found.append(root)
    if len(found) > _MAX_ROOTS:
        raise UserError(
            f"this file holds {len(found)} tensors '...{_MARKER}', expected at most {_MAX_ROOTS} "
            "denoisers in a file; give another file"
        )
    with_blocks = set()
    for root in found:
        ties = f"{root}{_TIES}"
        if any(name.startswith(ties) for name in tensors):
            with_blocks.add(root)
    # A file whose first block is missing is still a denoiser, to be told so.
    return [root for root in found if root in with_blocks] or found


def _words(root: str) -> set[str]:
    return set(root.lower().replace("_", ".").split("."))


def _rank(root: str) -> tuple[bool, bool, bool, int]:
    """Sort key: no critic or teacher, then averages, then generators, then the shortest prefix."""
    words = _words(root)
    return bool(words & _SIDES), not words & _AVERAGES, "generator" not in words, len(root)


def describe(tensors: Mapping[str, Tensor]) -> str:
    """What the names of some tensors look like, in a few words."""
    names = list(tensors)

    def some(*needles: str) -> bool:
        return any(needle in name for name in names for needle in needles)

    if some("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up"):
        return "a LoRA"
    if some("hada_w1", "lokr_w", "oft_blocks"):
        return "a LoRA-like adapter (LoHa, LoKr or OFT)"
    if some("decoder.middle.0.residual", "decoder.upsamples"):
        return "a Wan VAE"
    if some("decoder.mid_block.", "decoder.up_blocks."):
        return "a VAE in the diffusers layout"
    if some("decoder.22.", "decoder.1.weight"):
        return "a TAEHV autoencoder"
    if some("encoder.block.0.layer.0.SelfAttention", "spiece_model", "token_embedding.weight"):
        return "a T5 text encoder"
    if some(".img_in.", "double_blocks.", "single_blocks."):
        return "another diffusion model (HunyuanVideo or Flux)"
    if some("model.diffusion_model.input_blocks", "down_blocks."):
        return "another diffusion model (a U-Net)"
    if some(_MARKER):
        return "a Wan denoiser"
    if some("self_attn.norm_q.weight"):
        return f"a Wan denoiser without its '{_MARKER}'"
    if some(".weight_qdata", "transformer_blocks."):
        return "another transformer"
    example = f", such as '{names[0][:80]}'" if names else ""
    return f"a file of {len(names)} tensors of unknown kind{example}"


def _instead(tensors: Mapping[str, Tensor]) -> str:
    """Where a file of another kind belongs, as the end of a sentence."""
    kind = describe(tensors)
    if kind == "a LoRA":
        return ", and this one as --lora"
    if "VAE" in kind or "TAEHV" in kind:
        return ", and this one as --vae"
    if "text encoder" in kind:
        return ", and this one as --text-encoder"
    return ""
