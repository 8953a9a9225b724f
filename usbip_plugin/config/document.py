"""The YAML document: a tree of nodes that keeps line numbers and raw text, with bounds on what a file may cost."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Concatenate, Generic, ParamSpec, TypeVar

import yaml

from usbip_plugin.config.problems import ConfigProblem, shown
from usbip_plugin.errors import ConfigError

MAX_FILE_BYTES = 1024 * 1024
"""Bytes of a configuration file."""
TOO_LARGE = f"must not be larger than {MAX_FILE_BYTES // 1024} KiB"
MAX_DEPTH = 16
"""Levels of nested mappings and lists."""
MAX_NODES = 50_000
"""YAML nodes in a file, counted with aliases expanded, so that a small file cannot stand for a large one."""
MAX_PROBLEMS = 100
"""Errors shown for one file, and warnings."""
MAX_KEPT = 10 * MAX_PROBLEMS
"""Errors kept in memory for one file, and warnings; any more are only counted."""
MAX_TAG_DIRECTIVES = 16
"""%TAG directives in a file; the time to parse n of them grows with the square of n."""

_Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STR_TAG = "tag:yaml.org,2002:str"
_NULL_TAG = "tag:yaml.org,2002:null"
_MERGE = "<<"
_P = ParamSpec("_P")
_T = TypeVar("_T")
_D = TypeVar("_D")


@dataclass(frozen=True, slots=True)
class Parsed(Generic[_T]):
    """A valid configuration and the warnings about its file, one line each with its place in the file."""

    config: _T
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class Problems:
    """The errors and warnings found in one file, each as "source:line: path: text"."""

    source: str
    errors: int = 0
    """Number of errors so far, including those that are not kept."""
    _warned: int = 0
    _errors: list[tuple[int, ConfigProblem]] = field(default_factory=list)
    _warnings: list[tuple[int, ConfigProblem]] = field(default_factory=list)
    _hints: list[tuple[int, ConfigProblem]] = field(default_factory=list)

    def error(self, node: Node, text: str) -> None:
        self.errors += 1
        self._keep(self._errors, node, text)

    def warn(self, node: Node, text: str, *, hint: bool = False) -> None:
        """Adds a warning. hint: the warning may explain an error, so `raise_if_any` shows it with the errors."""
        self._warned += 1
        self._keep(self._warnings, node, text)
        if hint and self.room:
            self._hints.append(self._warnings[-1])

    @property
    def room(self) -> bool:
        """Whether another problem would still be shown: False beyond MAX_PROBLEMS errors or warnings."""
        return self.errors <= MAX_PROBLEMS and self._warned <= MAX_PROBLEMS

    @property
    def warnings(self) -> tuple[ConfigProblem, ...]:
        """The warnings in the order of the file's lines, cut at MAX_PROBLEMS."""
        return self._cut(self._warnings, self._warned)

    def raise_if_any(self) -> None:
        """Raises ConfigError if there are errors: with all errors and hints, by line, cut at MAX_PROBLEMS."""
        if self._errors:
            raise ConfigError(self.source, self._cut([*self._errors, *self._hints], self.errors + len(self._hints)))

    def _keep(self, kept: list[tuple[int, ConfigProblem]], node: Node, text: str) -> None:
        if len(kept) < MAX_KEPT:
            kept.append((node.line, ConfigProblem(self.source, text, line=node.line, path=node.path)))

    def _cut(self, kept: list[tuple[int, ConfigProblem]], count: int) -> tuple[ConfigProblem, ...]:
        lines = tuple(problem for _, problem in sorted(kept, key=itemgetter(0))[:MAX_PROBLEMS])
        return (*lines, ConfigProblem(self.source, f"and {count - len(lines)} more")) if count > len(lines) else lines


def normal_key(key: str) -> str:
    """Returns the form of a key in which hostPath, host_path, host-path and (as in the Go program) hostpath agree."""
    return key.lower().replace("_", "").replace("-", "")


@dataclass(frozen=True, slots=True)
class Node:
    """A YAML node and its place in the file: the line, from 1, and the path of keys and indexes.

    path: such as resources.storage[0].selector; "" for the root.
    """

    yaml: yaml.Node
    path: str
    line: int

    @property
    def scalar(self) -> str | None:
        """The raw text of a scalar, unconverted (0951 stays 0951), or None if the node is not a scalar."""
        return self.yaml.value if isinstance(self.yaml, yaml.ScalarNode) else None

    @property
    def quoted(self) -> bool:
        """Whether the node is a scalar that quotes mark as text."""
        return isinstance(self.yaml, yaml.ScalarNode) and bool(self.yaml.style) and self.yaml.tag == _STR_TAG

    @property
    def empty(self) -> bool:
        """Whether the value is null, ~, or missing after the colon."""
        return self.yaml.tag == _NULL_TAG

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.yaml, yaml.MappingNode)

    @property
    def is_sequence(self) -> bool:
        return isinstance(self.yaml, yaml.SequenceNode)

    def describe(self) -> str:
        if self.empty:
            return "nothing"
        if self.is_mapping:
            return "a mapping"
        return "a list" if self.is_sequence else f"'{shown(self.scalar or '')}'"

    def items(self) -> Iterator[Node]:
        """Yields the elements of a sequence, and nothing for other nodes."""
        if isinstance(self.yaml, yaml.SequenceNode):
            for index, value in enumerate(self.yaml.value):
                yield Node(value, f"{self.path}[{index}]", value.start_mark.line + 1)

    def pairs(self, problems: Problems, same: Callable[[str], str] = normal_key) -> list[tuple[str, Node]]:
        """Returns the keys (as written) and values of a mapping with merge keys resolved; nothing for other nodes.

        Adds an error to problems for each duplicate key and each key that is not a scalar.
        same: the normal form of a key; two keys with the same normal form are duplicates.
        """
        values: dict[str, tuple[str, Node]] = {}
        merged: list[Node] = []
        if not isinstance(self.yaml, yaml.MappingNode):
            return []
        for key, value in self.yaml.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                problems.error(Node(key, self.path, line), "a key must be plain text, not a list or a mapping")
                continue
            name = shown(key.value)
            place = Node(value, f"{self.path}.{name}" if self.path else name, line)
            if key.value == _MERGE and not key.style:
                merged.append(Node(value, self.path, line))
            elif (normal := same(key.value)) in values:
                problems.error(place, f"duplicate key (first defined on line {values[normal][1].line})")
            else:
                values[normal] = (key.value, place)
        for source in merged:
            for mapping in (source, *source.items()):
                for written, value in Node(mapping.yaml, self.path, mapping.line).pairs(problems, same):
                    values.setdefault(same(written), (written, value))
        return list(values.values())


def decoded(data: bytes, source: str) -> str:
    """Returns a file's text. Raises ConfigError if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refused(source, "must be UTF-8 text", line) from error


def read_document(text: str, source: str) -> Node | None:
    """Returns the root node of the single YAML document in text, or None if the text is empty.

    Raises ConfigError if the text is not valid YAML or exceeds a bound. Before it builds any tree, refuses more than
    MAX_FILE_BYTES, nesting beyond MAX_DEPTH and more than MAX_NODES nodes.
    """
    with _yaml_errors(source):
        _check_size(text, source)
        root = yaml.compose(text, Loader=_Loader)
    return None if root is None else _bounded(root, source)


def read_documents(text: str, source: str) -> tuple[Node, ...]:
    """Returns the root nodes of all YAML documents in text but empty ones. Raises ConfigError as read_document()."""
    with _yaml_errors(source):
        _check_size(text, source)
        roots = [root for root in yaml.compose_all(text, Loader=_Loader) if root is not None]
    return tuple(_bounded(root, source) for root in roots)


@contextlib.contextmanager
def _yaml_errors(source: str) -> Iterator[None]:
    """Turns an error of PyYAML into a ConfigError with its line."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(shown(part) for part in (error.context, error.problem) if part)
        if "cannot start any token" in what:
            what += "; indent with spaces, not tabs, and quote a value that begins with @ or `"
        raise _refused(source, f"not valid YAML: {what}", line) from error
    except yaml.YAMLError as error:
        raise _refused(source, f"not valid YAML: {shown(' '.join(str(error).split()))}") from error


def _refused(source: str, text: str, line: int | None = None) -> ConfigError:
    return ConfigError(source, [ConfigProblem(source, text, line=line)])


def _check_size(text: str, source: str) -> None:
    """Raises ConfigError for nesting and sizes that must be refused before yaml.compose() runs, which recurses."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _refused(source, "not valid Unicode text") from error
    if size > MAX_FILE_BYTES:
        raise _refused(source, TOO_LARGE)
    if text.count("%TAG") > MAX_TAG_DIRECTIVES:
        raise _refused(source, f"more than {MAX_TAG_DIRECTIVES} %TAG directives")
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _refused(source, f"nested deeper than {MAX_DEPTH} levels", line)
        if count > 2 * MAX_NODES:
            raise _refused(source, f"more than {MAX_NODES} values", line)


def _bounded(root: yaml.Node, source: str) -> Node:
    """Returns the root. Raises ConfigError if aliases expand to more than MAX_NODES nodes or contain themselves."""
    stack = [(root, 0)]
    count = 0
    while stack:
        node, depth = stack.pop()
        count += 1
        if count > MAX_NODES or depth > 2 * MAX_DEPTH:
            line = node.start_mark.line + 1
            raise _refused(source, "aliases expand to too many values; write the values out", line)
        if isinstance(node, yaml.SequenceNode):
            stack.extend((child, depth + 1) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            stack.extend((child, depth + 1) for pair in node.value for child in pair)
    return Node(root, "", root.start_mark.line + 1)


_CLOSE = 0.74  # least similarity of two keys (0 to 1, by difflib) at which one counts as a misspelling of the other


class Unknown(enum.Enum):
    """The treatment of an unknown key in a mapping.

    WARN: a warning. The Go program ignores unknown keys, so a file that has one goes on working.
    FAIL_CLOSED: an error, as is a key without a value, because ignoring either would select more devices.
    ERROR: an error. The Go program did not have this mapping, so no old file depends on it.
    """

    WARN = "warn"
    FAIL_CLOSED = "fail closed"
    ERROR = "error"


class Fields(dict[str, Node]):
    """The values of a mapping by their keys as the code spells them. A key without a value is left out."""

    def read(
        self,
        key: str,
        problems: Problems,
        reader: Callable[Concatenate[Node, Problems, _P], _T | None],
        default: _D,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T | _D:
        """Returns what the reader returns for the key's value; the default if that is None, or the key is missing."""
        value = reader(self[key], problems, *args, **kwargs) if key in self else None
        return default if value is None else value


def read_fields(
    node: Node, problems: Problems, known: tuple[str, ...], unknown: Unknown, elsewhere: Mapping[str, str] | None = None
) -> Fields | None:
    """Returns the fields of a mapping. Returns None and adds an error to problems if the node is not a mapping.

    known: the keys that are allowed. unknown: the treatment of all other keys.
    elsewhere: the known key that is meant by each of these other keys, in their normal form. Such a key is an error.
    """
    if not node.is_mapping:
        problems.error(node, f"expected a mapping (keys: {', '.join(known)}), got {node.describe()}")
        return None
    canonical = {normal_key(key): key for key in known}
    names = {**(elsewhere or {}), **canonical}
    found = Fields()
    for written, value in node.pairs(problems):
        key = canonical.get(normal_key(written))
        if key is not None:
            if not value.empty:
                found[key] = value
            elif unknown is Unknown.FAIL_CLOSED:
                problems.error(value, "has no value; add one, or remove the key")
            continue
        close: list[str] = []
        # the search is slow, so skip it if its result would not be shown
        if problems.room:
            import difflib  # noqa: PLC0415 - a file without mistakes needs none of it

            close = difflib.get_close_matches(normal_key(written), names, n=1, cutoff=_CLOSE)
        keys = ", ".join(known)
        cure = f"did you mean {names[close[0]]}? (keys: {keys})" if close else f"expected one of {keys}"
        if unknown is Unknown.WARN and normal_key(written) not in (elsewhere or {}):
            problems.warn(value, f"ignored unknown key; {cure}", hint=bool(close))
        else:
            problems.error(value, f"unknown key; {cure}")
    return found
