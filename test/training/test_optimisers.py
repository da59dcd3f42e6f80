"""Muon: which parameters it moves, how far, and what it leaves to AdamW."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from model.network import build_network
from test.model.test_network import SMALL
from training.learning.optimisers import BY_ADAMW, Muon, make_optimiser, orthogonalise
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
    moving = make_optimiser(net, RECIPE.model_copy(update={"optimiser": name}))
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
    moving = make_optimiser(net, RECIPE)
    torch.optim.lr_scheduler.LambdaLR(moving, lambda step: 0.0)
    before = [p.detach().clone() for p in net.parameters()]
    sum(p.square().sum() for p in net.parameters()).backward()
    moving.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(24, 120), (120, 24), (40, 40)])
def test_orthogonal_keeps_directions_and_evens_out_their_sizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left * torch.logspace(0, -2, min(shape)) @ right
    sizes = left.T @ orthogonalise(matrix) @ right.T
    even = sizes.diagonal()
    assert even.min() > 0.6 and even.max() < 1.3
    torch.testing.assert_close(sizes, even.diag(), atol=1e-3, rtol=0)


def test_orthogonal_of_nothing_is_nothing() -> None:
    assert not orthogonalise(torch.zeros(3, 5)).any()


def test_muon_moves_as_torchs_own_does() -> None:
    torch.manual_seed(1)
    start = torch.randn(16, 40)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = [
        Muon([("inner", ours), ("bias", nn.Parameter(torch.zeros(1)))], RATE, 0.1),
        torch.optim.Muon([theirs], RATE, 0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        grad = torch.randn(16, 40)
        for one, step in zip((ours, theirs), steps, strict=True):
            one.grad = grad.clone()
            step.step()
    torch.testing.assert_close(ours - start, theirs - start, atol=0.05 * RATE, rtol=0.05)


def test_muon_goes_on_from_its_state() -> None:
    first, second = network(), network()
    moving, resumed = make_optimiser(first, RECIPE), make_optimiser(second, RECIPE)
    descend(first, moving, seed=1)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(deepcopy(moving.state_dict()))
    descend(first, moving, seed=2)
    descend(second, resumed, seed=2)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_of_torchs_muon_is_refused() -> None:
    with pytest.raises(ValueError, match="--init"):
        make_optimiser(network(), RECIPE).load_state_dict({"parts": []})


def descend(net: nn.Module, moving: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape)
    moving.step()
