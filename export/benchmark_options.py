"""The command line of export.benchmark."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from model.predictor import Provider, load_predictor

WEIGHTS = Path(__file__).resolve().parent.parent / "model" / "weights"
SHIPPED, SHIPPED_FOR_CPU = WEIGHTS / "aop.onnx", WEIGHTS / "aop.int8.onnx"  # as in process.py
NAMED = re.compile(r"(?:([\w.-]+)=)?(.*)", re.DOTALL)
ROUNDS = 12


class BenchmarkError(ValueError):
    """A command line that cannot be carried out; says what to do."""


def options(
    arguments: Sequence[str] | None, description: str | None, peers: Iterable[str]
) -> argparse.Namespace:
    """The command line's options; `models` and `peer` become name -> path.

    Raises:
        BenchmarkError: options that do not fit together.
        ModelError: the provider cannot run.
    """
    args = _parser(description, sorted(peers)).parse_args(arguments)
    models = args.model or _shipped(args.provider)
    args.models = _by_name((name or path.stem, path) for name, path in models)
    args.peer = _by_name(args.peer)
    _check(args)
    return args


def _shipped(provider: Provider) -> list[tuple[str | None, Path]]:
    """The model that process.py takes on this machine, and the one that it is made of."""
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


def _check(args: argparse.Namespace) -> None:
    """Hold options against each other before minutes are spent on them."""
    others = [*args.models, *args.peer, *args.peers][1:]
    both = args.models.keys() & {*args.peer, *args.peers}
    if both:
        name = min(both)
        raise BenchmarkError(f"a model and a peer are called {name}: give one as OTHER=FILE")
    for name, _ in args.least_ratio:
        if name not in others:
            known = ", ".join(dict.fromkeys(others)) or "no other model"
            raise BenchmarkError(f"--least-ratio {name}: expected one of those beside: {known}")
    if args.data is None:
        for option in ("images", "split", "most_mre_px", "most_aop_deg"):
            if getattr(args, option) is not None:
                flag = f"--{option.replace('_', '-')}"
                raise BenchmarkError(f"{flag} needs a case table: add --data cases.csv")
    elif args.input is not None:
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


def _parser(description: str | None, peers: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.benchmark",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("models").add_argument
    model = (
        "ONNX file, .safetensors or the folder of a training.fit; may be repeated, the first is "
    )
    model += "compared with (the shipped ones)"
    add("--model", type=_model, action="append", metavar="[NAME=]FILE", help=model)
    shown = f"with random weights: {', '.join(peers)} (all); without a name none"
    add("--peers", nargs="*", choices=peers, default=peers, metavar="NAME", help=shown)
    peer = "trained peer, in a random one's place where it has its name: the folder of a "
    peer += "training.fit, .safetensors or .onnx; may be repeated"
    add("--peer", type=_peer, action="append", default=[], metavar="NAME=PATH", help=peer)
    add("--cache", type=Path, metavar="DIR", help="keeps exported peers for other runs")
    add = parser.add_argument_group("images (smooth random ones without these)").add_argument
    add("--data", type=Path, metavar="TABLE", help="case table (CSV): accuracy is measured too")
    add("--images", type=Path, metavar="DIR", help="folder of its images (images/ beside it)")
    add("--split", choices=("val", "test", "all"), help="of the table (val)")
    add("--input", type=Path, metavar="DIR", help="any folder of images, without labels")
    add("--images-count", type=_count, metavar="N", help="take so many of them, drawn at random")
    add = parser.add_argument_group("run").add_argument
    add("--rounds", type=_count, default=ROUNDS, metavar="N", help="of all models (%(default)s)")
    add("--provider", choices=get_args(Provider), default="auto", help="the processor")
    add("--threads", type=_count, metavar="N", help="on the CPU (all that this process may use)")
    add("--output", type=Path, metavar="DIR", help="gets benchmark.json and benchmark.png")
    add = parser.add_argument_group("gates, of the first model: exit status 1").add_argument
    budget = "95 %% of images within so many ms, from grey image to landmarks"
    add("--budget-ms", type=float, metavar="X", help=budget)
    ratio = "NAME's network takes at least R times as long as the first model's; may be repeated"
    add("--least-ratio", type=_ratio, action="append", default=[], metavar="NAME=R", help=ratio)
    add("--most-mre-px", type=float, metavar="X", help="MRE at 512 px, with --data")
    add("--most-aop-deg", type=float, metavar="X", help="AoP error, with --data")
    return parser
