"""The calls of loggers in usbip_plugin, from its syntax trees. Used by docs/generate.py and by the tests."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import usbip_plugin

ROOT = Path(usbip_plugin.__file__).parent
LEVELS = {"debug": "debug", "info": "info", "warning": "warn", "error": "error", "critical": "error"}
"""The names of levels in the log, by the method of the logger."""
LOGGERS = {"log", "_log", "logger"}
OTHER_METHODS = {"log", "exception", "warn", "fatal"}


class LogCall(NamedTuple):
    """One call of a logger.

    where: file and line. level: as the log shows it; "" for a method that the project does not use.
    message: the first argument; None without arguments. arguments: how many there are.
    fields: the keys of `extra`, in order.
    """

    where: str
    level: str
    logger: str
    message: ast.expr | None
    arguments: int
    keywords: frozenset[str]
    fields: tuple[str, ...]

    @property
    def text(self) -> str:
        """Returns the message, or "" if it is not a literal."""
        return str(self.message.value) if isinstance(self.message, ast.Constant) else ""


def log_calls() -> Iterator[LogCall]:
    """Yields every call of a logger in usbip_plugin."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".")
        extra: tuple[str, ...] = ()
        constants: dict[str, str] = {}
        for node in _in_order(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Assign(targets=[ast.Name(id="extra")], value=value):
                    extra = _keys(value, (), constants)
                case ast.Assign(targets=[ast.Name(id=constant)], value=ast.Constant(value=str(text))):
                    constants[constant] = text
                case ast.Call(func=ast.Attribute(value=ast.Name(id=logger), attr=method), args=args, keywords=keywords):
                    if logger not in LOGGERS or method not in {*LEVELS, *OTHER_METHODS}:
                        continue
                    given = {str(keyword.arg): keyword.value for keyword in keywords}
                    fields = _keys(given["extra"], extra, constants) if "extra" in given else ()
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    message = args[0] if args else None
                    yield LogCall(where, LEVELS.get(method, ""), name, message, len(args), frozenset(given), fields)


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and everything in it in the order of the source, unlike ast.walk."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def _keys(extra: ast.expr, assigned: tuple[str, ...], constants: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the keys of a value for `extra`.

    assigned: those of the last value of a variable of that name. constants: texts of the module, by name.
    """
    match extra:
        case ast.Dict(keys=keys):
            return tuple(
                ast.literal_eval(key) if isinstance(key, ast.Constant) else constants[ast.unparse(key)]
                for key in keys
                if key
            )
        case ast.IfExp(body=body):
            return _keys(body, assigned, constants)
        case _:
            return assigned
