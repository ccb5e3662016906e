"""What our nodes leave on a MODEL for the sampler: immutable objects in its transformer options.

They travel with the MODEL through any other node, are copied with it, and hold no tensor and no
state of a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...lightforcing_core.checkpoints.presets import Preset
from ...lightforcing_core.sparse_settings import SparseSettings

_MODEL_KEY = "lightforcing_model"
_SPARSE_KEY = "lightforcing_sparse"


@dataclass(frozen=True)
class ModelFacts:
    """What Load Model read about the weights.

    Attributes:
        name: of the file, for messages.
        preset: settings they were trained for.
    """

    name: str
    preset: Preset


@dataclass(frozen=True)
class SparseChoice:
    """What a Sparse Attention node says.

    Attributes:
        node_id: of that node in the graph, by which a running sampler finds its sliders.
        settings: as the node's inputs come to.
        enabled: its switch; off: dense, with the settings kept for switching on.
    """

    node_id: str
    settings: SparseSettings
    enabled: bool = True


def with_facts(model: ModelPatcher, facts: ModelFacts) -> None:
    """Note on a MODEL of our own making what its file said."""
    model.model_options["transformer_options"][_MODEL_KEY] = facts


def facts_of(model_options: Mapping[str, Any]) -> ModelFacts | None:
    """What Load Model noted; None for a MODEL of another loader."""
    return model_options.get("transformer_options", {}).get(_MODEL_KEY)


def with_sparse(model: ModelPatcher, choice: SparseChoice) -> None:
    """Put a choice on a clone of a MODEL; it replaces that of an earlier node."""
    model.model_options["transformer_options"][_SPARSE_KEY] = choice


def without_sparse(model: ModelPatcher) -> None:
    """Take the choice off a clone of a MODEL: a sampler then makes a dense video."""
    model.model_options["transformer_options"].pop(_SPARSE_KEY, None)


def sparse_of(transformer_options: Mapping[str, Any]) -> SparseChoice | None:
    """The choice of the last Sparse Attention node before the sampler; None without one."""
    return transformer_options.get(_SPARSE_KEY)
