"""The core's fast engine where ComfyUI has left the weights in a state that allows it.

The engine reads weights at fixed addresses and past their modules' own forwards. So it is for a
model that lies whole on the GPU as it is computed: nothing offloaded, nothing patched or widened at
each call. Everything else takes the modules' own path, `wan_forward` as it stands.

An engine lives as long as its run, and so does what it holds: recordings, cache, eight-bit copies.
Only the knowledge of what has been compiled stays with the model.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...lightforcing_core.errors import UserError
from ...lightforcing_core.fast.engine import SPEEDS as CORE_SPEEDS
from ...lightforcing_core.fast.engine import ForwardEngine
from ...lightforcing_core.fast.linears import (
    EIGHT_BIT_LAYERS,
    EIGHT_BIT_SPEEDS,
    with_eight_bit_linears,
)
from ...lightforcing_core.fast.operations import fused_obstacles
from ...lightforcing_core.fast.stack import blocks_obstacle
from ...lightforcing_core.graphs import graphs_obstacle
from ...lightforcing_core.memory import GIB
from ...lightforcing_core.presets import eight_bit_obstacles
from ...lightforcing_core.wan.forward import (
    PositionTable,
    SelfAttend,
    TextContext,
    TimeContext,
    wan_forward,
)
from .forwards import ForwardTally
from .memory import is_dynamic, is_on

log = logging.getLogger("lightforcing")

SPEEDS = ("auto", *CORE_SPEEDS)
"""auto: fast where nothing is in its way, else plain; the others as for the core's engine."""

_told: set[str] = set()
_seen: WeakKeyDictionary[Any, dict[Hashable, set[Hashable]]] = WeakKeyDictionary()


class _NotRecordedError(Exception):
    """A forward could not be recorded."""


class HostedEngine(ForwardEngine):
    """A `ForwardEngine` over weights that ComfyUI may move while it runs.

    When they have moved, its recordings are forgotten; while something is in its way, forwards
    take the modules' own path, with the same cache.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        tree: nn.Module,
        dtype: torch.dtype,
        *,
        eight_bit: torch.dtype | None = None,
        tally: ForwardTally | None = None,
        seen: set[Hashable] | None = None,
    ) -> None:
        """
        Args:
            patcher: the MODEL.
            tree: of its weights.
            dtype: of the forwards.
            eight_bit: exchange the linear layers of the blocks for copies in such numbers.
            tally: counts the forwards of the run.
            seen: as for `ForwardEngine`.
        """
        run_tree = tree if eight_bit is None else with_eight_bit_linears(tree, eight_bit)
        obstacle = graphs_obstacle(tree.patch_embedding.weight.device)
        if obstacle:
            _tell_once(f"forwards are fused but not recorded, which can be slower: {obstacle}")
        super().__init__(run_tree, graphs=not obstacle, seen=seen)
        self._patcher, self._host_tree, self._dtype = patcher, tree, dtype
        self._slots = [
            (module._parameters, name)
            for module in tree.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._addresses = self._find_addresses()
        self._tally = tally or ForwardTally("fast")
        self._tally.reason = obstacle
        self._is_plain = self._is_recording = False

    def __call__(
        self,
        x: Tensor,
        time: TimeContext,
        frame_indices: Sequence[int],
        text: TextContext,
        attend: SelfAttend,
        positions: PositionTable,
    ) -> Tensor:
        """As `ForwardEngine`."""
        if not torch.compiler.is_compiling() and self._has_moved():
            self.forget_recordings()
            obstacles = weights_obstacles(self._patcher, self._host_tree, self._dtype)
            self._is_plain = bool(obstacles)
            if obstacles:
                self._tally.reason = "; ".join(obstacles)
                log.warning("forwards as they stand from here on: %s", self._tally.reason)
        arguments = x, time, frame_indices, text, attend, positions
        # A compiled MODEL cannot record graphs of its own within; nor can it count, or every number
        # would be compiled.
        if torch.compiler.is_compiling():
            return wan_forward(self._host_tree, *arguments)
        if self._is_plain:
            self._tally.plain += 1
            self._has_run = True
            return wan_forward(self._host_tree, *arguments)
        launched = self._tally.fused
        try:
            velocity = super().__call__(*arguments)
        except _NotRecordedError as error:
            # As text, and left behind: an error holds the tensors of where it was raised.
            self._tally.reason = f"recording failed: {error}"
            log.warning("forwards are not recorded as CUDA graphs from here on: %s", str(error))
        else:
            self._tally.replayed += self._tally.fused == launched
            return velocity
        self.forget_recordings()
        self._graphs = False
        return super().__call__(*arguments)

    def _forward(self, *arguments: Any) -> Tensor:
        """As `ForwardEngine`; to be recorded, or to be run at once."""
        self._tally.fused += not self._is_recording
        return super()._forward(*arguments)

    def _record(self, *arguments: Any) -> Any:
        """As `ForwardEngine`. It fails where another node's code waits for the device, or memory is
        short; nothing has been computed then."""
        self._is_recording = True
        try:
            return super()._record(*arguments)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            raise _NotRecordedError(reason[0] if reason else type(error).__name__) from error
        finally:
            self._is_recording = False

    def _has_moved(self) -> bool:
        """Whether weights have changed places since this was last asked."""
        addresses = self._find_addresses()
        moved = addresses != self._addresses
        self._addresses = addresses
        return moved

    def _find_addresses(self) -> list[int]:
        return [parameters[name].data_ptr() for parameters, name in self._slots]


def run_engine(
    patcher: ModelPatcher,
    tree: nn.Module,
    dtype: torch.dtype,
    speed: str,
    *,
    needed_bytes: int,
    tally: ForwardTally | None = None,
    kind: Hashable = None,
) -> ForwardEngine | None:
    """The engine of a run that is about to begin; None: forwards as they stand.

    Args:
        patcher: the MODEL, loaded, and room made for the run.
        tree: of its weights.
        dtype: of the forwards.
        speed: one of SPEEDS.
        needed_bytes: what the run needs with an engine; auto does without one rather than without
            memory.
        tally: counts the run's forwards; is told if auto becomes plain.
        kind: what runs have in common that launch the same kernels.

    Raises:
        UserError: a speed that was chosen and cannot be had; lists every reason.
    """
    if speed == "plain":
        return None
    obstacles = engine_obstacles(patcher, tree, dtype, speed)
    if speed == "auto" and not obstacles:
        free = comfy.model_management.get_free_memory(patcher.load_device)
        if free < needed_bytes:
            obstacles.append(
                f"{needed_bytes / GIB:.1f} GiB are needed with it, {free / GIB:.1f} are free"
            )
    if obstacles:
        if speed != "auto":
            raise UserError(
                f"the speed '{speed}' cannot be used: {'; '.join(obstacles)}; choose auto or plain"
            )
        reasons = "; ".join(obstacles)
        _tell_once(f"forwards as they stand, not fused: {reasons}")
        if tally is not None:
            tally.speed, tally.reason = "plain", reasons
        return None
    numbers = EIGHT_BIT_SPEEDS.get(speed)
    seen = _seen.setdefault(patcher.model, {}).setdefault((numbers, dtype, kind), set())
    return HostedEngine(patcher, tree, dtype, eight_bit=numbers, tally=tally, seen=seen)


def engine_obstacles(
    patcher: ModelPatcher, tree: nn.Module, dtype: torch.dtype, speed: str = "fast"
) -> list[str]:
    """Why a MODEL that has been loaded cannot be run by the engine; empty: it can."""
    device = patcher.load_device
    if speed in EIGHT_BIT_SPEEDS:
        widths = {width for linear in _eight_bit_layers(tree) for width in linear.weight.shape}
        obstacles = eight_bit_obstacles(speed, device, dtype, tuple(widths))
    else:
        obstacles = fused_obstacles(device, dtype)
    if (unlike := blocks_obstacle(tree.blocks)) is not None:
        obstacles.append(unlike)
    return obstacles + weights_obstacles(patcher, tree, dtype)


def weights_obstacles(patcher: ModelPatcher, tree: nn.Module, dtype: torch.dtype) -> list[str]:
    """Why weights must go through their modules; empty: they lie there as they are computed."""
    device = patcher.load_device
    if is_dynamic(patcher):
        return [
            "ComfyUI brings this model's weights as they are needed (dynamic VRAM); to keep them "
            "on the GPU, start it with --disable-dynamic-vram"
        ]
    obstacles = []
    parameters = dict(tree.named_parameters())
    away = [name for name, p in parameters.items() if not is_on(p.device, device)]
    if away:
        obstacles.append(
            f"{len(away)} of {len(parameters)} weights are not on {device} (offloaded), the first "
            f"is {away[0]}; free memory, or choose a shorter window or a smaller video"
        )
    pending = [
        name
        for name, module in tree.named_modules()
        if getattr(module, "weight_function", None) or getattr(module, "bias_function", None)
    ]
    if pending:
        obstacles.append(
            f"{len(pending)} layers have patches (LoRA) that are computed at each call, the first "
            f"is {pending[0]}"
        )
    if getattr(patcher, "hook_patches", None):
        obstacles.append("hooks change weights while the run goes on")
    return obstacles + _layer_obstacles(tree, dtype)


def _layer_obstacles(tree: nn.Module, dtype: torch.dtype) -> list[str]:
    """Of the layers that the engine reads past their own forward."""
    unlike, special, replaced, heard = [], [], [], []
    for name, layer in _layers(tree):
        parameters = [p for p in layer._parameters.values() if p is not None]
        if any(type(p) not in (Tensor, nn.Parameter) for p in parameters):
            special.append(name)
        elif any(p.dtype != dtype for p in parameters):
            unlike.append(name)
        if "forward" in vars(layer):
            replaced.append(name)
        if layer._forward_hooks or layer._forward_pre_hooks:
            heard.append(name)
    computed = str(dtype).removeprefix("torch.")
    found = {
        f"are stored in another type than {computed}, which they are computed in": unlike,
        "have weights of a format of their own": special,
        "were replaced by another node": replaced,
        "have hooks of another node": heard,
    }
    return [
        f"{len(names)} layers {what}, the first is {names[0]}"
        for what, names in found.items()
        if names
    ]


def _layers(tree: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in tree.blocks.named_modules(prefix="blocks"):
        if next(module.children(), None) is None:
            yield name, module


def eight_bit_bytes(tree: nn.Module) -> int:
    """What the eight-bit copies of a tree's layers take."""
    total = 0
    for linear in _eight_bit_layers(tree):
        wide, narrow = linear.weight.shape
        total += wide * narrow + 6 * wide  # and scale and bias of each output
    return total


def _eight_bit_layers(tree: nn.Module) -> Iterator[nn.Module]:
    """Those that eight-bit speeds exchange."""
    for block in tree.blocks:
        for name in EIGHT_BIT_LAYERS:
            yield block.get_submodule(name)


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.info(message)
