"""Names of Wan's parameters in other people's files, as rules on strings.

Wan's own names are those of the published Wan 2.1 checkpoints (`wan.modules`). The diffusers table
is that of WanTransformer3DModel (diffusers, scripts/convert_wan_to_diffusers.py), read backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Wrappers of torch: FSDP, activation checkpointing, torch.compile, DDP.
_NOISE = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})

# What stands before a denoiser's own names: containers of trainers, PEFT, ComfyUI, diffusers.
_OUTER = frozenset(
    {
        "base_model",
        "diffusion_model",
        "dit",
        "generator",
        "generator_ema",
        "generator_lora",
        "generator_lora_ema",
        "model",
        "net",
        "pipe",
        "state_dict",
        "transformer",
        "unet",
    }
)

# Modules and bare parameters of Wan 2.1, of its image-to-video variant too.
_TOP = frozenset(
    {
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
        "head.modulation",
        "img_emb.proj.0",
        "img_emb.proj.1",
        "img_emb.proj.3",
        "img_emb.proj.4",
        "img_emb.emb_pos",
    }
)
_ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k")
_IN_BLOCK = frozenset(
    {
        *(f"self_attn.{part}" for part in _ATTENTION),
        *(f"cross_attn.{part}" for part in (*_ATTENTION, "k_img", "v_img", "norm_k_img")),
        "ffn.0",
        "ffn.2",
        "norm3",
        "modulation",
    }
)
_BARE = re.compile(r"(?:^|\.)(?:modulation|emb_pos)$")

_DIFFUSERS_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
_DIFFUSERS_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
_DIFFUSERS_IN_BLOCK = {
    **{f"attn1.{theirs}": f"self_attn.{ours}" for theirs, ours in _DIFFUSERS_ATTENTION.items()},
    **{f"attn2.{theirs}": f"cross_attn.{ours}" for theirs, ours in _DIFFUSERS_ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
# Wan counts its norms norm1, norm3, norm2 in the order of use; diffusers norm1, norm2, norm3.
# It proves no layout: 'norm2' is a name (without parameters) in Wan's blocks too.
_DIFFUSERS_NORM = {"norm2": "norm3"}

_LONGEST = 1 + max(name.count(".") for name in (*_DIFFUSERS_TOP, *_DIFFUSERS_IN_BLOCK))

_BLOCK = re.compile(r"blocks\.([0-9]+)\.(.+)")
_KOHYA_BLOCK = re.compile(r"blocks_([0-9]+)_(.+)")
_KOHYA_PREFIX = re.compile(r"(?:lora_unet|lora_transformer|lycoris)__?")


def strip_noise(name: str) -> str:
    """The name without the segments that torch's wrappers add, wherever they stand."""
    return ".".join(segment for segment in name.split(".") if segment not in _NOISE)


def strip_outer(name: str) -> str:
    """The name without what stands before a denoiser's own names.

    'base_model.model.', 'model.diffusion_model.', 'transformer.', 'generator_lora.' and any row
    of them; call `strip_noise` first.
    """
    segments = name.split(".")
    start = 0
    # 'net' before a number is a list of layers in diffusers ('ffn.net.2'), not a container.
    while (
        start < len(segments) - 1
        and segments[start] in _OUTER
        and not segments[start + 1].isdecimal()
    ):
        start += 1
    return ".".join(segments[start:])


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether any of some names (without prefix) is one that only diffusers gives."""
    return any(_renamed(name, _DIFFUSERS_TOP, _DIFFUSERS_IN_BLOCK) is not None for name in names)


def from_diffusers(name: str) -> str:
    """Wan's name for a module or parameter of diffusers' WanTransformer3DModel.

    Args:
        name: without prefix; whatever follows the module ('.weight', '.lora_A.weight') stays.

    Returns:
        Wan's name; any other name unchanged. A block's 'norm2' becomes 'norm3', so call this only
        where `is_diffusers` holds for the file.
    """
    renamed = _renamed(name, _DIFFUSERS_TOP, _DIFFUSERS_IN_BLOCK | _DIFFUSERS_NORM)
    return name if renamed is None else renamed


def from_kohya(name: str) -> str | None:
    """Wan's dotted name for a module in kohya's naming, or None when it is no module of Wan.

    Args:
        name: as 'lora_unet_blocks_0_self_attn_q' (one or two underscores after the prefix), also
            with diffusers' module names ('lora_unet_blocks_0_attn1_to_q').
    """
    prefix = _KOHYA_PREFIX.match(name)
    if prefix is None:
        return None
    rest = name[prefix.end() :]
    if (block := _KOHYA_BLOCK.fullmatch(rest)) is None:
        return _KOHYA_TOP.get(rest)
    inner = _KOHYA_IN_BLOCK.get(block[2])
    return None if inner is None else f"blocks.{block[1]}.{inner}"


def parameter_of(module: str, kind: str = "weight") -> str | None:
    """The parameter of a Wan module ('blocks.0.ffn.0' -> 'blocks.0.ffn.0.weight').

    Args:
        module: Wan's dotted name; a bare parameter ('blocks.0.modulation') is its own weight.
        kind: 'weight' or 'bias'.

    Returns:
        The name, or None when Wan 2.1 has no such module or a bare parameter has no bias.
    """
    block = _BLOCK.fullmatch(module)
    known = module in _TOP if block is None else block[2] in _IN_BLOCK
    if not known:
        return None
    if _BARE.search(module):
        return module if kind == "weight" else None
    return f"{module}.{kind}"


def _renamed(name: str, top: dict[str, str], in_block: dict[str, str]) -> str | None:
    """The name with its longest leading path in a table replaced, or None when none is."""
    block = _BLOCK.fullmatch(name)
    before, rest, table = "", name, top
    if block is not None:
        before, rest, table = f"blocks.{block[1]}.", block[2], in_block
    segments = rest.split(".")
    # No further: a hostile name has hundreds of segments, and a file thousands of such names.
    for end in range(min(len(segments), _LONGEST), 0, -1):
        found = table.get(".".join(segments[:end]))
        if found is not None:
            return before + ".".join([found, *segments[end:]])
    return None


def _underscored(own: Iterable[str], diffusers: dict[str, str]) -> dict[str, str]:
    """Module names as kohya writes them, to Wan's dotted ones."""
    both = {name: name for name in own} | diffusers
    return {name.replace(".", "_"): dotted for name, dotted in both.items()}


_KOHYA_TOP = _underscored(_TOP, _DIFFUSERS_TOP)
_KOHYA_IN_BLOCK = _underscored(_IN_BLOCK, _DIFFUSERS_IN_BLOCK)
