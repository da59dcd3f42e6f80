"""Optimisers by their recipe's name, Muon among them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import TrainingRecipe

BY_ADAMW = ("encoder.stem.", "encoder.conv1.", "head.", "view.")  # a TransUNet's ends
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the inner layers' matrices, AdamW for everything else.

    Muon's step is the momentum with all its singular values set to about 1, scaled so that AdamW's
    rate and decay fit it (Liu et al. 2025, Eq. 4). A convolution's kernel is a matrix with a row
    for each of its first dimension. torch's own Muon works in bfloat16 alone, which many CPUs
    are slow at.

    Args:
        named: name and parameter of each that is trained.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], lr: float, weight_decay: float) -> None:
        inner = [p for n, p in named if p.ndim in (2, 4) and not any(x in n for x in BY_ADAMW)]
        chosen = {id(parameter) for parameter in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        super().__init__([{"params": inner}, {"params": rest}], {"lr": lr})
        self.weight_decay = weight_decay
        self._adamw = torch.optim.AdamW(rest, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        inner, rest = self.param_groups
        for parameter in inner["params"]:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, inner["lr"])
        self._adamw.param_groups[0]["lr"] = rest["lr"]
        self._adamw.step()

    def _move(self, kernel: Tensor, grad: Tensor, rate: float) -> None:
        state = self.state[kernel]
        if not state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum = state["momentum"].lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
        factor = 0.2 * max(ahead.shape) ** 0.5
        kernel.mul_(1 - rate * self.weight_decay)
        kernel.sub_(orthogonal(ahead).reshape_as(kernel), alpha=rate * factor)

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return super().state_dict() | {"adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; ValueError for what torch's Muon gave."""
        if "adamw" not in state_dict:
            raise ValueError("a checkpoint of an earlier Muon; start from its weights with --init")
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "adamw"})
        self._adamw.load_state_dict(state_dict["adamw"])


def orthogonal(matrix: Tensor) -> Tensor:
    """(a, b) -> (a, b): its singular values set to about 1, by five steps of Newton-Schulz.

    Jordan et al. 2024 with their coefficients, but on the matrix times its transpose, which is
    small: the steps are polynomials in it and commute.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram, product = matrix @ matrix.T, torch.eye(len(matrix), device=matrix.device)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix


def optimiser(network: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters that are trained."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if recipe.optimiser == "muon":
        return Muon(named, recipe.learning_rate, recipe.weight_decay)
    kind = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    settings: dict[str, Any] = {"weight_decay": recipe.weight_decay, "fused": True}
    return kind([parameter for _, parameter in named], recipe.learning_rate, **settings)
