"""Finding families, operators and targets by looking in their folders: there is no central list."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING

from xexport.core.errors import unknown_name

if TYPE_CHECKING:
    from xexport.core.family import Family
    from xexport.core.op import OpSpec

__all__ = [
    "family_aliases",
    "family_names",
    "family_title",
    "find_family",
    "get_family",
    "get_op",
    "op_names",
]


@cache
def family_names() -> tuple[str, ...]:
    """Names of the model files, without importing any (so without torch)."""
    names = [p.name[:-3] for p in files("xexport.models").iterdir() if p.name.endswith(".py")]
    return tuple(sorted(n for n in names if not n.startswith("_")))


@cache
def family_title(name: str) -> str:
    """The first line of a model file's docstring, read without importing the file."""
    source = (files("xexport.models") / f"{name}.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source)) or ""
    return doc.split("\n", 1)[0]


@cache
def family_aliases() -> dict[str, str]:
    """Other names of the families -> their file's name, read without importing any file."""
    found: dict[str, str] = {}
    for name in family_names():
        source = (files("xexport.models") / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.keyword) and node.arg == "aliases":
                found |= dict.fromkeys(ast.literal_eval(node.value), name)
    return found


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in family_names():
        raise unknown_name("model", name, family_names())
    family: Family = import_module(f"xexport.models.{name}").FAMILY
    return family


def find_family(name: str) -> Family:
    """The family of that name or alias.

    Raises:
        UnknownNameError: with the nearest names.
    """
    return get_family(family_aliases().get(name, name))


@cache
def op_names() -> tuple[str, ...]:
    """Names of the operator folders."""
    root = files("xexport.ops")
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and (p / "function.py").is_file()))


def get_op(name: str) -> OpSpec:
    """The operator of that name (imports onnx, and torch for its reference).

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in op_names():
        raise unknown_name("operator", name, op_names())
    import_module(f"xexport.ops.{name}.reference")
    spec: OpSpec = import_module(f"xexport.ops.{name}.function").SPEC
    return spec
