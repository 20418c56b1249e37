"""Muon: momentum whose every step is an orthogonal matrix, for the weight matrices inside a network.

PyTorch ships a Muon whose iterations always run in bfloat16; on a CPU without bfloat16 arithmetic one step of it takes longer
than the gradients of ten. This one runs in the weights' own precision, and stacks matrices of one shape.
"""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at zero, values end between about 0.7 and 1.2


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Bring every singular value near 1 and keep the singular vectors (Newton–Schulz, Jordan et al., *Muon*, 2024).

    Parameters
    ----------
    matrices : (n, rows, columns), rows ≤ columns
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(iterations):
        gram = x @ x.mT  # (n, rows, rows)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.AdamW):
    """Muon for the groups marked ``muon=True``, fused AdamW for all others.

    The orthogonal step is scaled by 0.2·√(larger side), which makes it as large as AdamW's at the same learning rate
    (Liu et al., *Muon is scalable for LLM training*, 2025). Weight decay is decoupled in both.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas: tuple = (0.9, 0.98)) -> None:
        super().__init__([{"muon": False} | group for group in groups], lr=lr, betas=betas, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing here computes a loss twice
        """Take one step and drop the gradients of Muon's matrices."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        super().step()  # AdamW passes over parameters without a gradient

    def _step_matrices(self, group: dict) -> None:
        by_shape: dict[tuple, list[torch.nn.Parameter]] = {}
        for p in group["params"]:
            by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
        for parameters in by_shape.values():
            updates = []
            for p in parameters:
                assert p.grad is not None  # every matrix of a layer takes part in every loss
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - self.momentum)
                updates.append(_wide(p.grad.lerp(buffer, self.momentum)))  # Nesterov's look ahead
            for p, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_wide(update, like=p), alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
                p.grad = None


def _wide(matrix: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix with its longer side across, or turned back to the shape of `like`."""
    turned = matrix.shape[0] > matrix.shape[1] if like is None else matrix.shape != like.shape
    return matrix.mT if turned else matrix
