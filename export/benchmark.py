"""Measure models side by side: cost, time, memory and accuracy, in one run on the same images.

    python -m export.benchmark                                   # shipped model against its peers
    python -m export.benchmark --data cases.csv --split val --output DIR   # with accuracy
    python -m export.benchmark --model aop.onnx --model larger.onnx --peers unet
    python -m export.benchmark --data cases.csv --split val --peer segmentation=RUN
    python -m export.benchmark --peers unet --least-ratio unet=60 --budget-ms 50   # as a gate

The other models are compared with the first --model, and the gates apply to it. By default it is
the shipped model that process.py takes on this machine. On the CPU its float32 original runs beside
it. All peers work at 512 px. `paper` is the method's TransUNet, whose map has stride 8. `published`
is the same network with the up path of the published code, which climbs to stride 2 and shrinks
back. `unet` is the challenge's baseline. The peers' weights are random, so they have no accuracy;
time does not depend on weights. --peer NAME=PATH adds a trained peer.

In every round each model gets the same image. The order rotates, so that a machine which drifts is
fair to all. Each model starts after a rest, when the threads of the model before it are asleep.
Models quicker than 100 ms then run further rounds among themselves. Ratios of times come from the
shared rounds. Each model's start and memory are measured in a process of its own. Other programs
disturb the times, so the summary states the machine's load before the run. On CUDA, the benchmark
also measures IO binding, CUDA graphs, fp16 and the convolution searches.

DIR gets benchmark.json and benchmark.png. --cache keeps the exported peers for other runs. Exit
status: 0 measured, 1 a gate failed, 2 nothing could be measured. With 1 and 2 the last line of
stderr says why.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnxruntime

from export.benchmarks.peers import PEERS, Contender, NetworkMaker, random_peer, trained_model
from export.benchmarks.summary import (
    BenchmarkSummary,
    Demands,
    MeanErrors,
    ModelFigures,
    check_gates,
    plot_summary,
    summary_text,
)
from export.benchmarks.timing import (
    INFERENCE,
    BenchmarkImages,
    ImageSelection,
    measure_cuda,
    measure_footprint,
    measure_throughput,
    processor_name,
    ratio_of_medians,
    read_images,
    show_progress,
    stage_spreads,
    time_images,
)
from export.conversion import ParityError, network_input
from model.images.source import ImageError
from model.predictor import (
    EngineError,
    ModelError,
    Predictor,
    Provider,
    load_predictor,
    usable_cpus,
)
from model.results.files import write_bytes, write_json
from training.data.case_table import CaseError
from training.evaluation.metrics import case_errors, summarise
from training.evaluation.predict import predict_cases
from training.learning.checkpoint import CheckpointError

WEIGHTS_FOLDER = Path(__file__).resolve().parent.parent / "model" / "weights"
# the models that process.py takes, on CUDA and on the CPU
SHIPPED, SHIPPED_FOR_CPU = WEIGHTS_FOLDER / "aop.onnx", WEIGHTS_FOLDER / "aop.int8.onnx"
NAME_AND_PATH = re.compile(r"(?:([\w.-]+)=)?(.*)", re.DOTALL)
ROUNDS = 12  # that all models share


class BenchmarkError(ValueError):
    """The command line cannot be carried out; the message says what to do."""


REFUSALS = (
    BenchmarkError, CaseError, CheckpointError, EngineError, ImageError, ModelError, ParityError,
)  # fmt: skip


@dataclass(frozen=True)
class BenchmarkOptions:
    """What the command line asks for.

    models: name -> ONNX file, .safetensors file or a training's folder; the others are compared
    with the first. trained_peers: likewise, name -> path. random_peers: names of the peers with
    random weights. threads: number of CPU threads; None means all that this process may use.
    """

    models: Mapping[str, Path]
    trained_peers: Mapping[str, Path]
    random_peers: Sequence[str]
    images: ImageSelection
    demands: Demands
    rounds: int
    provider: Provider
    threads: int | None
    cache: Path | None
    output: Path | None


def main(arguments: Sequence[str] | None = None, peers: Mapping[str, NetworkMaker] = PEERS) -> int:
    """Run the command and return its exit status.

    Args:
        peers: name -> function that makes the peer's network with random weights.
    """
    try:
        options = parse_benchmark_options(arguments, peers)
        for folder in (options.output, options.cache):  # fail now, not after minutes
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        summary = run_benchmark(options, peers)
        print(summary_text(summary))
        if options.output:
            write_json(options.output / "benchmark.json", summary)
            write_bytes(options.output / "benchmark.png", plot_summary(summary))
    except REFUSALS as error:
        print(f"export.benchmark: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        cause = f"{error.filename} cannot be used: {error.strerror}" if error.filename else error
        print(f"export.benchmark: {cause}", file=sys.stderr)
        return 2
    failed = [gate.words for gate in summary.gates if not gate.passed]
    if failed:
        print(f"export.benchmark: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run_benchmark(options: BenchmarkOptions, peers: Mapping[str, NetworkMaker]) -> BenchmarkSummary:
    """Measure all models, and CUDA's variants if the first model runs on CUDA."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    images = read_images(options.images, options.rounds)
    with ExitStack() as stack:
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = _export_contenders(options, peers, cache)
        predictors = _load_predictors(contenders, options)
        first = predictors[contenders[0].name]
        models = _measure_models(contenders, predictors, images, options)
        cuda = None
        if first.provider == "cuda":
            timed = images.timed[: options.rounds]
            inputs = [network_input(first.spec, *image)[None] for image in timed]
            cuda = measure_cuda(onnxruntime, contenders[0].file, inputs)
    return BenchmarkSummary(
        provider=first.provider,
        processor=processor_name(),
        threads=options.threads or usable_cpus(),
        onnxruntime=onnxruntime.__version__,
        load=load,
        images=images.description,
        rounds=options.rounds,
        models=models,
        gates=check_gates(models, options.demands),
        cuda=cuda,
    )


def _export_contenders(
    options: BenchmarkOptions, peers: Mapping[str, NetworkMaker], cache: Path
) -> list[Contender]:
    """All models in the order of the summary; weights are exported to ONNX first."""
    trained = {**options.models, **options.trained_peers}
    random = [name for name in dict.fromkeys(options.random_peers) if name not in trained]
    contenders = []
    for name in show_progress([*trained, *random], "export"):
        if name in trained:
            contenders.append(trained_model(name, trained[name], cache))
        else:
            contenders.append(random_peer(name, peers[name], cache))
    return contenders


def _load_predictors(
    contenders: Sequence[Contender], options: BenchmarkOptions
) -> dict[str, Predictor]:
    """Name -> predictor of each model; BenchmarkError unless all run on the same provider."""
    predictors = {
        one.name: load_predictor(one.file, options.provider, options.threads)
        for one in show_progress(contenders, "load")
    }
    providers = {name: predictor.provider for name, predictor in predictors.items()}
    if len(set(providers.values())) > 1:
        raise BenchmarkError(
            f"expected all models on one provider, got {providers}: pass --provider cuda or cpu"
        )
    return predictors


def _measure_models(
    contenders: Sequence[Contender],
    predictors: Mapping[str, Predictor],
    images: BenchmarkImages,
    options: BenchmarkOptions,
) -> list[ModelFigures]:
    """The figures of every model, in the order of `contenders`."""
    provider = predictors[contenders[0].name].provider
    footprints = {
        one.name: measure_footprint(one.file, provider, options.threads)
        for one in show_progress(contenders, "start and memory")
    }
    shared, every = time_images(predictors, images.timed, options.rounds)
    rates = measure_throughput(predictors, images.timed[0])
    first_ms = shared[contenders[0].name][:, INFERENCE]
    return [
        ModelFigures(
            name=one.name,
            trained=one.trained,
            parameters=one.parameters,
            gmac=one.gmac,
            file_mb=one.file.stat().st_size / 1e6,
            footprint=footprints[one.name],
            images=len(every[one.name]),
            milliseconds=stage_spreads(every[one.name]),
            images_per_second=rates[one.name],
            slower=ratio_of_medians(shared[one.name][:, INFERENCE], first_ms) if k else None,
            errors=_errors_of_model(predictors[one.name], images) if one.trained else None,
        )
        for k, one in enumerate(contenders)
    ]


def _errors_of_model(predictor: Predictor, images: BenchmarkImages) -> MeanErrors | None:
    """Mean errors over all cases with labels; None if there are none."""
    if not images.cases:
        return None
    predictions = predict_cases(predictor, images.cases, images.folder)
    figures = summarise(*case_errors(predictions, images.cases))
    return MeanErrors.model_validate({name: figures[name] for name in MeanErrors.model_fields})


def parse_benchmark_options(
    arguments: Sequence[str] | None, peers: Mapping[str, NetworkMaker]
) -> BenchmarkOptions:
    """Read and check the command line.

    Raises:
        BenchmarkError: the options do not fit together.
        EngineError, ModelError: the shipped model cannot run on the provider.
    """
    args = _parser(sorted(peers)).parse_args(arguments)
    options = BenchmarkOptions(
        models=_models_by_name(
            (name or path.stem, path) for name, path in args.model or _shipped_models(args.provider)
        ),
        trained_peers=_models_by_name(args.peer),
        random_peers=args.peers,
        images=ImageSelection(args.data, args.images, args.split, args.input, args.images_count),
        demands=Demands(args.budget_ms, args.least_ratio, args.most_mre_px, args.most_aop_deg),
        rounds=args.rounds,
        provider=args.provider,
        threads=args.threads,
        cache=args.cache,
        output=args.output,
    )
    _reject_contradictions(options)
    return options


def _shipped_models(provider: Provider) -> list[tuple[str | None, Path]]:
    """The model that process.py takes on this machine, and the original if that is another."""
    taken = load_predictor(SHIPPED, provider, on_cpu=SHIPPED_FOR_CPU).file
    assert taken is not None  # it was loaded from a file
    return [("shipped", taken), *([("float32", SHIPPED)] if taken != SHIPPED else [])]


def _models_by_name(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    for name, path in pairs:
        if name in by_name:
            raise BenchmarkError(f"two models are called {name}: give one as OTHER={path}")
        by_name[name] = path
    return by_name


def _reject_contradictions(options: BenchmarkOptions) -> None:
    """Raise a BenchmarkError for options that contradict each other, before minutes are spent."""
    peers = [*options.trained_peers, *options.random_peers]
    both = options.models.keys() & {*peers}
    if both:
        name = min(both)
        raise BenchmarkError(f"a model and a peer are called {name}: give one as OTHER=FILE")
    others = [*options.models, *peers][1:]
    for name, _ in options.demands.least_ratio:
        if name not in others:
            known = ", ".join(dict.fromkeys(others)) or "no other model"
            raise BenchmarkError(f"--least-ratio {name}: expected one of the other models: {known}")
    images, demands = options.images, options.demands
    if images.table is None:
        for flag, value in (
            ("--images", images.folder),
            ("--split", images.split),
            ("--most-mre-px", demands.most_mre_px),
            ("--most-aop-deg", demands.most_aop_deg),
        ):
            if value is not None:
                raise BenchmarkError(f"{flag} needs a case table: add --data cases.csv")
    elif images.input is not None:
        raise BenchmarkError("--data and --input both name images: leave one out")


def _parse_model(text: str) -> tuple[str | None, Path]:
    name, path = NAME_AND_PATH.fullmatch(text).groups()  # type: ignore[union-attr]  # fits any text
    return name, Path(path)


def _parse_peer(text: str) -> tuple[str, Path]:
    name, path = _parse_model(text)
    if name is None:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, path


def _parse_ratio(text: str) -> tuple[str, float]:
    name, _, least = text.partition("=")
    try:
        return name, float(least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=RATIO, got {text!r}") from None


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _parser(peers: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("models").add_argument
    model = "ONNX file, .safetensors file or folder that training.fit wrote; may be repeated: the "
    model += "others are compared with the first (default: the shipped models)"
    add("--model", type=_parse_model, action="append", metavar="[NAME=]FILE", help=model)
    random = f"names of peers with random weights, of {', '.join(peers)} (default: all); "
    random += "--peers alone adds none"
    add("--peers", nargs="*", choices=peers, default=peers, metavar="NAME", help=random)
    peer = "trained peer: folder that training.fit wrote, .safetensors or ONNX file; may be "
    peer += "repeated; it replaces the random peer of the same name"
    add("--peer", type=_parse_peer, action="append", default=[], metavar="NAME=PATH", help=peer)
    add("--cache", type=Path, metavar="DIR", help="folder that keeps exported peers for other runs")
    add = parser.add_argument_group("images (default: smooth random ones)").add_argument
    add("--data", type=Path, metavar="TABLE", help="case table (CSV); accuracy is measured too")
    add("--images", type=Path, metavar="DIR", help="folder of its images (images/ beside it)")
    add("--split", choices=("val", "test", "all"), help="split of the table (default: val)")
    add("--input", type=Path, metavar="DIR", help="folder of images without labels")
    add(
        "--images-count",
        type=_parse_count,
        metavar="N",
        help="number of images to draw at random (all)",
    )
    add = parser.add_argument_group("run").add_argument
    add(
        "--rounds",
        type=_parse_count,
        default=ROUNDS,
        metavar="N",
        help="rounds that all models share (%(default)s)",
    )
    add("--provider", choices=get_args(Provider), default="auto", help="where to run (%(default)s)")
    add("--threads", type=_parse_count, metavar="N", help="number of CPU threads (all allowed)")
    add("--output", type=Path, metavar="DIR", help="folder for benchmark.json and benchmark.png")
    add = parser.add_argument_group("gates for the first model: exit status 1").add_argument
    budget = "largest time for 95 %% of images, ms from grey image to landmarks"
    add("--budget-ms", type=float, metavar="X", help=budget)
    ratio = "smallest ratio of NAME's network time to the first model's; may be repeated"
    add(
        "--least-ratio",
        type=_parse_ratio,
        action="append",
        default=[],
        metavar="NAME=R",
        help=ratio,
    )
    add("--most-mre-px", type=float, metavar="X", help="largest MRE, px at 512; needs --data")
    add("--most-aop-deg", type=float, metavar="X", help="largest mean AoP error, deg; needs --data")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
