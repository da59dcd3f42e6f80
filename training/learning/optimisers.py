"""The recipes' optimisers: Adam, AdamW and Muon."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import TrainingRecipe

BY_ADAMW = ("encoder.stem.", "encoder.conv1.", "head.", "view.")  # first and last layers, by name
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the inner layers' matrices, AdamW for everything else.

    Muon's step is the momentum with all its singular values set to about 1. It is scaled so that a
    learning rate and weight decay for AdamW suit it too (Liu et al. 2025, Eq. 4). A convolution's
    kernel counts as a matrix with a row for each output channel. torch's own Muon works in bfloat16
    only, which many CPUs are slow at.

    Args:
        parameters: those to train, with their names.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], lr: float, weight_decay: float
    ) -> None:
        inner = [
            p for n, p in parameters if p.ndim in (2, 4) and not any(part in n for part in BY_ADAMW)
        ]
        by_muon = {id(parameter) for parameter in inner}
        rest = [p for _, p in parameters if id(p) not in by_muon]
        super().__init__([{"params": inner}, {"params": rest}], {"lr": lr})
        self.weight_decay = weight_decay
        self._adamw = torch.optim.AdamW(rest, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        inner, rest = self.param_groups
        for parameter in inner["params"]:
            if parameter.grad is not None:
                self._update(parameter, parameter.grad, inner["lr"])
        self._adamw.param_groups[0]["lr"] = rest["lr"]
        self._adamw.step()

    def _update(self, kernel: Tensor, grad: Tensor, rate: float) -> None:
        state = self.state[kernel]
        if not state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum = state["momentum"].lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's momentum
        factor = 0.2 * max(ahead.shape) ** 0.5
        kernel.mul_(1 - rate * self.weight_decay)
        kernel.sub_(orthogonalise(ahead).reshape_as(kernel), alpha=rate * factor)

    def state_dict(self) -> dict[str, Any]:
        """The states of Muon and of the AdamW in it."""
        return super().state_dict() | {"adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            ValueError: the state is torch's own Muon's, which earlier versions used.
        """
        if "adamw" not in state_dict:
            raise ValueError(
                "the checkpoint was written with torch's own Muon, which cannot be resumed; start "
                "from its weights with --init"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "adamw"})
        self._adamw.load_state_dict(state_dict["adamw"])


def orthogonalise(matrix: Tensor) -> Tensor:
    """(a, b) -> (a, b): set the singular values to about 1 by Newton-Schulz iteration.

    This is the iteration of Jordan et al. 2024, computed on the small matrix times its transpose:
    each step is a polynomial in it, so the steps commute.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram, product = matrix @ matrix.T, torch.eye(len(matrix), device=matrix.device)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix


def make_optimiser(network: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """The recipe's optimiser, for all parameters that require a gradient."""
    parameters = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if recipe.optimiser == "muon":
        return Muon(parameters, recipe.learning_rate, recipe.weight_decay)
    adam = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    settings: dict[str, Any] = {"weight_decay": recipe.weight_decay, "fused": True}
    return adam([parameter for _, parameter in parameters], recipe.learning_rate, **settings)
