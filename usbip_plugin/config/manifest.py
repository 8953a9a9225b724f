"""Configurations in a file: the file itself, or the ConfigMaps of a Kubernetes manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import yaml

from usbip_plugin.config.document import MAX_FILE_BYTES, TOO_LARGE, Node, Problems, decoded, normal_key, read_documents
from usbip_plugin.config.problems import ConfigProblem
from usbip_plugin.errors import ConfigError

PLUGIN_FILE = "config.yaml"
"""The key of the plugin's configuration in its ConfigMap."""
EXPORTER_FILE = "export.yaml"
"""The key of the exporter's configuration in its ConfigMap."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration in a file.

    exporter: whether it is the exporter's and not the plugin's.
    text: with as many empty lines before it as give each line its number in the file.
    """

    exporter: bool
    text: str


def read_text(file: BinaryIO, source: str) -> str:
    """Returns the text of an open file. Raises ConfigError if it is too large or not UTF-8, OSError as read()."""
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(source, [ConfigProblem(source, TOO_LARGE)])
    return decoded(data, source)


def configurations(text: str, source: str) -> tuple[Configuration, ...]:
    """Returns the configurations in YAML text: the text itself, or what the ConfigMaps of a manifest contain.

    Raises ConfigError if the text is not valid YAML, or is a manifest without any configuration.
    """
    roots = read_documents(text, source)
    values = [_values(root, source) for root in roots]
    if not any("kind" in found for found in values):
        exporter = any("export" in found and "resources" not in found for found in values)
        return (Configuration(exporter, text),)
    found = tuple(
        configuration
        for document in values
        for item in _objects(document, source)
        for configuration in _in_config_map(item, source)
    )
    if not found:
        missing = f"has no ConfigMap with {PLUGIN_FILE} or {EXPORTER_FILE} below data; name the file that has it"
        raise ConfigError(source, [ConfigProblem(source, missing)])
    return found


def _values(node: Node | None, source: str) -> dict[str, Node]:
    """Returns the values of a mapping; none if the node is another one."""
    return {} if node is None else {normal_key(key): value for key, value in node.pairs(Problems(source))}


def _objects(document: dict[str, Node], source: str) -> Iterator[dict[str, Node]]:
    """Yields the object of a document, and those of a List."""
    yield document
    if "items" in document:
        for item in document["items"].items():
            yield _values(item, source)


def _in_config_map(item: dict[str, Node], source: str) -> Iterator[Configuration]:
    kind = item.get("kind")
    if kind is None or kind.scalar != "ConfigMap":
        return
    for name, node in _values(item.get("data"), source).items():
        if name in (PLUGIN_FILE, EXPORTER_FILE) and (text := node.scalar) is not None:
            yield Configuration(name == EXPORTER_FILE, "\n" * _lines_before(node) + text)


def _lines_before(node: Node) -> int:
    """Returns the number of lines in the file before the first line of a scalar's text."""
    block = isinstance(node.yaml, yaml.ScalarNode) and node.yaml.style in ("|", ">")
    return node.yaml.start_mark.line + int(block)
