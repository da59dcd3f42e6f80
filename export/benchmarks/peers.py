"""The models of a benchmark: where their ONNX files are, and what their networks cost.

Peers with random weights are built from their recipe and exported as export.to_onnx does. Time does
not depend on the values of the weights. Accuracy does, so these peers have none.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export import conversion
from model.network import NetworkConfig, TransUNet, TransUNetConfig, build_network
from model.predictor import load_predictor
from model.spec import ModelSpec
from training.learning.checkpoint import Checkpoint, load_weights
from training.recipes import PAPER, UNET, Recipe

PARITY_IMAGES = 4  # random images on which torch and ONNX Runtime must agree
ROOT = Path(__file__).resolve().parent.parent.parent
# the sources that an exported file depends on
EXPORT_SOURCES = sorted(ROOT.glob("model/network/*.py"))
EXPORT_SOURCES += [Path(__file__), Path(conversion.__file__)]


@dataclass(frozen=True)
class Contender:
    """One model of a benchmark.

    file: ONNX. trained: False means random weights, whose accuracy means nothing. gmac: 10^9
    multiply-adds for an image; None if the file does not say which network it holds.
    """

    name: str
    file: Path
    trained: bool
    parameters: int
    gmac: float | None


NetworkMaker = Callable[[], tuple[nn.Module, ModelSpec]]


class PublishedUpPath(nn.Module):
    """The network of the method's published code.

    It is a TransUNet whose up path climbs to stride 2 and whose map is averaged down to the heatmap
    grid. Each step is as wide as its skip, as in the paper and the U-Net: 1024, 512, 256, 64 behind
    a ResNet-50. At 512 px it costs 123 GMAC. The paper's network stops at stride 8 and costs 83.
    """

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        longer = replace(config, up_widths=config.encoder_widths[-2::-1])
        self.network = TransUNet(longer)
        self.shrink = nn.AvgPool2d(config.stride // longer.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, s, s) -> (n, 3, s / stride, s / stride); only for evaluation mode."""
        maps: Tensor = self.shrink(self.network(x))
        return maps


def _recipe_network(recipe: Recipe) -> tuple[nn.Module, ModelSpec]:
    return build_network(recipe.network), recipe.spec()


def _published_network() -> tuple[nn.Module, ModelSpec]:
    assert isinstance(PAPER.network, TransUNetConfig)
    spec = PAPER.spec().model_copy(update={"name": "aop-published", "recipe": {}})
    return PublishedUpPath(PAPER.network), spec


PEERS: Mapping[str, NetworkMaker] = {
    "paper": lambda: _recipe_network(PAPER),
    "published": _published_network,
    "unet": lambda: _recipe_network(UNET),
}


def random_peer(name: str, make_network: NetworkMaker, cache: Path) -> Contender:
    """A peer with random weights; writes its ONNX file into `cache` unless it is there already."""
    with torch.device("meta"):  # no memory, no time
        network, spec = make_network()
    path = cache / f"{name}-{_export_digest(network, spec)}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        _write_onnx(*make_network(), path, check=False)
    return Contender(name, path, False, *network_cost(network, spec))


def trained_model(name: str, path: Path, cache: Path) -> Contender:
    """A model from an ONNX file, from weights (.safetensors) or from a training's folder.

    Weights are exported into `cache` unless they are there already. Torch and ONNX Runtime must
    then agree on landmarks as in export.to_onnx.

    Raises:
        ModelError, CheckpointError, ParityError: the model cannot be used; says why.
    """
    path = path / "best.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors":
        return Contender(name, path, True, *_cost_of_file(path))
    network, described = load_weights(path)
    file = cache / f"{name}-{_export_digest(network, described.spec, path.read_bytes())}.onnx"
    if not file.exists():
        _write_onnx(network, described.spec, file, check=True)
    return Contender(name, file, True, *network_cost(network, described.spec))


def network_cost(network: nn.Module, spec: ModelSpec) -> tuple[int, float]:
    """Number of parameters and GMAC for an image; moves the network to the meta device.

    GMAC are half of torch's count of FLOP. On the meta device counting takes no time and includes
    attention; on the CPU a fused attention would go uncounted.
    """
    image = torch.zeros(1, spec.channels, spec.input_size, spec.input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta").eval()(image)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, counter.get_total_flops() / 2e9


def _cost_of_file(path: Path) -> tuple[int, float | None]:
    """Number of parameters and GMAC of an ONNX file.

    If neither the description beside the file nor its recipe names the network, GMAC are None and
    the parameters are counted in the file.
    """
    spec = load_predictor(path, "cpu").spec
    config, masks = _config_of(path, spec)
    if config is not None:
        with torch.device("meta"):
            network = build_network(config, masks)
        return network_cost(network, spec)
    tensors = onnx.load(path).graph.initializer
    weight_types = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8}
    return sum(int(np.prod(t.dims)) for t in tensors if t.data_type in weight_types), None


def _config_of(path: Path, spec: ModelSpec) -> tuple[NetworkConfig | None, int]:
    """The network's configuration and number of masks; (None, 0) if they are unknown."""
    for stem in (path.stem, path.name.partition(".")[0]):  # aop.int8.onnx is made from aop.onnx
        try:
            text = path.with_name(f"{stem}.json").read_text(encoding="utf-8")
            beside = Checkpoint.model_validate_json(text)
        except (OSError, ValidationError):
            continue
        if beside.spec.recipe == spec.recipe:  # otherwise the description is another model's
            return beside.network, beside.masks
    adapter: TypeAdapter[NetworkConfig] = TypeAdapter(NetworkConfig)
    try:
        return adapter.validate_python(spec.recipe["network"]), spec.masks
    except (KeyError, ValidationError):
        return None, 0


def _write_onnx(network: nn.Module, spec: ModelSpec, path: Path, check: bool) -> None:
    """Write an ONNX file whole or not at all.

    Args:
        check: raise a ParityError if torch and the file differ by more than the tolerance.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        conversion.save_onnx(conversion.convert_network(network.eval(), spec), spec, draft)
        if check:
            inputs = [conversion.random_image(spec, seed) for seed in range(PARITY_IMAGES)]
            worst = conversion.parity_error_px(network, draft, inputs)
            if worst > conversion.TOLERANCE_INPUT_PX:
                raise conversion.ParityError(
                    f"{path.name}: torch and ONNX Runtime differ by {worst:.3f} px, allowed are "
                    f"{conversion.TOLERANCE_INPUT_PX}"
                )
        draft.replace(path)


def _export_digest(network: nn.Module, spec: ModelSpec, weights: bytes = b"") -> str:
    """A digest of everything that an exported file depends on, so that no stale file is used."""
    parts = [path.read_bytes() for path in EXPORT_SOURCES]
    parts += [torch.__version__.encode(), repr(network).encode(), spec.model_dump_json().encode()]
    return hashlib.sha256(b"\0".join([*parts, weights])).hexdigest()[:12]
