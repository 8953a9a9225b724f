"""The JSON Schemas of the configuration files, made from the parser's own keys and bounds.

Used by docs/generate.py. A schema accepts every file that the parser accepts. It cannot express everything that the
parser refuses: numbers without quotes that have two readings, values that depend on another value, duplicates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from reference import Key, export_keys, keys

from usbip_plugin.config import export, parse, scalars, schema, selectors
from usbip_plugin.config.document import Unknown, normal_key
from usbip_plugin.model import DEFAULT_USBIP_PORT, HUB_CLASS

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

TEXT: Schema = {"type": ["string", "number", "boolean"]}
"""A value that the parser reads as text, whatever YAML makes of it: a serial number may be 0042."""


def printable(longest: int) -> Schema:
    """Returns the schema of printable text of 1 to `longest` characters, besides blanks at its ends."""
    return {**TEXT, "pattern": rf"^\s*[^\s\x00-\x1f]([^\x00-\x1f]{{0,{longest - 2}}}[^\s\x00-\x1f])?\s*$"}


def any_case(key: str) -> str:
    """Returns the pattern of a key in every spelling that the parser accepts: hostPath, host_path, HOSTPATH."""
    return "^[-_]*" + "[-_]*".join(f"[{letter}{letter.upper()}]" for letter in normal_key(key)) + "[-_]*$"


def has(key: str, value: Schema | None = None) -> Schema:
    """Returns the schema of a mapping that has this key in any spelling, and with such a value."""
    there: Schema = {"not": {"propertyNames": {"not": {"pattern": any_case(key)}}}}
    return there if value is None else {**there, "patternProperties": {any_case(key): value}}


def or_nothing(value: Schema) -> Schema:
    """Returns the schema of such a value, or none after the colon, which the parser takes for a key left out."""
    kind = value.get("type")
    if kind is None or "enum" in value:
        return {"anyOf": [value, {"type": "null"}]}
    return {**value, "type": [*([kind] if isinstance(kind, str) else kind), "null"]}


@dataclass(frozen=True, slots=True)
class Mappings:
    """The mappings of one file, each of them a definition of the schema.

    values: the schema of each value, by the path of its key.
    texts: the meaning of each key, by its path.
    """

    values: Mapping[str, Schema]
    texts: Mapping[str, Key]

    def mapping(
        self, name: str, path: str, known: Iterable[str], unknown: Unknown, required: Sequence[str] = ()
    ) -> Schema:
        """Returns the definition of a mapping. name: of the definition. path: of the mapping, with a dot at its end."""
        properties: Schema = {}
        for key in known:
            value = self.values[path + key]
            if key not in required and unknown is not Unknown.FAIL_CLOSED:
                value = or_nothing(value)
            described = self.texts.get(path + key)
            note = {"description": _plain(described.text)} if described else {}
            properties[key] = {**note, **value}
        spellings = {any_case(key): {"$ref": f"#/$defs/{name}/properties/{key}"} for key in properties}
        found: Schema = {"type": "object", "properties": properties, "patternProperties": spellings}
        if unknown is not Unknown.WARN:
            found["additionalProperties"] = False
        if required:
            # the plain form has the better message; the other accepts more spellings
            found["allOf"] = [{"anyOf": [{"required": [key]}, has(key)]} for key in required]
        return found


def _plain(text: str) -> str:
    """Returns Markdown as plain text, without links and what refers to the document."""
    text = re.sub(r",? see \[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r" \[above\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
    return text[:1].upper() + text[1:]


def _boolean() -> Schema:
    return {"enum": [True, False, "true", "false"]}


def _choice(options: type[Enum]) -> Schema:
    values = [str(option.value) for option in options]
    return {"anyOf": [{"enum": values}, {"type": "string", "pattern": _any_of(values)}]}


def _any_of(values: Iterable[str]) -> str:
    spelt = ("".join(f"[{c}{c.upper()}]" if c.isalpha() else re.escape(c) for c in value) for value in values)
    return f"^({'|'.join(spelt)})$"


def _duration(least: float, most: float, *, whole: bool = False) -> Schema:
    number: Schema = {"type": "number", "minimum": least, "maximum": most}
    if whole:
        number["multipleOf"] = 1
    text = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h)){1,16}$|^[0-9]+(\.[0-9]+)?$"
    return {"anyOf": [{"type": "string", "pattern": text, "maxLength": scalars.MAX_NUMBER_CHARACTERS}, number]}


def _one_or_list(one: Schema, item: Schema) -> Schema:
    many = {"type": "array", "items": item, "minItems": 1, "maxItems": schema.MAX_SELECTOR_VALUES, "uniqueItems": True}
    return {"anyOf": [one, many]}


def _usb_numbers() -> Schema:
    def number(least: int, digits: str) -> Schema:
        text = {"type": "string", "pattern": rf"^((0[xX])?{digits}[0-9a-fA-F]{{1,4}}|0o[0-7]{{1,6}})$"}
        return {"anyOf": [text, {"type": "integer", "minimum": least, "maximum": 0xFFFF}]}

    return _one_or_list(number(0, ""), number(1, "(?!0+$)"))


def _path(pattern: str = "") -> Schema:
    """Returns the schema of an absolute path without "..". pattern: of what may follow, instead of anything."""
    return {
        "type": "string",
        "pattern": pattern or "^/.*$",
        "maxLength": schema.MAX_PATH_CHARACTERS,
        "not": {"pattern": r"/\.\.(/|$)|[\x00-\x1f]"},
    }


def _template() -> Schema:
    fields = "|".join(schema.FIELDS)
    chosen = "|".join(sorted(schema.FIELDS_OF_DEVICE))
    one = _path(rf"^/([^{{}}]|\{{({fields})\}})*$")
    alone = rf"/(\{{[a-z]+\}})*\{{({chosen})\}}(\{{[a-z]+\}})*(/|$)"
    one["not"] = {"pattern": rf"{one['not']['pattern']}|{alone}"}
    return {"anyOf": [one, {"type": "array", "items": one, "maxItems": parse.MAX_TEMPLATES, "uniqueItems": True}]}


def _class() -> Schema:
    names = sorted(scalars.CLASS_NAMES)
    digits = r"^(0[xX])?(?!0?9$)[0-9a-fA-F]{1,2}$"
    return {
        "anyOf": [
            {"enum": names},
            {"type": "string", "pattern": f"{_any_of(names)}|{digits}"},
            {"type": "integer", "minimum": 0, "maximum": 0xFF, "not": {"const": HUB_CLASS}},
        ]
    }


def _id() -> Schema:
    text = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,9})$"}
    return {"anyOf": [text, {"type": "integer", "minimum": 0, "maximum": parse.MAX_ID}]}


def _host() -> Schema:
    return {
        **TEXT,
        "maxLength": scalars.MAX_HOST_CHARACTERS,
        "pattern": r"^(\[[0-9A-Za-z._:%-]+\]|[0-9A-Za-z._:%-]+)$",
        "not": {"pattern": rf"^(\[?[^:]*:[0-9]+\]?|\[?{scalars.SHORT_IPV4}\]?)$"},
    }


def _conditions() -> dict[str, Schema]:
    """Returns the values of a selector's keys."""
    busid: Schema = {**TEXT, "pattern": r"^[0-9A-Za-z.:*?\[\]!-]+$", "maxLength": scalars.MAX_BUS_ID_GLOB}
    usb_id: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{4}:[0-9a-fA-F]{4}$"}
    return {
        "vendor": _usb_numbers(),
        "product": _usb_numbers(),
        "usb_ids": _one_or_list(usb_id, usb_id),
        "bus_id": _one_or_list({"anyOf": [busid, {"const": ""}]}, busid),
        "serial": printable(scalars.MAX_SERIAL_CHARACTERS),
        "class": _class(),
        "all": _boolean(),
    }


def _selector(mappings: Mappings, path: str) -> Schema:
    found = mappings.mapping("selector", path, selectors.SELECTOR_KEYS, Unknown.FAIL_CLOSED)
    zero = {"anyOf": [{"const": 0}, {"type": "string", "pattern": "^(0[xX])?0{1,4}$"}]}
    empty: dict[str, Schema] = {"vendor": zero, "product": zero, "bus_id": {"const": ""}}
    condition = {"anyOf": [has(key, {"not": empty[key]} if key in empty else None) for key in selectors.CONDITION_KEYS]}
    return {**found, "if": has("all", {"enum": [True, "true"]}), "then": {"not": condition}, "else": condition}


def _file(title: str, root: Schema, definitions: Schema) -> Schema:
    return {"$schema": DIALECT, "title": title, **root, "$defs": definitions}


def config_schema() -> Schema:
    """Returns the schema of the plugin's file."""
    resource, entry = "resources.NAME.", "resources.NAME.devices[]."
    devices: Schema = {"type": "array", "items": {"$ref": "#/$defs/device"}}
    node = {**TEXT, "pattern": f"^{scalars.NODE_NAME_GLOB}$"}
    flag = printable(schema.MAX_PATH_CHARACTERS)
    address = r"(\[[^\]]*\]|[^:,]*):[0-9]{1,5}"
    values: dict[str, Schema] = {
        "resources": {
            "type": "object",
            "propertyNames": {
                "pattern": "^[0-9A-Za-z]([0-9A-Za-z._-]*[0-9A-Za-z])?$",
                "maxLength": scalars.MAX_NAME_CHARACTERS,
            },
            "additionalProperties": {"$ref": "#/$defs/resource"},
        },
        "lock": {"$ref": "#/$defs/lock"},
        "lock.duration": _duration(schema.MIN_LOCK_DURATION_S, schema.MAX_LOCK_DURATION_S, whole=True),
        "allocateTimeout": _duration(schema.MIN_ALLOCATE_TIMEOUT_S, schema.MAX_ALLOCATE_TIMEOUT_S),
        "publishNodeStatus": _boolean(),
        "domain": flag,
        "plugin-directory": flag,
        "pod-resources-socket": flag,
        "log-level": {"enum": list(schema.LOG_LEVELS)},
        "listen": {**flag, "pattern": rf"^\s*{address}(,{address})*\s*$"},
        resource + "devices": devices,
        resource + "children": {
            "type": "array",
            "maxItems": parse.MAX_KINDS,
            "items": {
                "anyOf": [
                    {"enum": list(schema.CHILD_KINDS)},
                    {"type": ["string", "number"], "pattern": "^[a-z0-9_-]{1,32}$"},
                ],
                "not": {"enum": ["net", "usb"]},
            },
        },
        resource + "childrenTimeout": _duration(0, schema.MAX_CHILDREN_TIMEOUT_S),
        resource + "containerPath": _template(),
        resource + "byId": _boolean(),
        resource + "permissions": {"$ref": "#/$defs/permissions"},
        resource + "permissions.mode": {
            "anyOf": [
                {"type": "string", "pattern": "^0o?0?[0-7]{1,3}$"},
                {"type": "integer", "minimum": 0, "maximum": 777},
            ]
        },
        resource + "permissions.user": _id(),
        resource + "permissions.group": _id(),
        resource + "readOnly": _boolean(),
        resource + "allowClasses": {
            "type": "array",
            "items": _class(),
            "minItems": 1,
            "maxItems": schema.MAX_SELECTOR_VALUES,
        },
        resource + "onLoss": _choice(schema.OnLoss),
        resource + "evictAfter": _duration(schema.MIN_EVICT_AFTER_S, schema.MAX_EVICT_AFTER_S),
        resource + "cdi": _boolean(),
        resource + "nodeNames": _one_or_list(node, node),
        entry + "target": {"$ref": "#/$defs/target"},
        entry + "target.host": _host(),
        entry + "target.port": {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": 65535},
                {"type": "string", "pattern": "^[0-9]{1,5}$"},
            ],
            "default": DEFAULT_USBIP_PORT,
        },
        entry + "selector": {"$ref": "#/$defs/selector"},
        entry + "extras": {"type": "array", "items": {"$ref": "#/$defs/extra"}},
        entry + "extras[].hostPath": _path(),
        entry + "extras[].containerPath": _path(),
        entry + "extras[].permissions": {"type": "string", "pattern": r"^(?!.*(.).*\1)[rwm]{1,3}$"},
        **{f"{entry}selector.{key}": value for key, value in _conditions().items()},
    }
    made = Mappings(values, {key.path: key for key in keys()})
    root = made.mapping("file", "", parse.TOP_KEYS, Unknown.WARN, ["resources"])
    device = made.mapping("device", entry, selectors.DEVICE_KEYS, Unknown.WARN, ["target", "selector"])
    beside = [any_case(key) for key in selectors.CONDITION_KEYS]
    one = made.mapping("resource", resource, parse.RESOURCE_KEYS, Unknown.ERROR)
    given: Schema = {"not": {"type": "null"}}
    restart, evict = ({"type": "string", "pattern": _any_of([word])} for word in ("restart", "evict"))
    true = {"enum": [True, "true"]}
    needs = (
        ("permissions", given, "cdi", true),
        ("onLoss", restart, "cdi", true),
        ("evictAfter", given, "onLoss", evict),
    )
    permissions = made.mapping("permissions", f"{resource}permissions.", parse.PERMISSION_KEYS, Unknown.ERROR)
    return _file(
        "Configuration of usbip-plugin",
        {"$ref": "#/$defs/file"},
        {
            "file": root,
            "lock": made.mapping("lock", "lock.", parse.LOCK_KEYS, Unknown.ERROR),
            "resource": {
                **one,
                # the list stands for `devices`
                "type": ["array", "object"],
                "items": {"$ref": "#/$defs/device"},
                "if": {"type": "object"},
                "then": {
                    "anyOf": [{"required": ["devices"]}, has("devices")],
                    "allOf": [
                        {"if": has(key, value), "then": has(other, wanted)} for key, value, other, wanted in needs
                    ],
                },
            },
            "permissions": {**permissions, "minProperties": 1},
            "device": {**device, "propertyNames": {"not": {"anyOf": [{"pattern": pattern} for pattern in beside]}}},
            "target": made.mapping("target", f"{entry}target.", selectors.TARGET_KEYS, Unknown.WARN, ["host"]),
            "selector": _selector(made, f"{entry}selector."),
            "extra": made.mapping("extra", f"{entry}extras[].", selectors.EXTRA_KEYS, Unknown.WARN, ["hostPath"]),
        },
    )


def export_schema() -> Schema:
    """Returns the schema of the exporter's file."""
    network: Schema = {"type": "string", "pattern": "^[0-9a-fA-F.:]+(/[0-9]{1,3})?$"}
    selector_texts = {key.path.rpartition(".")[2]: key for key in keys() if ".selector." in key.path}
    values: dict[str, Schema] = {
        "export": {"type": "array", "items": {"$ref": "#/$defs/selector"}, "maxItems": export.MAX_SELECTORS},
        "allow": {"type": "array", "items": network, "minItems": 1, "maxItems": export.MAX_NETWORKS},
        "fence": _boolean(),
        "whenApiIsAway": _choice(export.WhenApiIsAway),
        "names": {"type": "array", "items": _host(), "maxItems": export.MAX_NAMES},
        **_conditions(),
    }
    made = Mappings(values, {key.path: key for key in export_keys()} | selector_texts)
    root = made.mapping("file", "", export.EXPORT_KEYS, Unknown.ERROR, ["export"])
    return _file(
        "Configuration of usbip-plugin export",
        {"$ref": "#/$defs/file"},
        {"file": root, "selector": _selector(made, "")},
    )
