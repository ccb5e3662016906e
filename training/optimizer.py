"""Muon for the hidden matrices, Adam for the rest, on float32 masters of a low-precision network.

The network computes in its own dtype, as it will when it is used; the optimizer keeps float32
masters, and an exponential moving average of them, which is what is saved.

Muon: the momentum of a matrix is orthogonalised by a few Newton-Schulz iterations, and scaled so
that the update has the root mean square of a typical Adam update; one learning rate serves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .common import is_distributed

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Bring all singular values near 1: [N, a, b] -> [N, a, b]."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x.transpose(1, 2) if wide else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if wide else x).to(matrices.dtype)


class MasterOptimizer:
    """Trains a module through float32 masters, with gradient clipping and a moving average.

    Args:
        module: the network; its parameters get the masters' values after each step.
        use_muon: which parameters use Muon, by name and tensor; convolutions count as matrices
            [out, in x kernel].
        ema: decay of the moving average per step.
        clip: largest global norm of the gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        use_muon: Callable[[str, Tensor], bool],
        ema: float = 0.998,
        clip: float = 1.0,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        named = list(module.named_parameters())
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.average = [m.clone() for m in self.masters]
        self.ema, self.clip, self.weight_decay, self.betas = ema, clip, weight_decay, betas
        self.steps = 0
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (name, p) in enumerate(named):
            if use_muon(name, p):
                groups[tuple(p.shape)].append(i)
        self._muon = list(groups.values())
        chosen = {i for group in self._muon for i in group}
        self._adam = [i for i in range(len(named)) if i not in chosen]
        self._momentum = [torch.stack([self.masters[i] for i in g]) * 0 for g in self._muon]
        self._first = [torch.zeros_like(self.masters[i]) for i in self._adam]
        self._second = [torch.zeros_like(self.masters[i]) for i in self._adam]

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """Apply the parameters' gradients and clear them; returns the gradient norm (a tensor)."""
        grads = [p.grad.float() for p in self.parameters]
        if is_distributed():
            self._average_over_processes(grads)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        self._adam_step(grads, rate)
        self._muon_step(grads, rate)
        torch._foreach_copy_(self.parameters, self.masters)
        # Early on the average would remember the initial weights: let it follow faster.
        decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.masters, 1 - decay)
        for p in self.parameters:
            p.grad = None
        return norm

    def _average_over_processes(self, grads: list[Tensor]) -> None:
        flat = torch.cat([g.flatten() for g in grads])
        torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.AVG)
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        if self.steps % 100 == 0:
            # Masters follow the same gradients everywhere; this removes what rounding adds.
            for tensor in (*self.masters, *self.average):
                torch.distributed.broadcast(tensor, src=0)

    def _adam_step(self, grads: list[Tensor], rate: float) -> None:
        beta1, beta2 = self.betas
        own = [grads[i] for i in self._adam]
        masters = [self.masters[i] for i in self._adam]
        torch._foreach_lerp_(self._first, own, 1 - beta1)
        torch._foreach_mul_(self._second, beta2)
        torch._foreach_addcmul_(self._second, own, own, 1 - beta2)
        scale = torch._foreach_div(self._second, 1 - beta2**self.steps)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(masters, self._first, scale, -rate / (1 - beta1**self.steps))

    def _muon_step(self, grads: list[Tensor], rate: float) -> None:
        for group, momentum in zip(self._muon, self._momentum, strict=True):
            own = torch.stack([grads[i] for i in group])
            momentum.lerp_(own, 0.05)
            update = orthogonalise(torch.lerp(own, momentum, 0.95).flatten(2))
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            update = update.view_as(own)
            masters = [self.masters[i] for i in group]
            torch._foreach_mul_(masters, 1 - rate * self.weight_decay)
            torch._foreach_add_(masters, list(update.unbind()), alpha=-rate * scale)

    def averaged(self) -> dict[str, Tensor]:
        """The moving average by name, float32."""
        return dict(zip(self.names, self.average, strict=True))
