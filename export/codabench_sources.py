"""The Python files of the Codabench bundle: modules of this repository, rewritten to lie flat.

The bundle's model.py is export/codabench_model.py. It and all that it imports of model/ are taken
from the source tree, and rewritten as far as the place demands it:

- model.frame becomes aop_frame, in one folder with the others: the name `model` is taken there;
- cv2 and pydantic, which may be missing there, become export/codabench_cv2.py and ..._pydantic.py;
- what Python 3.9 lacks is put in its words: unions of types, zip(strict=...), itertools.pairwise.
"""

import ast
import re
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "export.codabench_model"
STAND_INS = {name: f"export.codabench_{name}" for name in ("cv2", "pydantic", "itertools")}
OURS = {"model", "export", "training", "process"}


class SourceError(ValueError):
    """A module that cannot be in the bundle, and why."""


def flat_sources() -> dict[str, str]:
    """File name -> text of every Python file of the bundle."""
    texts: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name not in texts:
            texts[name], needed = flattened(module)
            waiting += needed
    return texts


def flat_name(module: str) -> str:
    """The name in the bundle of a module of ours: model.network.vit -> aop_network_vit."""
    if module == ENTRY:
        return "model"
    return re.sub(r"^(export\.codabench|model)(?![^._])", "aop", module).replace(".", "_")


def flattened(module: str) -> tuple[str, list[str]]:
    """A module's rewritten source, and the modules of ours that it needs.

    Raises:
        SourceError: it imports what cannot be in the bundle, or in a way that cannot be rewritten.
    """
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    if not path.is_file():
        raise SourceError(f"there is no module {module} to put into the bundle")
    rewriter = _Rewriter(module)
    tree = rewriter.visit(ast.parse(path.read_text(encoding="utf-8")))
    origin = f"# Made from {path.relative_to(ROOT).as_posix()} by python -m export.codabench"
    return f"{origin}\n{ast.unparse(ast.fix_missing_locations(tree))}\n", rewriter.needed


class _Rewriter(ast.NodeTransformer):
    """Rewrites one module; `needed` are the modules of ours that it imports."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.needed: list[str] = []

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        aliases = [
            statement  # such as Pixels = A | B; annotations are not evaluated
            for statement in node.body
            if isinstance(statement, ast.Assign)
            and any(isinstance(part, ast.BitOr) for part in ast.walk(statement))
        ]
        for alias in aliases:
            alias.value = _without_unions(alias.value)
        head = ast.parse("from __future__ import annotations").body
        head += ast.parse("from typing import Union").body if aliases else []
        at = 1 if ast.get_docstring(node) else 0
        node.body[at:at] = head
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            if alias.name.split(".")[0] in OURS:
                raise SourceError(f"{self.module} imports {alias.name}: write from ... import")
            if alias.name in STAND_INS and not self._is_stand_in:
                alias.asname = alias.asname or alias.name
                alias.name = self._flat(STAND_INS[alias.name])
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level or node.module is None:
            raise SourceError(f"{self.module} imports relatively: write the module's full name")
        module = node.module if self._is_stand_in else STAND_INS.get(node.module, node.module)
        top = module.split(".")[0]
        if top in OURS:
            if top != "model" and module not in STAND_INS.values():
                raise SourceError(f"{self.module} imports {module}, which only training needs")
            node.module = self._flat(module)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = [word for word in node.keywords if word.arg != "strict"]
        return node

    @property
    def _is_stand_in(self) -> bool:
        return self.module in STAND_INS.values()

    def _flat(self, module: str) -> str:
        self.needed.append(module)
        return flat_name(module)


def _without_unions(value: ast.expr) -> ast.expr:
    """`A | B` anywhere in an expression -> `Union[A, B]`."""

    class Unions(ast.NodeTransformer):
        def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
            self.generic_visit(node)
            if not isinstance(node.op, ast.BitOr):
                return node
            both = ast.Tuple([node.left, node.right], ast.Load())
            return ast.Subscript(ast.Name("Union", ast.Load()), both, ast.Load())

    return cast(ast.expr, Unions().visit(value))
