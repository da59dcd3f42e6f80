"""What the ModelSpec and the networks' configurations need of pydantic, in the Codabench bundle.

An ingestion program's environment need not have pydantic. The values were checked by the real one
when the bundle was made: here they are only kept, and read from JSON.
"""

import json
from importlib import import_module
from typing import Any

WEIGHTS, SETTINGS = "aop.pt", "aop.json"  # the bundle's files: torch state, and what to build
CLASS = "__class__"  # JSON's key for the module and the class of an object


class ValidationError(ValueError):
    """Never raised: nothing is checked here."""


class BaseModel:
    """Keeps the values that it is given; every field needs one, for defaults are not known."""

    def __init__(self, **values: Any) -> None:
        vars(self).update({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def BeforeValidator(_: Any) -> None:
    """Has no effect."""


def ConfigDict(**_: Any) -> None:
    """Has no effect."""


def Field(*_: Any, **__: Any) -> None:
    """Has no effect."""


def read_models(text: str) -> Any:
    """JSON whose objects name their class -> the same, with objects of these classes."""
    return json.loads(text, object_hook=_model)


def _model(values: dict[str, Any]) -> Any:
    if CLASS not in values:
        return values
    module, name = values.pop(CLASS).rsplit(".", 1)
    return getattr(import_module(module), name)(**values)
