"""Measure models side by side: cost, time, memory and accuracy, in one run on the same images.

    python -m export.benchmark                                   # shipped model against its peers
    python -m export.benchmark --data cases.csv --split val --output DIR   # with accuracy
    python -m export.benchmark --model aop.onnx --model larger.onnx --peers unet
    python -m export.benchmark --data cases.csv --split val --peer segmentation=RUN
    python -m export.benchmark --peers unet --least-ratio unet=60 --budget-ms 50   # as a gate

The first --model is what the others are compared with, and what the gates hold. By default it is
the shipped model that process.py takes here; on the CPU its float32 original runs beside it. All
peers are for 512 px. `paper` is the method's TransUNet with its map at stride 8. `published` is the
same with the up path of the published code, which climbs to stride 2 and shrinks back. `unet` is
the challenge's baseline. Their weights are random, since time does not depend on them, and so they
have no accuracy. --peer NAME=PATH adds a trained one.

In every round each model gets the same one image. The order rotates, so that a machine which drifts
is fair to all. Each model starts after a rest, when the threads of the model before are asleep.
Models quicker than 100 ms then go on among themselves. The ratios of times are of the shared
rounds. Start and memory are measured in a process of its own for each model. Other programs disturb
times: the report states the machine's load before the run. If the session runs on CUDA, then IO
binding, CUDA graphs, fp16 and the convolution searches are measured as well.

DIR gets benchmark.json and benchmark.png. Exit status: 0 measured, 1 a gate failed, 2 nothing could
be measured; the last line of stderr then says why. --cache keeps the exported peers for other runs.
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

from export.benchmarks.peers import PEERS, Contender, Source, random_peer, trained_model
from export.benchmarks.report import (
    Demands,
    Errors,
    ModelFigures,
    Report,
    as_text,
    check_gates,
    plot,
)
from export.benchmarks.timing import (
    INFERENCE,
    ImageChoice,
    Images,
    measure_cuda,
    measure_footprint,
    processor_name,
    progress,
    ratio_of_medians,
    read_images,
    spreads,
    throughput,
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

WEIGHTS = Path(__file__).resolve().parent.parent / "model" / "weights"
SHIPPED, SHIPPED_FOR_CPU = WEIGHTS / "aop.onnx", WEIGHTS / "aop.int8.onnx"  # as in process.py
NAMED = re.compile(r"(?:([\w.-]+)=)?(.*)", re.DOTALL)
ROUNDS = 12


class BenchmarkError(ValueError):
    """A command line that cannot be carried out; says what to do."""


ERRORS = (
    BenchmarkError, CaseError, CheckpointError, EngineError, ImageError, ModelError, ParityError,
)  # fmt: skip


@dataclass(frozen=True)
class BenchmarkOptions:
    """What the command line asks for.

    models: name -> ONNX file, .safetensors or a training's folder; the others are compared with the
    first. trained_peers: likewise. random_peers: names of those with random weights. threads: None
    for all that this process may use.
    """

    models: Mapping[str, Path]
    trained_peers: Mapping[str, Path]
    random_peers: Sequence[str]
    images: ImageChoice
    demands: Demands
    rounds: int
    provider: Provider
    threads: int | None
    cache: Path | None
    output: Path | None


def main(arguments: Sequence[str] | None = None, peers: Mapping[str, Source] = PEERS) -> int:
    """Run the command; returns its exit status. `peers`: how the named ones are made."""
    try:
        options = parse_options(arguments, peers)
        for folder in (options.output, options.cache):  # not after minutes
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        report = benchmark(options, peers)
        print(as_text(report))
        if options.output:
            write_json(options.output / "benchmark.json", report)
            write_bytes(options.output / "benchmark.png", plot(report))
    except ERRORS as error:
        print(f"export.benchmark: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        words = f"{error.filename} cannot be used: {error.strerror}" if error.filename else error
        print(f"export.benchmark: {words}", file=sys.stderr)
        return 2
    failed = [gate.words for gate in report.gates if not gate.passed]
    if failed:
        print(f"export.benchmark: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def benchmark(options: BenchmarkOptions, peers: Mapping[str, Source]) -> Report:
    """Measure what the command line asks for."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    images = read_images(options.images, options.rounds)
    with ExitStack() as stack:
        cache = options.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = _export_contenders(options, peers, cache)
        predictors = _load_predictors(contenders, options)
        first = predictors[contenders[0].name]
        models = _measure(contenders, predictors, images, options)
        cuda = None
        if first.provider == "cuda":
            pictures = images.pictures[: options.rounds]
            inputs = [network_input(first.spec, *picture)[None] for picture in pictures]
            cuda = measure_cuda(onnxruntime, contenders[0].file, inputs)
    return Report(
        provider=first.provider,
        processor=processor_name(),
        threads=options.threads or usable_cpus(),
        onnxruntime=onnxruntime.__version__,
        load=load,
        images=images.words,
        rounds=options.rounds,
        models=models,
        gates=check_gates(models, options.demands),
        cuda=cuda,
    )


def _export_contenders(
    options: BenchmarkOptions, peers: Mapping[str, Source], cache: Path
) -> list[Contender]:
    """All models in the order of the report, exported if they have to be."""
    trained = {**options.models, **options.trained_peers}
    random = [name for name in dict.fromkeys(options.random_peers) if name not in trained]
    found = []
    for name in progress([*trained, *random], "export"):
        if name in trained:
            found.append(trained_model(name, trained[name], cache))
        else:
            found.append(random_peer(name, peers[name], cache))
    return found


def _load_predictors(
    contenders: Sequence[Contender], options: BenchmarkOptions
) -> dict[str, Predictor]:
    """A session for each model, all on the same provider."""
    found = {
        one.name: load_predictor(one.file, options.provider, options.threads)
        for one in progress(contenders, "load")
    }
    providers = {name: predictor.provider for name, predictor in found.items()}
    if len(set(providers.values())) > 1:
        raise BenchmarkError(f"the models run on different providers, {providers}: name a provider")
    return found


def _measure(
    contenders: Sequence[Contender],
    predictors: Mapping[str, Predictor],
    images: Images,
    options: BenchmarkOptions,
) -> list[ModelFigures]:
    """The figures of every model."""
    provider = predictors[contenders[0].name].provider
    prints = {
        one.name: measure_footprint(one.file, provider, options.threads)
        for one in progress(contenders, "start and memory")
    }
    shared, every = time_images(predictors, images.pictures, options.rounds)
    rates = throughput(predictors, images.pictures[0])
    own = shared[contenders[0].name][:, INFERENCE]
    return [
        ModelFigures(
            name=one.name,
            trained=one.trained,
            parameters=one.parameters,
            gmac=one.gmac,
            file_mb=one.file.stat().st_size / 1e6,
            footprint=prints[one.name],
            images=len(every[one.name]),
            milliseconds=spreads(every[one.name]),
            images_per_second=rates[one.name],
            slower=ratio_of_medians(shared[one.name][:, INFERENCE], own) if k else None,
            errors=_errors(predictors[one.name], images) if one.trained else None,
        )
        for k, one in enumerate(contenders)
    ]


def _errors(predictor: Predictor, images: Images) -> Errors | None:
    """Mean errors over all cases; None without cases."""
    if not images.cases:
        return None
    predictions = predict_cases(predictor, images.cases, images.folder)
    found = summarise(*case_errors(predictions, images.cases))
    return Errors.model_validate({name: found[name] for name in Errors.model_fields})


def parse_options(arguments: Sequence[str] | None, peers: Mapping[str, Source]) -> BenchmarkOptions:
    """The command line's options.

    Raises:
        BenchmarkError: options that do not fit together.
        ModelError: the provider cannot run.
    """
    args = _parser(sorted(peers)).parse_args(arguments)
    options = BenchmarkOptions(
        models=_by_name(
            (name or path.stem, path) for name, path in args.model or _shipped(args.provider)
        ),
        trained_peers=_by_name(args.peer),
        random_peers=args.peers,
        images=ImageChoice(args.data, args.images, args.split, args.input, args.images_count),
        demands=Demands(args.budget_ms, args.least_ratio, args.most_mre_px, args.most_aop_deg),
        rounds=args.rounds,
        provider=args.provider,
        threads=args.threads,
        cache=args.cache,
        output=args.output,
    )
    _check(options)
    return options


def _shipped(provider: Provider) -> list[tuple[str | None, Path]]:
    """The model that process.py takes on this machine, and the one that it was made from."""
    taken = load_predictor(SHIPPED, provider, on_cpu=SHIPPED_FOR_CPU).file
    assert taken is not None  # it was loaded from a file
    return [("shipped", taken), *([("float32", SHIPPED)] if taken != SHIPPED else [])]


def _by_name(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in pairs:
        if name in found:
            raise BenchmarkError(f"two models are called {name}: give one as OTHER={path}")
        found[name] = path
    return found


def _check(options: BenchmarkOptions) -> None:
    """Hold options against each other before minutes are spent on them."""
    peers = [*options.trained_peers, *options.random_peers]
    both = options.models.keys() & {*peers}
    if both:
        name = min(both)
        raise BenchmarkError(f"a model and a peer are called {name}: give one as OTHER=FILE")
    others = [*options.models, *peers][1:]
    for name, _ in options.demands.least_ratio:
        if name not in others:
            known = ", ".join(dict.fromkeys(others)) or "no other model"
            raise BenchmarkError(f"--least-ratio {name}: expected one of those beside: {known}")
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
        raise BenchmarkError("the images come from --data or from --input: leave one out")


def _model(text: str) -> tuple[str | None, Path]:
    name, path = NAMED.fullmatch(text).groups()  # type: ignore[union-attr]  # fits any text
    return name, Path(path)


def _peer(text: str) -> tuple[str, Path]:
    name, path = _model(text)
    if name is None:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, path


def _ratio(text: str) -> tuple[str, float]:
    name, _, least = text.partition("=")
    try:
        return name, float(least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=RATIO, as unet=60, got {text!r}") from None


def _count(text: str) -> int:
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
    model = "ONNX file, .safetensors or folder of a training.fit; may be repeated, the others are "
    model += "compared with the first (the shipped ones)"
    add("--model", type=_model, action="append", metavar="[NAME=]FILE", help=model)
    shown = f"peers with random weights: {', '.join(peers)} (all); without a name none"
    add("--peers", nargs="*", choices=peers, default=peers, metavar="NAME", help=shown)
    peer = "trained peer: folder of a training.fit, .safetensors or .onnx; may be repeated; it "
    peer += "replaces the random peer of its name"
    add("--peer", type=_peer, action="append", default=[], metavar="NAME=PATH", help=peer)
    add("--cache", type=Path, metavar="DIR", help="folder that keeps exported peers for other runs")
    add = parser.add_argument_group("images (smooth random ones without these)").add_argument
    add("--data", type=Path, metavar="TABLE", help="case table (CSV): accuracy is measured too")
    add("--images", type=Path, metavar="DIR", help="folder of its images (images/ beside it)")
    add("--split", choices=("val", "test", "all"), help="split of the table (val)")
    add("--input", type=Path, metavar="DIR", help="any folder of images without labels")
    add("--images-count", type=_count, metavar="N", help="number of images, drawn at random (all)")
    add = parser.add_argument_group("run").add_argument
    add("--rounds", type=_count, default=ROUNDS, metavar="N", help="shared rounds (%(default)s)")
    add("--provider", choices=get_args(Provider), default="auto", help="processor (%(default)s)")
    add("--threads", type=_count, metavar="N", help="threads on the CPU (all allowed ones)")
    add("--output", type=Path, metavar="DIR", help="folder for benchmark.json and benchmark.png")
    add = parser.add_argument_group("gates, of the first model: exit status 1").add_argument
    budget = "most ms for 95 %% of images, from grey image to landmarks"
    add("--budget-ms", type=float, metavar="X", help=budget)
    ratio = "NAME's network takes R times as long as the first model's or more; may be repeated"
    add("--least-ratio", type=_ratio, action="append", default=[], metavar="NAME=R", help=ratio)
    add("--most-mre-px", type=float, metavar="X", help="largest MRE at 512 px, with --data")
    add("--most-aop-deg", type=float, metavar="X", help="largest AoP error, with --data")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
