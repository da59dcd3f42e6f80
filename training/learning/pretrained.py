"""Weights that a training starts from: all of a network, or its pretrained bottleneck or encoder.

Every tensor of the file and of the part that it fills is accounted for: used, resized, knowingly
left out, or an error that lists what did not fit. Nothing that is said to be used stays random.

A BEiT-style file, such as USFM's, holds a ViT with a cls token, no absolute positions, a bias on q
and v but not on k, layer scale (gamma) and relative position tables: one a block, as USFM's network
has them, or one for all blocks (`rel_pos_bias`), as its pretraining saves them. Its blocks become
plain ones: the scales are multiplied into the layers before them, the biases joined as (q, 0, v).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network import TransUNet, TransUNetConfig
from model.network.resnet import ResNet50
from model.network.vit import Block, ViTBottleneck
from training.learning.checkpoint import (
    CheckpointError,
    LoadReport,
    load_strictly,
    load_weights,
    read_tensors,
)
from training.learning.mae import FILE, load_mae, resize_positions
from training.recipes import Recipe

CHANNELS = 3  # of ImageNet's files
PART = r"(members\.\d+\.)?[^.]+\.[^.]+"  # of a tensor's name: which part of which network
PROJ = "patch_embed.proj."
TABLE, SHARED = "attn.relative_position_bias_table", "rel_pos_bias.relative_position_bias_table"
EXTRA = 3  # a table's last rows: cls to token, token to cls, cls to cls
LEFT_OUT = re.compile(
    r"(.*\.)?(relative_position_index|mask_token|fc_norm\..*|(lm_)?head\..*|decoder.*)"
)


def with_members(weights: Path | None, recipe: Recipe) -> Recipe:
    """The recipe with the members of the weights to start from: all are trained on."""
    if not (weights and weights.exists() and isinstance(recipe.network, TransUNetConfig)):
        return recipe
    members = getattr(load_weights(weights)[1].network, "members", ())
    network = replace(recipe.network, members=recipe.network.members or members)
    return recipe.model_copy(update={"network": network})


def start_from(weights: Path, network: nn.Module, masks: bool) -> list[str]:
    """Load weights into a network; returns the parts left out, for which it has no use.

    These are a view head, which calibrate trains anew, and what gives masks where it gives none.
    """
    tensors = load_weights(weights)[0].state_dict()
    unused = [*([] if masks else ["head.masks."]), "view."]
    used = {name: t for name, t in tensors.items() if not any(part in name for part in unused)}
    load_strictly(network, used, weights.name)
    left_out = [re.match(PART, name) for name in tensors if name not in used]
    return sorted({part.group() for part in left_out if part})


def start_pretrained(
    network: nn.Module, pretrained: str | None, encoder_weights: Path | None
) -> list[LoadReport]:
    """Fill the bottleneck and the encoder of a network from what is given.

    Args:
        pretrained: a run of training.pretrain (its folder or .safetensors), or usfm:FILE.
        encoder_weights: ResNet-50's weights under torchvision's keys.

    Raises:
        CheckpointError: something does not fit; it is listed, and the network is not to be used.
    """
    if not (pretrained or encoder_weights):
        return []
    if not isinstance(network, TransUNet):
        raise CheckpointError("pretrained weights are for a transunet, this network is not one")
    if network.members:
        raise CheckpointError("pretrained weights are for one network: train each, then join them")
    reports = []
    if pretrained:
        fill = usfm_into_bottleneck if pretrained.startswith("usfm:") else mae_into_bottleneck
        reports.append(fill(Path(pretrained.removeprefix("usfm:")), network.bottleneck))
    if encoder_weights:
        reports.append(imagenet_into_encoder(encoder_weights, network.encoder))
    return reports


def mae_into_bottleneck(path: Path, bottleneck: ViTBottleneck) -> LoadReport:
    """The encoder's blocks, norm and position embedding of a pretraining run.

    The embedding is interpolated, not computed anew for the new grid: the blocks learned where in
    the frame each code lies, and codes of cells beyond the old grid they never saw.
    """
    mae, described = load_mae(path)
    recipe, start = described.recipe, "encoder."
    report = LoadReport(FILE if path.is_dir() else path.name)
    tensors = {k.removeprefix(start): v for k, v in mae.state_dict().items() if k.startswith(start)}
    state = {key: value for key, value in tensors.items() if not key.startswith("patch_embed.")}
    report.left_out = [key for key in mae.state_dict() if key.removeprefix(start) not in state]
    report.used = [start + key for key in state]
    if not bottleneck.relative:
        rows, columns = bottleneck.rows, bottleneck.columns
        state["position_embedding"] = resize_positions(state["position_embedding"], rows, columns)
        if (rows, columns) != (recipe.grid, recipe.grid):
            report.used.remove(f"{start}position_embedding")
            report.resized.append(f"{start}position_embedding")
    _fill(bottleneck, state, recipe.heads, recipe.width, report)
    return report


def usfm_into_bottleneck(path: Path, bottleneck: ViTBottleneck) -> LoadReport:
    """The blocks and norm of a BEiT-style file, and its tables where the bottleneck has such.

    Left out are the patch embedding and the cls token, which the bottleneck has not, and for
    sin-cos positions the tables: the bottleneck then keeps its own, fixed embedding.
    """
    weights = read_beit(path)
    report, width = weights.report, len(weights.state["norm.weight"])
    state = {k: v for k, v in weights.state.items() if k.startswith(("blocks.", "norm."))}
    dropped = [key for key in report.used if key.startswith(("patch_embed.", "cls_token"))]
    if bottleneck.relative:
        state["bias_tables"] = weights.on_grid(bottleneck.rows, bottleneck.columns)[:, :-EXTRA]
    else:
        state["position_embedding"] = bottleneck.position_embedding
        dropped += weights.table_keys
    report.left_out += dropped
    report.used = [key for key in report.used if key not in dropped]
    _fill(bottleneck, state, weights.tables.shape[2], width, report)
    return report


def _fill(
    bottleneck: ViTBottleneck, state: dict[str, Tensor], heads: int, width: int, report: LoadReport
) -> None:
    """Load all of a bottleneck, or list what does not fit. Heads do not show in shapes."""
    own = {key: tuple(value.shape) for key, value in bottleneck.state_dict().items()}
    first = bottleneck.blocks[0]
    assert isinstance(first, Block)
    if first.attn.heads != heads:
        report.faults.append(f"{heads} attention heads, the bottleneck has {first.attn.heads}")
    report.faults += [f"unexpected {key}" for key in state if key not in own]
    report.compare(state, own)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    flags = f"--network.vit_width {width} --network.vit_depth {depth} --network.vit_heads {heads}"
    report.check(f"a network with {flags}")
    load_strictly(bottleneck, state, report.file)


def imagenet_into_encoder(path: Path, encoder: nn.Module) -> LoadReport:
    """ResNet-50's weights under torchvision's keys, but for the classifier `fc`.

    For one input channel the first layer is summed over its three: what it makes of grey as RGB.
    Counters of batches, which old files lack, start from 0 there; they change nothing.
    """
    if not isinstance(encoder, ResNet50):
        raise CheckpointError(
            "--encoder-weights are a ResNet-50's, and the network's encoder is another: pass "
            "--recipe paper, or leave them out"
        )
    report = LoadReport(path.name)
    found = read_tensors(path, report)
    own = encoder.state_dict()
    classifier = [key for key in found if re.fullmatch(r"fc\.(weight|bias)", key)]
    counters = [key for key in own if key.endswith("num_batches_tracked") and key not in found]
    state = {key: value for key, value in found.items() if key not in classifier}
    state |= {key: own[key] for key in counters}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    first = "conv1.weight"
    channels = shapes[first][1]
    shapes[first] = (shapes[first][0], CHANNELS, *shapes[first][2:])
    report.faults += [f"unexpected {key}" for key in state if key not in own]
    report.compare(state, shapes)
    report.check("torchvision's ResNet-50")
    report.left_out += classifier
    report.used = [key for key in own if key not in counters]
    if channels == 1:
        state[first] = state[first].sum(dim=1, keepdim=True)
        report.used.remove(first)
        report.resized.append(first)
    load_strictly(encoder, state, path.name)
    return report


@dataclass(frozen=True)
class BeitWeights:
    """A file's weights under the keys of `teachers.Beit`, the tables on the file's own grid."""

    state: dict[str, Tensor]
    tables: Tensor  # (depth, offsets + EXTRA, heads)
    table_keys: list[str]
    report: LoadReport

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
    report = LoadReport(path.name)
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
    return _convert({key: inside[key] for key in shapes}, report)


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


def _convert(found: dict[str, Tensor], report: LoadReport) -> BeitWeights:
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
