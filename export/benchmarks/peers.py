"""The models of a benchmark: where their ONNX files are, and what their networks cost.

Peers with random weights are built from their recipe and exported as export.to_onnx does. Time does
not depend on the values of weights. Accuracy does, so these peers have none.
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

PARITY_IMAGES = 4
ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = sorted(ROOT.glob("model/network/*.py"))
SOURCES += [Path(__file__), Path(conversion.__file__)]  # what an exported file depends on


@dataclass(frozen=True)
class Contender:
    """One model of a benchmark.

    file: ONNX. trained: whether its accuracy means something. gmac: 10^9 multiply-adds an image;
    None if the file does not say which network it holds.
    """

    name: str
    file: Path
    trained: bool
    parameters: int
    gmac: float | None


Source = Callable[[], tuple[nn.Module, ModelSpec]]


class PublishedUpPath(nn.Module):
    """A TransUNet whose up path climbs to stride 2, and whose map is averaged down to the grid.

    The method's published code does so. Each step is as wide as its skip, as in the paper and the
    U-Net: 1024, 512, 256, 64 behind a ResNet-50. At 512 px it costs 123 GMAC. The paper's network,
    which stops at stride 8, costs 83.
    """

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        longer = replace(config, up_widths=config.encoder_widths[-2::-1])
        self.network = TransUNet(longer)
        self.shrink = nn.AvgPool2d(config.stride // longer.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, s, s) -> (n, 3, s / stride, s / stride); for evaluation alone."""
        maps: Tensor = self.shrink(self.network(x))
        return maps


def _recipe_network(recipe: Recipe) -> tuple[nn.Module, ModelSpec]:
    return build_network(recipe.network), recipe.spec()


def _published() -> tuple[nn.Module, ModelSpec]:
    assert isinstance(PAPER.network, TransUNetConfig)
    spec = PAPER.spec().model_copy(update={"name": "aop-published", "recipe": {}})
    return PublishedUpPath(PAPER.network), spec


PEERS: Mapping[str, Source] = {
    "paper": lambda: _recipe_network(PAPER),
    "published": _published,
    "unet": lambda: _recipe_network(UNET),
}


def random_peer(name: str, source: Source, cache: Path) -> Contender:
    """A peer with random weights; its file is written into `cache` unless it is there."""
    with torch.device("meta"):  # no memory, no time
        network, spec = source()
    path = cache / f"{name}-{_digest(network, spec)}.onnx"
    if not path.exists():
        torch.manual_seed(0)
        _export(*source(), path, check=False)
    return Contender(name, path, False, *cost(network, spec))


def trained_model(name: str, path: Path, cache: Path) -> Contender:
    """A model from an ONNX file, from weights (.safetensors), or from the folder of a training.

    Weights are exported into `cache` unless they are there. Torch and ONNX Runtime must then agree
    on landmarks as in export.to_onnx.

    Raises:
        ModelError, CheckpointError, ParityError: it cannot be used; says why.
    """
    path = path / "best.safetensors" if path.is_dir() else path
    if path.suffix != ".safetensors":
        return Contender(name, path, True, *_cost_of_file(path))
    network, described = load_weights(path)
    file = cache / f"{name}-{_digest(network, described.spec, path.read_bytes())}.onnx"
    if not file.exists():
        _export(network, described.spec, file, check=True)
    return Contender(name, file, True, *cost(network, described.spec))


def cost(network: nn.Module, spec: ModelSpec) -> tuple[int, float]:
    """(parameters, GMAC an image) of a network, which moves to the meta device.

    GMAC are half of torch's count of FLOP. The meta device takes no time, and unlike the CPU it
    counts attention, which the CPU fuses.
    """
    image = torch.zeros(1, spec.channels, spec.input_size, spec.input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta").eval()(image)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, counter.get_total_flops() / 2e9


def _cost_of_file(path: Path) -> tuple[int, float | None]:
    """`cost` of an ONNX file, by the network that the weights beside it, or its recipe, name."""
    spec = load_predictor(path, "cpu").spec
    config, masks = _config_of(path, spec)
    if config is not None:
        with torch.device("meta"):
            network = build_network(config, masks)
        return cost(network, spec)
    tensors = onnx.load(path).graph.initializer
    real = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8}
    return sum(int(np.prod(t.dims)) for t in tensors if t.data_type in real), None


def _config_of(path: Path, spec: ModelSpec) -> tuple[NetworkConfig | None, int]:
    """The network's configuration and number of masks; None if the file does not lead to them."""
    for stem in (path.stem, path.name.partition(".")[0]):  # aop.int8.onnx is made of aop's
        try:
            text = path.with_name(f"{stem}.json").read_text(encoding="utf-8")
            beside = Checkpoint.model_validate_json(text)
        except (OSError, ValidationError):
            continue
        if beside.spec.recipe == spec.recipe:  # else they are another model's
            return beside.network, beside.masks
    adapter: TypeAdapter[NetworkConfig] = TypeAdapter(NetworkConfig)
    try:
        return adapter.validate_python(spec.recipe["network"]), spec.masks
    except (KeyError, ValidationError):
        return None, 0


def _export(network: nn.Module, spec: ModelSpec, path: Path, check: bool) -> None:
    """Write an ONNX file whole or not at all; `check`: its landmarks must be torch's."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        conversion.save(conversion.converted(network.eval(), spec), spec, draft)
        if check:
            inputs = [conversion.random_image(spec, seed) for seed in range(PARITY_IMAGES)]
            worst = conversion.parity(network, draft, inputs)
            if worst > conversion.TOLERANCE_PX:
                raise conversion.ParityError(
                    f"{path.name}: torch and ONNX differ by {worst:.3f} px, allowed are "
                    f"{conversion.TOLERANCE_PX}"
                )
        draft.replace(path)


def _digest(network: nn.Module, spec: ModelSpec, weights: bytes = b"") -> str:
    """A digest of all that an exported file depends on, so that a stale file is not used."""
    parts = [path.read_bytes() for path in SOURCES]
    parts += [torch.__version__.encode(), repr(network).encode(), spec.model_dump_json().encode()]
    return hashlib.sha256(b"\0".join([*parts, weights])).hexdigest()[:12]
