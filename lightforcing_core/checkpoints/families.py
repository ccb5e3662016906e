"""Families of published autoregressive Wan weights: their settings, and what is not reproduced.

Their tensors have the same names and shapes, so a file does not say which family it is of, unless
its metadata does. `identify` says what it knows and from where.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..timesteps import SELF_FORCING_STEPS, warp_steps
from .presets import Preset

_ROLLING_STEPS = warp_steps((1000, 800, 600, 400, 200), shift=5.0)
_TWO_STEPS = warp_steps((1000, 500), shift=5.0)
_AT_READ = "positions applied when keys are read, not when they are written"
_AR_SIZES = {1536: "1.3B", 5120: "14B"}
_SIZES = ("width", "height", "frames")
# Published in two folders under one file name.
_SHARED_NAME = r"\bcausal ?forcing\b"
_SAME_NAME = ("causal_forcing", "causal_forcing_framewise")


@dataclass(frozen=True)
class Family:
    """One family of published weights.

    Attributes:
        name: what --family takes.
        title: for people.
        preset: what it was trained for.
        sizes: '1.3B', '14B'.
        file_names: pattern of the published files' names, see `_scopes`.
        not_reproduced: what its published sampler does and this engine does not.
        needs_lora: the weights are only a base; the product is base and LoRA.
    """

    name: str
    title: str
    preset: Preset = field(default_factory=Preset)
    sizes: tuple[str, ...] = ("1.3B",)
    file_names: str = ""
    not_reproduced: tuple[str, ...] = ()
    needs_lora: bool = False


FAMILIES: tuple[Family, ...] = (
    Family(
        "self_forcing",
        "Self Forcing",
        file_names=r"\bself ?forcing\b|\bode init\b|\bsfwan",
    ),
    Family(
        "causal_forcing_2step",
        "Causal Forcing++, two steps",
        Preset(frames_per_chunk=1, steps=_TWO_STEPS, first_chunk_steps=SELF_FORCING_STEPS),
        file_names=r"\b(framewise|causal ?forcing)\b.*\b2 ?steps?\b",
    ),
    Family(
        "causal_forcing_1step",
        "Causal Forcing++, one step",
        Preset(frames_per_chunk=1, steps=(1000.0,), first_chunk_steps=SELF_FORCING_STEPS),
        file_names=r"\b(framewise|causal ?forcing)\b.*\b1 ?steps?\b",
    ),
    Family(
        "causal_forcing_framewise",
        "Causal Forcing, frame by frame",
        Preset(frames_per_chunk=1),
        file_names=r"\bframewise\b",
    ),
    Family(
        "causal_forcing_long",
        "Causal Forcing, long video",
        Preset(window_frames=21, sink_frames=3),
        file_names=r"\b(chunkwise|causal ?forcing)\b.*\blong ?video\b",
        not_reproduced=(
            "rolling denoising of four chunks at once",
            "sink positions moved along with the window",
        ),
    ),
    Family(
        "causal_forcing",
        "Causal Forcing, chunk by chunk",
        file_names=r"\bchunkwise\b",
    ),
    Family(
        "longlive",
        "LongLive",
        Preset(window_frames=12, sink_frames=3),
        file_names=r"\blong ?live\b",
        not_reproduced=("past frames computed again when the prompt changes",),
        needs_lora=True,
    ),
    Family(
        "memflow",
        "MemFlow",
        Preset(window_frames=12, sink_frames=3),
        file_names=r"\bmem ?flow\b",
        not_reproduced=("memory bank of past frames, chosen by the prompt",),
        needs_lora=True,
    ),
    Family(
        "rolling_forcing",
        "Rolling Forcing",
        Preset(steps=_ROLLING_STEPS, window_frames=21, sink_frames=3),
        file_names=r"\brolling ?forcing\b",
        not_reproduced=(
            "rolling denoising of five chunks at once",
            "sink positions moved along with the window",
        ),
    ),
    Family(
        "reward_forcing",
        "Reward Forcing",
        Preset(window_frames=9, sink_frames=3),
        file_names=r"\breward ?forcing\b",
        not_reproduced=("sink averaged with the frames that leave the window", _AT_READ),
    ),
    Family(
        "streamdiffusion_v2",
        "StreamDiffusionV2",
        Preset(frames_per_chunk=1, window_frames=6, sink_frames=3),
        sizes=("1.3B", "14B"),
        file_names=r"\bstream ?diffusion ?v2\b|\bcausal dmd v2v\b",
        not_reproduced=("video to video from noise level 0.7, without a clean pass",),
    ),
    Family(
        "krea",
        "Krea Realtime 14B",
        Preset(window_frames=6),
        sizes=("14B",),
        file_names=r"\bkrea\b",
        not_reproduced=(
            "keys and values recomputed from the last frames before every chunk",
            "first frame of the window encoded again from decoded pixels",
        ),
    ),
    Family(
        "light_forcing_long",
        "Light Forcing, long videos",
        Preset(window_frames=12, sink_frames=1, width=768, height=512),
        file_names=r"\blong video gen\b",
        not_reproduced=(_AT_READ,),
    ),
    Family(
        "light_forcing",
        "Light Forcing, 81 frames",
        Preset(width=768, height=512),
        file_names=r"\bshort video gen\b",
    ),
)


@dataclass(frozen=True)
class Identification:
    """What is known about a file's family.

    Attributes:
        family: None when it cannot be told.
        candidates: the families it could be, when it cannot be told.
        reason: where the answer comes from.
        preset: settings to start from.
    """

    family: Family | None
    candidates: tuple[Family, ...]
    reason: str
    preset: Preset


def _scopes(path: Path) -> tuple[str, str]:
    """What a path says, as words: the file's own name, and that after its folder's.

    Links are not followed: download caches link a telling name to a hash, below a folder of the
    repository's name ('models--org--name/snapshots/hash/...').
    """
    whole = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() follows links)
    parts = [part for part in whole.parts if part != "transformer"]
    folder = parts[-2] if len(parts) > 1 else ""
    if "snapshots" in parts[1:]:
        folder = f"{parts[parts.index('snapshots') - 1].split('--')[-1]} {folder}"

    def words(text: str) -> str:
        return re.sub(r"[\W_]+", " ", text.lower()).strip()

    return words(parts[-1]), words(f"{folder} {parts[-1]}")


def family_by_name(name: str) -> Family:
    """Raises UserError, with the names there are, for an unknown one."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"unknown family '{name}'; the families are {known}")


def identify(
    width: int, facts: dict[str, object], path: Path, chosen: str | None = None
) -> Identification:
    """Find out which family a denoiser is of.

    The user's choice comes first, then the file's own metadata, then its name. Tensors only say
    the size: what remains is a list of candidates, and the settings that most of them share.

    Args:
        width: of the model.
        facts: our metadata in the file (`metadata.read_facts`).
        path: the file.
        chosen: name of a family, when the user says it.

    Raises:
        UserError: an unknown family, or metadata out of range.
    """
    named = facts.get("family")
    if chosen is not None:
        family = family_by_name(chosen)
        # Settings in the file belong to the family it names; of another one only sizes are taken.
        own = facts if named == chosen else {k: v for k, v in facts.items() if k in _SIZES}
        return Identification(family, (), "chosen", family.preset.updated(own))
    if isinstance(named, str):
        family = family_by_name(named)
        return Identification(family, (), "the file's metadata", family.preset.updated(facts))
    if "steps" in facts:
        return Identification(None, (), "the file's metadata", Preset().updated(facts))
    size = _AR_SIZES.get(width)
    possible = tuple(f for f in FAMILIES if size is None or size in f.sizes)
    for words in _scopes(path):
        for family in possible:
            if re.search(family.file_names, words):
                reason = "the file's name, its tensors do not say"
                return Identification(family, (), reason, family.preset.updated(facts))
    candidates = tuple(family_by_name(n) for n in _SAME_NAME if family_by_name(n) in possible)
    if candidates and re.search(_SHARED_NAME, _scopes(path)[1]):
        reason = "the file's name fits more than one"
        return Identification(None, candidates, reason, candidates[0].preset.updated(facts))
    return Identification(None, possible, "nothing says", Preset().updated(facts))
