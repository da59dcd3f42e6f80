"""Weights that a training starts from: of the whole network, its bottleneck or its encoder.

Every tensor of the file, and of the part that it fills, is accounted for: used, resized, left out
on purpose, or named in an error. Nothing that is reported as used stays random.

A BEiT-style file, such as USFM's, holds a ViT with a cls token, without absolute positions, with a
bias on q and v but not on k, with layer scale (gamma) and with tables of relative position biases.
There is one table for each block, as in USFM's network, or one for all blocks (`rel_pos_bias`), as
its pretraining saves them. The blocks become plain ones: each scale is multiplied into the layer
before it, and the biases are joined as (q, 0, v).
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
from training.learning.mae import MAE_FILE, load_mae, resize_positions
from training.recipes import Recipe

IMAGENET_CHANNELS = 3
NETWORK_PART = r"(members\.\d+\.)?[^.]+\.[^.]+"  # start of a tensor's name, such as head.masks

# keys of a BEiT-style file
PATCHES = "patch_embed.proj."
TABLE = "attn.relative_position_bias_table"  # in each block
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
CLS_ROWS = 3  # a table's last rows: cls to token, token to cls, cls to cls
BEIT_LEFT_OUT = re.compile(
    r"(.*\.)?(relative_position_index|mask_token|fc_norm\..*|(lm_)?head\..*|decoder.*)"
)


def adopt_members(weights: Path | None, recipe: Recipe) -> Recipe:
    """The recipe, with the members of the network in the weights if it names none itself."""
    if not (weights and weights.exists() and isinstance(recipe.network, TransUNetConfig)):
        return recipe
    members = getattr(load_weights(weights)[1].network, "members", ())
    network = replace(recipe.network, members=recipe.network.members or members)
    return recipe.model_copy(update={"network": network})


def load_initial_weights(weights: Path, network: nn.Module, masks: bool) -> list[str]:
    """Load all weights that a network has a use for; returns the names of the parts left out.

    The view head is left out, since training.calibrate trains it anew. So are the mask heads if the
    network gives no masks.

    Args:
        masks: whether the network gives masks.

    Raises:
        CheckpointError: the weights cannot be read or do not fit.
    """
    tensors = load_weights(weights)[0].state_dict()
    unused = [*([] if masks else ["head.masks."]), "view."]
    used = {name: t for name, t in tensors.items() if not any(part in name for part in unused)}
    load_strictly(network, used, weights.name)
    left_out = [re.match(NETWORK_PART, name) for name in tensors if name not in used]
    return sorted({part.group() for part in left_out if part})


def load_pretrained_parts(
    network: nn.Module, pretrained: str | None, encoder_weights: Path | None
) -> list[LoadReport]:
    """Fill a network's bottleneck and encoder; returns a report for each.

    Args:
        pretrained: for the bottleneck: a run of training.pretrain (its folder or .safetensors), or
            usfm:FILE; None leaves it as it is.
        encoder_weights: for the encoder: ResNet-50's weights under torchvision's keys, or None.

    Raises:
        CheckpointError: lists what does not fit. The network may then be half filled.
    """
    if not (pretrained or encoder_weights):
        return []
    if not isinstance(network, TransUNet):
        raise CheckpointError(
            "pretrained weights are for a transunet, and this network is not one: choose another "
            "--recipe, or leave them out"
        )
    if network.members:
        raise CheckpointError(
            "pretrained weights are for a network without members: train each network on its own, "
            "then join them with training.join"
        )
    reports = []
    if pretrained:
        if pretrained.startswith("usfm:"):
            file = Path(pretrained.removeprefix("usfm:"))
            reports.append(load_usfm_into_bottleneck(file, network.bottleneck))
        else:
            reports.append(load_mae_into_bottleneck(Path(pretrained), network.bottleneck))
    if encoder_weights:
        reports.append(load_imagenet_into_encoder(encoder_weights, network.encoder))
    return reports


def load_mae_into_bottleneck(path: Path, bottleneck: ViTBottleneck) -> LoadReport:
    """Fill a bottleneck with the blocks, norm and position embedding of a pretrained encoder.

    The position embedding is interpolated, not computed anew for the bottleneck's grid: the blocks
    have learned where in the frame each position lies, and never saw positions beyond the old grid.
    """
    mae, described = load_mae(path)
    recipe, start = described.recipe, "encoder."
    report = LoadReport(MAE_FILE if path.is_dir() else path.name)
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
    _load_bottleneck(bottleneck, state, recipe.heads, recipe.width, report)
    return report


def load_usfm_into_bottleneck(path: Path, bottleneck: ViTBottleneck) -> LoadReport:
    """Fill a bottleneck with the blocks and norm of a BEiT-style file, and with its tables.

    The patch embedding and the cls token are left out, because a bottleneck has neither. A
    bottleneck with sin-cos positions keeps its fixed embedding, and the tables are left out too.
    """
    weights = read_beit(path)
    report, width = weights.report, len(weights.state["norm.weight"])
    state = {k: v for k, v in weights.state.items() if k.startswith(("blocks.", "norm."))}
    dropped = [key for key in report.used if key.startswith(("patch_embed.", "cls_token"))]
    if bottleneck.relative:
        tables = weights.tables_on_grid(bottleneck.rows, bottleneck.columns)
        state["bias_tables"] = tables[:, :-CLS_ROWS]
    else:
        state["position_embedding"] = bottleneck.position_embedding
        dropped += weights.table_keys
    report.left_out += dropped
    report.used = [key for key in report.used if key not in dropped]
    _load_bottleneck(bottleneck, state, weights.tables.shape[2], width, report)
    return report


def _load_bottleneck(
    bottleneck: ViTBottleneck, state: dict[str, Tensor], heads: int, width: int, report: LoadReport
) -> None:
    """Load every tensor of a bottleneck.

    Args:
        heads, width: of the blocks in `state`. A tensor's shape does not show the number of heads.

    Raises:
        CheckpointError: lists what does not fit, and the flags of a network that would.
    """
    own = {key: tuple(value.shape) for key, value in bottleneck.state_dict().items()}
    first = bottleneck.blocks[0]
    assert isinstance(first, Block)
    if first.attn.heads != heads:
        report.faults.append(f"{heads} attention heads, the bottleneck has {first.attn.heads}")
    report.faults += [f"unexpected {key}" for key in state if key not in own]
    report.compare_shapes(state, own)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    flags = f"--network.vit_width {width} --network.vit_depth {depth} --network.vit_heads {heads}"
    report.raise_faults(f"a network with {flags}")
    load_strictly(bottleneck, state, report.file)


def load_imagenet_into_encoder(path: Path, encoder: nn.Module) -> LoadReport:
    """Fill an encoder with ResNet-50's weights under torchvision's keys, without the classifier.

    For an encoder with one input channel, the first layer is summed over its three: that is what it
    computes from grey as RGB. The batch counters, which old files lack, start from 0; they have no
    influence.

    Raises:
        CheckpointError: the encoder is not a ResNet-50, or lists what does not fit.
    """
    if not isinstance(encoder, ResNet50):
        raise CheckpointError(
            "--encoder-weights are for a ResNet-50, and the network's encoder is another: pass "
            "--recipe paper, or leave them out"
        )
    report = LoadReport(path.name)
    tensors = read_tensors(path, report)
    own = encoder.state_dict()
    classifier = [key for key in tensors if re.fullmatch(r"fc\.(weight|bias)", key)]
    counters = [key for key in own if key.endswith("num_batches_tracked") and key not in tensors]
    state = {key: value for key, value in tensors.items() if key not in classifier}
    state |= {key: own[key] for key in counters}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    first = "conv1.weight"
    channels = shapes[first][1]
    shapes[first] = (shapes[first][0], IMAGENET_CHANNELS, *shapes[first][2:])
    report.faults += [f"unexpected {key}" for key in state if key not in own]
    report.compare_shapes(state, shapes)
    report.raise_faults("torchvision's ResNet-50")
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
    """The weights of a BEiT-style file.

    Args:
        state: tensors under the keys of `teachers.Beit`, without the tables.
        tables: (depth, offsets + CLS_ROWS, heads) on the file's own grid.
        table_keys: the file's keys of the tables.
    """

    state: dict[str, Tensor]
    tables: Tensor
    table_keys: list[str]
    report: LoadReport

    def tables_on_grid(self, rows: int, columns: int) -> Tensor:
        """The tables for a grid of patches; the report says so if they had to be resized."""
        tables = resize_tables(self.tables, rows, columns)
        if tables.shape != self.tables.shape:
            self.report.resized += self.table_keys
            self.report.used = [key for key in self.report.used if key not in self.table_keys]
        return tables


def read_beit(path: Path) -> BeitWeights:
    """Read the weights of a BEiT-style file, whose keys may have any prefix.

    The final norm is `norm`, or `fc_norm` if the file has only that. A classifier applies `fc_norm`
    to the mean of the tokens; here it acts on each token.

    Raises:
        CheckpointError: lists the keys and shapes that are missing, unexpected or wrong.
    """
    report = LoadReport(path.name)
    tensors = read_tensors(path, report)
    patches = f"{PATCHES}weight"
    prefixes = [key.removesuffix(patches) for key in tensors if key.endswith(patches)]
    if len(prefixes) != 1 or tensors[prefixes[0] + patches].ndim != 4:
        report.faults = [f"{len(prefixes)} {patches} among its {len(tensors)} keys"]
        report.raise_faults("the weights of one BEiT-style network, as USFM's")
    start = len(prefixes[0])
    inside = {key[start:]: value for key, value in tensors.items() if key.startswith(prefixes[0])}
    shapes = beit_shapes(inside)
    others = [key for key in tensors if key[:start] != prefixes[0] or key[start:] not in shapes]
    report.left_out += [key for key in others if BEIT_LEFT_OUT.fullmatch(key)]
    report.faults = [f"unexpected {key}" for key in others if not BEIT_LEFT_OUT.fullmatch(key)]
    report.compare_shapes(inside, shapes)
    report.raise_faults("BEiT-style weights, as USFM's")
    report.used = list(shapes)
    return _convert_beit({key: inside[key] for key in shapes}, report)


def beit_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor that a BEiT-style file must hold.

    The sizes follow from the file's own patch embedding, first table and number of blocks. USFM is
    768 wide, with patches of 16 px, 12 blocks of 12 heads, and tables for 14 by 14 patches.

    Args:
        tensors: the file's tensors, under keys without prefix.
    """
    width, _, patch, _ = tensors[f"{PATCHES}weight"].shape
    hidden = len(tensors.get("blocks.0.mlp.fc1.weight", range(4 * width)))
    norm = "fc_norm" if "fc_norm.weight" in tensors and "norm.weight" not in tensors else "norm"
    shared = SHARED_TABLE in tensors
    table = tensors.get(SHARED_TABLE if shared else f"blocks.0.{TABLE}")
    rows, heads = table.shape if table is not None and table.ndim == 2 else (CLS_ROWS + 1, 1)
    square = (round(max(rows - CLS_ROWS, 1) ** 0.5) ** 2 + CLS_ROWS, heads)
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
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    return {
        f"{PATCHES}weight": (width, 3, patch, patch),
        f"{PATCHES}bias": (width,),
        "cls_token": (1, 1, width),
        f"{norm}.weight": (width,),
        f"{norm}.bias": (width,),
        **({SHARED_TABLE: square} if shared else {}),
        **{f"blocks.{k}.{key}": block[key] for k in range(max(1, depth)) for key in block},
    }


def _convert_beit(tensors: dict[str, Tensor], report: LoadReport) -> BeitWeights:
    """Weights under our keys, from the tensors of a file whose keys and shapes are checked."""
    keys = [key for key in tensors if key.endswith("relative_position_bias_table")]
    tables = [tensors.pop(key) for key in keys]
    depth = sum(key.endswith(".gamma_1") for key in tensors)
    renamed = {
        key.replace(PATCHES, "patch_embed.")
        .replace("fc_norm.", "norm.")
        .replace("mlp.fc1.", "mlp.0.")
        .replace("mlp.fc2.", "mlp.2."): value
        for key, value in tensors.items()
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
    """Resize a square grid's (depth, (2 g - 1)^2 + CLS_ROWS, heads) tables to rows by columns.

    The biases are interpolated bicubically over the offsets. Both grids cover the same frame, so an
    offset keeps its share of the frame, and no offset stays none. The rows of the cls token stay.
    At equal size nothing changes.
    """
    depth, _, heads = tables.shape
    offsets, extra = tables[:, :-CLS_ROWS], tables[:, -CLS_ROWS:]
    side = round(offsets.shape[1] ** 0.5)
    size = (2 * rows - 1, 2 * columns - 1)
    if size == (side, side):
        return tables
    planes = offsets.transpose(1, 2).reshape(depth, heads, side, side)
    planes = F.interpolate(planes, size, mode="bicubic", align_corners=False)
    return torch.cat([planes.flatten(2).transpose(1, 2), extra], dim=1)
