"""Random weights under USFM's keys, made by the tests that need them."""

import torch
from torch import Tensor

USFM = {"width": 768, "depth": 12, "heads": 12, "patch": 16, "grid": 14, "hidden": 3072}


def beit_tensors(
    width: int = 24,
    depth: int = 2,
    heads: int = 3,
    patch: int = 4,
    grid: int = 5,
    hidden: int = 40,
    shared: bool = False,
    flat: bool = False,
) -> dict[str, Tensor]:
    """Random tensors under the keys of a BEiT-style file.

    Args:
        shared: one table of position biases for all blocks, instead of one for each.
        flat: each tensor repeats one value, so that tensors of full size take little memory.
    """
    draw = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        made = torch.randn(1 if flat else shape, generator=draw) * 0.4
        return made.expand(shape)

    table = (2 * grid - 1) ** 2 + 3, heads
    tensors = {
        "cls_token": some(1, 1, width),
        "mask_token": some(1, 1, width),
        "patch_embed.proj.weight": some(width, 3, patch, patch),
        "patch_embed.proj.bias": some(width),
        "norm.weight": some(width) + 1,
        "norm.bias": some(width),
    }
    if shared:
        tensors["rel_pos_bias.relative_position_bias_table"] = some(*table)
        tensors["rel_pos_bias.relative_position_index"] = torch.zeros(2, 2, dtype=torch.long)
    for k in range(depth):
        block = {
            "gamma_1": some(width),
            "gamma_2": some(width),
            "norm1.weight": some(width) + 1,
            "norm1.bias": some(width),
            "attn.q_bias": some(width),
            "attn.v_bias": some(width),
            "attn.qkv.weight": some(3 * width, width),
            "attn.proj.weight": some(width, width),
            "attn.proj.bias": some(width),
            "norm2.weight": some(width) + 1,
            "norm2.bias": some(width),
            "mlp.fc1.weight": some(hidden, width),
            "mlp.fc1.bias": some(hidden),
            "mlp.fc2.weight": some(width, hidden),
            "mlp.fc2.bias": some(width),
        }
        if not shared:
            block["attn.relative_position_bias_table"] = some(*table)
            block["attn.relative_position_index"] = torch.zeros(2, 2, dtype=torch.long)
        tensors |= {f"blocks.{k}.{name}": tensor for name, tensor in block.items()}
    return tensors
