"""Weights of a BEiT-style ViT, as USFM's are, from their published form to plain ViT blocks.

Such a file holds a ViT with a cls token, no absolute positions, a bias on q and v but not on k,
layer scale (gamma) and relative position tables, one a block (as USFM's network has them) or one
for all blocks (`rel_pos_bias`, as its pretraining saves them). Its blocks become plain ones: the
scales are multiplied into the layers before them, the biases joined as (q, 0, v).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.weights import Report, read_tensors

PROJ = "patch_embed.proj."
TABLE, SHARED = "attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"
EXTRA = 3  # a table's last rows: cls to token, token to cls, cls to cls
LEFT_OUT = re.compile(
    r"(.*\.)?(relative_position_index|mask_token|fc_norm\..*|(lm_)?head\..*|decoder.*)"
)


@dataclass(frozen=True)
class BeitWeights:
    """A file's weights under the keys of `teachers.Beit`, the tables on the file's own grid."""

    state: dict[str, Tensor]
    tables: Tensor  # (depth, offsets + EXTRA, heads)
    table_keys: list[str]
    report: Report

    def on_grid(self, rows: int, columns: int) -> Tensor:
        """The tables for another grid of patches; the report then says that they were resized."""
        tables = resize_tables(self.tables, rows, columns)
        if tables.shape != self.tables.shape:
            self.report.resized += self.table_keys
            self.report.used = [key for key in self.report.used if key not in self.table_keys]
        return tables


def read_beit(path: Path) -> BeitWeights:
    """The weights of a BEiT-style file, every key accounted for; any prefix of its keys is found.

    The final norm is `norm`, or `fc_norm` where the file has that alone: it then acts on each
    token, where a classifier applies it to their mean.

    Raises:
        CheckpointError: keys or shapes that are missing, unexpected or wrong, all of them listed.
    """
    report = Report(path.name)
    found = read_tensors(path, report)
    prefixes = [key[: -len(PROJ) - 6] for key in found if key.endswith(f"{PROJ}weight")]
    if len(prefixes) != 1 or found[f"{prefixes[0]}{PROJ}weight"].ndim != 4:
        report.faults = [f"{len(prefixes)} {PROJ}weight among its {len(found)} keys"]
        report.check("the weights of one BEiT-style network, as USFM's")
    start = len(prefixes[0])
    inside = {key[start:]: value for key, value in found.items() if key.startswith(prefixes[0])}
    shapes = expected_shapes(inside)
    others = [key for key in found if key[:start] != prefixes[0] or key[start:] not in shapes]
    report.left_out += [key for key in others if LEFT_OUT.fullmatch(key)]
    report.faults = [f"unexpected {key}" for key in others if not LEFT_OUT.fullmatch(key)]
    report.compare(inside, shapes)
    report.check("BEiT-style weights, as USFM's")
    report.used = list(shapes)
    return _converted({key: inside[key] for key in shapes}, report)


def expected_shapes(found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of all that a file must hold that has these patches, table and number of blocks.

    USFM: 768 wide, patches of 16 px, 12 blocks of 12 heads, tables for 14 by 14 patches.
    """
    width, _, patch, _ = found[f"{PROJ}weight"].shape
    hidden = len(found.get("blocks.0.mlp.fc1.weight", range(4 * width)))
    norm = "fc_norm" if "fc_norm.weight" in found and "norm.weight" not in found else "norm"
    shared = SHARED in found
    table = found.get(SHARED if shared else f"blocks.0.{TABLE}")
    rows, heads = table.shape if table is not None and table.ndim == 2 else (EXTRA + 1, 1)
    square = (round(max(rows - EXTRA, 1) ** 0.5) ** 2 + EXTRA, heads)
    block: dict[str, tuple[int, ...]] = {
        **{f"{name}.weight": (width,) for name in ("norm1", "norm2")},
        **{f"{name}.bias": (width,) for name in ("norm1", "norm2", "attn.proj", "mlp.fc2")},
        **dict.fromkeys(("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"), (width,)),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        **({} if shared else {TABLE: square}),
    }
    depth = len({key.split(".")[1] for key in found if key.startswith("blocks.")})
    return {
        f"{PROJ}weight": (width, 3, patch, patch),
        f"{PROJ}bias": (width,),
        "cls_token": (1, 1, width),
        f"{norm}.weight": (width,),
        f"{norm}.bias": (width,),
        **({SHARED: square} if shared else {}),
        **{f"blocks.{k}.{key}": block[key] for k in range(max(1, depth)) for key in block},
    }


def _converted(found: dict[str, Tensor], report: Report) -> BeitWeights:
    """The tensors of a file that has been checked, under our keys."""
    keys = [key for key in found if key.endswith("relative_position_bias_table")]
    tables = [found.pop(key) for key in keys]
    depth = sum(key.endswith(".gamma_1") for key in found)
    renamed = {
        key.replace(PROJ, "patch_embed.")
        .replace("fc_norm.", "norm.")
        .replace("mlp.fc1.", "mlp.0.")
        .replace("mlp.fc2.", "mlp.2."): value
        for key, value in found.items()
    }
    for k in range(depth):
        block = f"blocks.{k}."
        query, value = (renamed.pop(f"{block}attn.{name}_bias") for name in "qv")
        renamed[f"{block}attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
        for layer, gamma in (("attn.proj", "gamma_1"), ("mlp.2", "gamma_2")):
            scale = renamed.pop(block + gamma)
            weight, bias = f"{block}{layer}.weight", f"{block}{layer}.bias"
            renamed[weight] = scale[:, None] * renamed[weight]
            renamed[bias] = scale * renamed[bias]
    stacked = torch.stack(tables).expand(depth, -1, -1).contiguous()
    return BeitWeights(renamed, stacked, keys, report)


def resize_tables(tables: Tensor, rows: int, columns: int) -> Tensor:
    """(depth, (2 g - 1)^2 + EXTRA, heads) of a square grid -> the same for rows by columns patches.

    Bicubic over the offsets: no offset stays none, and an offset keeps its share of the frame,
    since both grids cover the same frame. The rows of the cls token stay. Equal size: unchanged.
    """
    depth, _, heads = tables.shape
    offsets, extra = tables[:, :-EXTRA], tables[:, -EXTRA:]
    side = round(offsets.shape[1] ** 0.5)
    size = (2 * rows - 1, 2 * columns - 1)
    if size == (side, side):
        return tables
    planes = offsets.transpose(1, 2).reshape(depth, heads, side, side)
    planes = F.interpolate(planes, size, mode="bicubic", align_corners=False)
    return torch.cat([planes.flatten(2).transpose(1, 2), extra], dim=1)
