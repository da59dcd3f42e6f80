"""Muon: which parameters it moves, how far, and what it leaves to AdamW."""

import pytest
import torch
from torch import nn

from model.network import build_network
from test.test_network import SMALL
from training.optimisers import BY_ADAMW, optimiser
from training.recipes import COMPACT

RATE = 0.01
RECIPE = COMPACT.model_copy(
    update={
        "optimiser": "muon",
        "learning_rate": RATE,
        "weight_decay": 0.0,
        "network": SMALL,
    }
)


def network() -> nn.Module:
    torch.manual_seed(1)
    return build_network(SMALL, 2).to(memory_format=torch.channels_last)


def stepped(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A network's parameters before and after one step of an optimiser."""
    net = network()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    moving = optimiser(net, RECIPE.model_copy(update={"optimiser": name}))
    for parameter in net.parameters():
        grad = torch.randn(parameter.shape)
        if parameter.ndim in (2, 4):  # of singular values 1 to 5, whatever its shape
            nn.init.orthogonal_(grad).transpose(0, -1).mul_(torch.linspace(1, 5, len(grad)))
        parameter.grad = grad
    moving.step()
    return before, dict(net.named_parameters())


def test_inner_matrices_move_by_all_directions_alike_and_the_rest_as_with_adamw() -> None:
    before, after = stepped("muon")
    _, adamw = stepped("adamw")
    inner = 0
    for name, old in before.items():
        moved = (after[name] - old).detach()
        if not after[name].requires_grad:
            assert not moved.any()
        elif old.ndim in (2, 4) and not any(part in name for part in BY_ADAMW):
            matrix = moved.flatten(1)  # the order of its columns does not matter
            values = torch.linalg.svdvals(matrix) / (0.2 * RATE * max(matrix.shape) ** 0.5)
            assert values.min() > 0.3 and values.max() < 1.4, name
            inner += 1
        else:
            torch.testing.assert_close(after[name], adamw[name])
    assert inner > 20


def test_its_rate_follows_the_schedule() -> None:
    net = network()
    moving = optimiser(net, RECIPE)
    torch.optim.lr_scheduler.LambdaLR(moving, lambda step: 0.0)
    before = [p.detach().clone() for p in net.parameters()]
    sum(p.square().sum() for p in net.parameters()).backward()
    moving.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_kernels_that_are_no_matrices_in_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="channels_last"):
        optimiser(build_network(SMALL, 2), RECIPE)
