"""Weights that a training starts from: all of a network, or its pretrained bottleneck or encoder.

Every tensor of the file and of the part that it fills is accounted for: used, resized, knowingly
left out, or an error that lists what did not fit. Nothing that is said to be used stays random.
"""

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from model.network import TransUNet, TransUNetConfig
from model.network.resnet import ResNet50
from model.network.vit import ViTBottleneck
from training.beit import EXTRA, read_beit
from training.checkpoint import CheckpointError, load_strictly, load_weights
from training.mae import FILE, load_mae, resize_positions
from training.recipes import Recipe
from training.weights import Report, read_tensors

CHANNELS = 3  # of ImageNet's files
PART = r"(members\.\d+\.)?[^.]+\.[^.]+"  # of a tensor's name: which part of which network


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
) -> list[Report]:
    """Fill the bottleneck and the encoder of a network from what is given.

    Args:
        pretrained: a run of training.pretrain (its folder or .safetensors), or usfm:FILE.
        encoder_weights: ResNet-50's weights under torchvision's keys.

    Raises:
        CheckpointError: something does not fit; it is listed, and the network is not to be used.
    """
    reports = []
    if (pretrained or encoder_weights) and not isinstance(network, TransUNet):
        raise CheckpointError("pretrained weights are for a transunet, this network is none")
    if (pretrained or encoder_weights) and network.members:
        raise CheckpointError("pretrained weights are for one network: train each, then join them")
    if pretrained:
        fill = usfm_into_bottleneck if pretrained.startswith("usfm:") else mae_into_bottleneck
        reports.append(fill(Path(pretrained.removeprefix("usfm:")), network.bottleneck))
    if encoder_weights:
        reports.append(imagenet_into_encoder(encoder_weights, network.encoder))
    return reports


def mae_into_bottleneck(path: Path, bottleneck: ViTBottleneck) -> Report:
    """The encoder's blocks, norm and position embedding of a pretraining run.

    The embedding is interpolated, not computed anew for the new grid: the blocks learned where in
    the frame each code lies, and codes of cells beyond the old grid they never saw.
    """
    mae, described = load_mae(path)
    recipe, start = described.recipe, "encoder."
    report = Report(FILE if path.is_dir() else path.name)
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


def usfm_into_bottleneck(path: Path, bottleneck: ViTBottleneck) -> Report:
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
    bottleneck: ViTBottleneck, state: dict[str, Tensor], heads: int, width: int, report: Report
) -> None:
    """Load all of a bottleneck, or list what does not fit. Heads do not show in shapes."""
    own = {key: tuple(value.shape) for key, value in bottleneck.state_dict().items()}
    its_heads = bottleneck.blocks[0].attn.heads
    if its_heads != heads:
        report.faults.append(f"{heads} attention heads, the bottleneck has {its_heads}")
    report.faults += [f"unexpected {key}" for key in state if key not in own]
    report.compare(state, own)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    flags = f"--network.vit_width {width} --network.vit_depth {depth} --network.vit_heads {heads}"
    report.check(f"a network with {flags}")
    load_strictly(bottleneck, state, report.file)


def imagenet_into_encoder(path: Path, encoder: nn.Module) -> Report:
    """ResNet-50's weights under torchvision's keys, but for the classifier `fc`.

    For one input channel the first layer is summed over its three: what it makes of grey as RGB.
    Counters of batches, which old files lack, start from 0 there; they change nothing.
    """
    if not isinstance(encoder, ResNet50):
        raise CheckpointError(
            "--encoder-weights are a ResNet-50's, and the network's encoder is another: pass "
            "--recipe paper, or leave them out"
        )
    report = Report(path.name)
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
