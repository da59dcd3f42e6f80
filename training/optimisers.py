"""Optimisers by their recipe's name, Muon among them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import Recipe

BY_ADAMW = ("encoder.stem.", "encoder.conv1.", "head.", "view.")  # a TransUNet's ends


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the inner layers' matrices, AdamW for everything else.

    Muon's step is the momentum with all its singular values set to about 1, scaled so that AdamW's
    rate and decay fit it (Liu et al. 2025, Eq. 4). A convolution's kernel is a matrix with a row
    for each of its first dimension. torch's own Muon does it; this class shows it such matrices.

    Args:
        named: name and parameter of each that is trained.

    Raises:
        ValueError: a kernel does not lie in memory with the channels last.
    """

    def __init__(self, named: list[tuple[str, Tensor]], lr: float, weight_decay: float) -> None:
        inner = [p for n, p in named if p.ndim in (2, 4) and not any(x in n for x in BY_ADAMW)]
        chosen = {id(parameter) for parameter in inner}
        rest = [p for _, p in named if id(p) not in chosen]
        groups = [{"params": inner}, {"params": rest}]
        super().__init__(groups, {"lr": lr})
        self._views = [_as_matrix(parameter.detach()) for parameter in inner]
        if any(v.data_ptr() != p.data_ptr() for v, p in zip(self._views, inner, strict=True)):
            raise ValueError("Muon needs network.to(memory_format=torch.channels_last)")
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self._parts = [
            torch.optim.Muon(self._views, adjust_lr_fn="match_rms_adamw", **settings),
            torch.optim.AdamW(rest, fused=True, **settings),
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for view, parameter in zip(self._views, self.param_groups[0]["params"], strict=True):
            view.grad = None if parameter.grad is None else _as_matrix(parameter.grad)
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return super().state_dict() | {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "parts"})
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def optimiser(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser of all parameters that are trained."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    if recipe.optimiser == "muon":
        return Muon(named, recipe.learning_rate, recipe.weight_decay)
    kind = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    settings: dict[str, Any] = {"weight_decay": recipe.weight_decay, "fused": True}
    return kind([parameter for _, parameter in named], recipe.learning_rate, **settings)


def _as_matrix(kernel: Tensor) -> Tensor:
    """(a, b), or (a, b, h, w) as (a, h w b): a view where the channels are last in memory."""
    return kernel if kernel.ndim == 2 else kernel.permute(0, 2, 3, 1).flatten(1)
