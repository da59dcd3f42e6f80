"""Measure models side by side: cost, time, memory and accuracy, in one run on the same images.

    python -m export.benchmark                                   # shipped model against its peers
    python -m export.benchmark --data cases.csv --split val --output DIR   # with accuracy
    python -m export.benchmark --model aop.onnx --model larger.onnx --peers unet
    python -m export.benchmark --data cases.csv --split val --peer segmentation=RUN
    python -m export.benchmark --peers unet --least-ratio unet=60 --budget-ms 50   # as a gate

The first --model is what the others are compared with and what the gates hold: by default the
shipped one that process.py takes here, and on the CPU beside it its float32 original. Peers, all
for 512 px: `paper`, the method's TransUNet with its map at stride 8; `published`, the same with the
published code's up path, which climbs to stride 2 and shrinks back; `unet`, the challenge's
baseline. Their weights are random, since time does not depend on them, and so they have no
accuracy; --peer NAME=PATH adds a trained one.

In every round each model gets the same one image, in an order that rotates, so that a machine which
drifts is fair to all, and after a rest, so that the threads of the model before are asleep; models
quicker than 100 ms then go on among themselves. The ratios of times are of the shared rounds. Start
and memory are measured in a process of its own for each model. Other programs disturb times: the
report says what the machine's load was before. Where the session runs on CUDA, IO binding, CUDA
graphs, fp16 and the convolution searches are measured as well.

DIR gets benchmark.json and benchmark.png. Exit status: 0 measured, 1 a gate failed, 2 nothing could
be measured; the last line of stderr then says why. --cache keeps the exported peers for other runs.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import onnxruntime

from export import benchmark_cuda
from export.benchmark_images import Images, images_of
from export.benchmark_options import BenchmarkError, options
from export.benchmark_plot import plot
from export.benchmark_report import Errors, ModelFigures, Report, as_text, gates_of
from export.footprint import footprint, processor_name
from export.peers import PEERS, Contender, Source, given_model, random_peer
from export.timing import (
    INFERENCE,
    network_input,
    progress,
    ratio_of_medians,
    spreads,
    throughput,
    time_images,
)
from export.to_onnx import ParityError
from model.images.source import ImageError
from model.predictor import EngineError, ModelError, Predictor, load_predictor, usable_cpus
from model.results.files import write_bytes, write_json
from training.cases import CaseError
from training.checkpoint import CheckpointError
from training.metrics import case_errors, summarise
from training.predict import predict_cases

ERRORS = (BenchmarkError, CaseError, CheckpointError, EngineError, ImageError, ModelError)


def main(arguments: Sequence[str] | None = None, peers: Mapping[str, Source] = PEERS) -> int:
    """Run the command; returns its exit status. `peers`: how the named ones are made."""
    try:
        args = options(arguments, __doc__, peers)
        for folder in (args.output, args.cache):  # not after minutes
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        report = benchmark(args, peers)
        print(as_text(report))
        if args.output:
            write_json(args.output / "benchmark.json", report)
            write_bytes(args.output / "benchmark.png", plot(report))
    except (*ERRORS, ParityError) as error:
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


def benchmark(args: argparse.Namespace, peers: Mapping[str, Source]) -> Report:
    """Measure what the command line asks for."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    images = images_of(args)
    with ExitStack() as stack:
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = _contenders(args, peers, cache)
        predictors = _predictors(contenders, args)
        provider = predictors[contenders[0].name].provider
        models = _measured(contenders, predictors, images, args)
        cuda = None
        if provider == "cuda":
            spec = predictors[contenders[0].name].spec
            inputs = [network_input(spec, picture) for picture in images.pictures[: args.rounds]]
            cuda = benchmark_cuda.measure(onnxruntime, contenders[0].file, inputs)
    return Report(
        provider=provider,
        processor=processor_name(),
        threads=args.threads or usable_cpus(),
        onnxruntime=onnxruntime.__version__,
        load=load,
        images=images.words,
        rounds=args.rounds,
        models=models,
        gates=gates_of(models, args),
        cuda=cuda,
    )


def _contenders(
    args: argparse.Namespace, peers: Mapping[str, Source], cache: Path
) -> list[Contender]:
    """All models, the first first; what has to be exported is."""
    given = args.models | args.peer
    random = [name for name in dict.fromkeys(args.peers) if name not in given]
    found = []
    for name in progress([*given, *random], "export"):
        if name in given:
            found.append(given_model(name, given[name], cache))
        else:
            found.append(random_peer(name, peers[name], cache))
    return found


def _predictors(contenders: Sequence[Contender], args: argparse.Namespace) -> dict[str, Predictor]:
    """A session for each model, all on the same provider."""
    found = {
        one.name: load_predictor(one.file, args.provider, args.threads)
        for one in progress(contenders, "load")
    }
    providers = {name: predictor.provider for name, predictor in found.items()}
    if len(set(providers.values())) > 1:
        raise BenchmarkError(f"the models run on different providers, {providers}: name a provider")
    return found


def _measured(
    contenders: Sequence[Contender],
    predictors: Mapping[str, Predictor],
    images: Images,
    args: argparse.Namespace,
) -> list[ModelFigures]:
    """The figures of every model."""
    provider = predictors[contenders[0].name].provider
    prints = {
        one.name: footprint(one.file, provider, args.threads)
        for one in progress(contenders, "start and memory")
    }
    shared, every = time_images(predictors, images.pictures, args.rounds)
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
    """Mean errors over all cases; None where there are none."""
    if not images.cases:
        return None
    predictions = predict_cases(predictor, images.cases, images.folder)
    found = summarise(*case_errors(predictions, images.cases))
    return Errors.model_validate({name: found[name] for name in Errors.model_fields})


if __name__ == "__main__":
    raise SystemExit(main())
