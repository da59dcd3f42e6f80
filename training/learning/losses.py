"""Losses of heatmaps and auxiliary masks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def heatmap_mse(raw: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error over the visible landmarks (the paper's loss).

    Args:
        raw, target: (n, 3, h, w) heatmaps whose peaks have height 1.
        visible: (n, 3) 1 for a landmark in the frame, else 0.
    """
    errors = F.mse_loss(raw.float(), target, reduction="none").mean(dim=(2, 3))
    return (errors * visible).sum() / visible.sum().clamp(min=1)


def heatmap_cross_entropy(raw: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Cross-entropy of the softmax over cells against the target's share of each cell.

    The target's own entropy is subtracted, so that a perfect answer costs 0: this is the
    Kullback-Leibler divergence. It is averaged over the visible landmarks. `raw` holds logits; the
    other arguments are those of `heatmap_mse`.
    """
    share = target.flatten(2)
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
    divergence = F.kl_div(raw.float().flatten(2).log_softmax(-1), share, reduction="none").sum(-1)
    return (divergence * visible).sum() / visible.sum().clamp(min=1)


def mask_loss(logits: Tensor, target: Tensor, has_mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy plus one minus Dice, the mean over the samples that have masks.

    Args:
        logits, target: (n, classes, h, w); the target holds shares 0..1 of a cell.
        has_mask: (n,) 1 for a sample that has masks, else 0; None if all have them.
    """
    logits = logits.float()
    overlap = 2 * (logits.sigmoid() * target).sum(dim=(2, 3))
    total = (logits.sigmoid() + target).sum(dim=(2, 3))
    dice = (overlap + 1) / (total + 1)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    value = entropy.mean(dim=(1, 2, 3)) + (1 - dice).mean(dim=1)
    if has_mask is None:
        return value.mean()
    return (value * has_mask).sum() / has_mask.sum().clamp(min=1)


def total_loss(
    raw: Tensor,
    mask_logits: Tensor | None,
    batch: dict[str, Tensor],
    loss: str,
    heatmap_weight: float,
    mask_weight: float,
) -> Tensor:
    """The loss of one batch, summed over a network and its members.

    Args:
        raw: (n, 3 * networks, h, w) heatmaps, one network's after the other's.
        mask_logits: (n, masks * networks, h, w) likewise, or None for a network without masks.
        batch: the targets, as LandmarkDataset gives them.
        loss: mse or cross_entropy, of the heatmaps.
    """
    heatmap_loss = heatmap_mse if loss == "mse" else heatmap_cross_entropy
    value = raw.new_zeros((), dtype=torch.float32)
    for heatmaps in raw.split(batch["heatmaps"].shape[1], dim=1):
        value = value + heatmap_weight * heatmap_loss(heatmaps, batch["heatmaps"], batch["visible"])
    if mask_logits is not None:
        for masks in mask_logits.split(batch["masks"].shape[1], dim=1):
            value = value + mask_weight * mask_loss(masks, batch["masks"], batch["has_mask"])
    return torch.nan_to_num(value, nan=float("inf"))
