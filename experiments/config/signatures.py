"""Constructor signatures read from source, without importing anything: what makes a bad key an answer in a second.

Our constructors are the schema of our YAML files. This module finds the function or class a ``_target_`` names in our own
packages, parses it, and says which keyword arguments it takes, which it needs, and of which plain types they are.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("models", "datamodules", "lightning_modules", "experiments")


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    parameters: dict[str, Parameter]
    open_ended: bool  # takes **kwargs: anything goes


class UnknownTarget(LookupError):
    """The target does not exist; ``choices`` are the names that stand where it was looked for."""

    def __init__(self, message: str, choices: list[str]):
        super().__init__(message)
        self.choices = choices


def is_ours(target: str) -> bool:
    return target.split(".")[0] in PACKAGES


def signature_of(target: str) -> Signature:
    """The signature of one of our targets, by its dotted path. Raises UnknownTarget."""
    path, names = _module_of(target)
    node, module = _find(path, names, target)
    if isinstance(node, ast.ClassDef):
        signature = _class_signature(node, module)
    else:
        signature = _function_signature(node, skip_first=False)
    plain = {n: replace(p, annotation=_without_alias(p.annotation, module)) for n, p in signature.parameters.items()}
    return Signature(plain, signature.open_ended)


def _module_of(target: str) -> tuple[Path, list[str]]:
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = ROOT.joinpath(*parts[:cut]).with_suffix(".py")
        if path.is_file():
            return path, parts[cut:]
    folder = ROOT / parts[0]
    while len(parts) > 2 and (folder / parts[1]).is_dir():
        folder, parts = folder / parts[1], parts[1:]
    prefix = ".".join(folder.relative_to(ROOT).parts)
    modules = [f"{prefix}.{p.stem}" for p in sorted(folder.glob("*.py")) if p.stem != "__init__"]
    raise UnknownTarget(f"there is no module for '{target}'", modules)


_FILES: dict[ast.Module, Path] = {}  # of the parsed modules


@cache
def _parse(path: Path) -> ast.Module:
    module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    _FILES[module] = path
    return module


def _find(path: Path, names: list[str], target: str) -> tuple[Any, ast.Module]:
    module = _parse(path)
    body, node = module.body, None
    for name in names:
        definitions = {n.name: n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
        if name not in definitions:
            prefix = target[: -len(name)]
            raise UnknownTarget(f"'{path.relative_to(ROOT)}' has no '{name}'", [prefix + n for n in definitions if n[0] != "_"])
        node = definitions[name]
        body = getattr(node, "body", [])
    return node, module


def _without_alias(annotation: ast.expr | None, module: ast.Module) -> ast.expr | None:
    """``Dtype`` becomes the ``Literal[...]`` that a module of ours assigned to that name."""
    if not isinstance(annotation, ast.Name):
        return annotation
    for node in module.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == annotation.id for target in node.targets):
            return node.value
    origin = _resolve(annotation.id, module)
    if origin is not None and is_ours(origin):
        path = ROOT.joinpath(*origin.split(".")[:-1]).with_suffix(".py")
        return _without_alias(annotation, _parse(path)) if path.is_file() and _parse(path) is not module else annotation
    return annotation


def _class_signature(node: ast.ClassDef, module: ast.Module) -> Signature:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _with_passed_on(item, node, module)
    decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
    bases = [ast.unparse(b) for b in node.bases]
    if "dataclass" in decorators or "NamedTuple" in bases:
        fields = [(f.target.id, f) for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        return Signature({name: Parameter(name, f.annotation, f.value is None) for name, f in fields}, open_ended=False)
    for base in bases:  # the constructor is inherited
        origin = _resolve(base, module)
        if origin is not None and is_ours(origin):
            return signature_of(origin)
    return Signature({}, open_ended=bool(bases))


def _with_passed_on(init: ast.FunctionDef, node: ast.ClassDef, module: ast.Module) -> Signature:
    """Of a constructor: with the arguments of the base class, where ``**kwargs`` are handed on to it."""
    constructor = _function_signature(init, skip_first=True)
    origin = _resolve(ast.unparse(node.bases[0]), module) if node.bases else None
    if not init.args.kwarg or origin is None or not is_ours(origin):
        return constructor
    for call in (part for part in ast.walk(init) if isinstance(part, ast.Call)):
        spread = [word.value.id for word in call.keywords if word.arg is None and isinstance(word.value, ast.Name)]
        if ast.unparse(call.func) == "super().__init__" and spread == [init.args.kwarg.arg]:
            base = signature_of(origin)
            settled = {*list(base.parameters)[: len(call.args)], *(word.arg for word in call.keywords)}
            passed_on = {name: parameter for name, parameter in base.parameters.items() if name not in settled}
            return Signature(passed_on | constructor.parameters, base.open_ended)
    return constructor


def _resolve(name: str, module: ast.Module) -> str | None:
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ".".join(_FILES[module].relative_to(ROOT).with_suffix("").parts) + "." + name
    return None


def _function_signature(node: ast.FunctionDef, skip_first: bool) -> Signature:
    positional = node.args.posonlyargs + node.args.args
    if skip_first:
        positional = positional[1:]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = list(zip(positional, defaults, strict=False)) + list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
    parameters = {arg.arg: Parameter(arg.arg, arg.annotation, default is None) for arg, default in pairs}
    return Signature(parameters, open_ended=node.args.kwarg is not None)


_PLAIN = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "Path": (str,), "None": (type(None),)}
_CONTAINERS = {"list": list, "Sequence": list, "tuple": list, "dict": dict, "Mapping": dict}


def mismatch(annotation: ast.expr | None, value: object) -> str | None:
    """What the annotation wants, when ``value`` surely is not it; None when it fits or cannot be told from source."""
    if annotation is None:
        return None
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):  # a quoted annotation
        annotation = ast.parse(annotation.value, mode="eval").body
    options = _alternatives(annotation)
    if any(_accepts(option, value) for option in options):
        return None
    return " or ".join(ast.unparse(option) for option in options)


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _alternatives(annotation.left) + _alternatives(annotation.right)
    return [annotation]


def _accepts(option: ast.expr, value: object) -> bool:
    name = ast.unparse(option.value if isinstance(option, ast.Subscript) else option).split(".")[-1]
    if isinstance(option, ast.Subscript) and name == "Literal":
        elements = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
        return value in [ast.literal_eval(e) for e in elements]
    if name in _PLAIN:
        is_bool = isinstance(value, bool)
        return isinstance(value, _PLAIN[name]) and (not is_bool or name == "bool")
    if name in _CONTAINERS:
        if not isinstance(value, _CONTAINERS[name]) or (isinstance(value, dict) and "_target_" in value):
            return False
        inner = option.slice if isinstance(option, ast.Subscript) else None
        if isinstance(value, list) and inner is not None and not isinstance(inner, ast.Tuple):
            return all(mismatch(inner, element) is None for element in value)
        return True
    # Any other type is an object: it comes from a `_target_` node (or, for a callable, from its partial), never from a number.
    return isinstance(value, dict) or name in ("Any", "object")
