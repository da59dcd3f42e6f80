"""What the networks need of itertools and Python 3.9 has not, in the Codabench bundle."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def pairwise(values: Iterable[T]) -> Iterator[tuple[T, T]]:
    """a, b, c -> (a, b), (b, c)."""
    first, second = itertools.tee(values)
    next(second, None)
    return zip(first, second, strict=False)
