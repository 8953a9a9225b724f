"""YAML to typed configuration; every problem is reported with its place in the file; live reload."""

from usbip_plugin.config.matching import Match, matches, may_overlap
from usbip_plugin.config.parse import Parsed, parse_config
from usbip_plugin.config.reload import ConfigWatcher, Loaded, load_config
from usbip_plugin.config.schema import (
    DEFAULT_CONFIG_PATH,
    DEFAULT_DOMAIN,
    DEFAULT_LISTEN,
    DEFAULT_LOG_LEVEL,
    DEFAULT_PLUGIN_DIRECTORY,
    DEFAULT_POD_RESOURCES_SOCKET,
    LOG_LEVELS,
    Config,
    DeviceSelector,
    Extra,
    FileSettings,
    LockConfig,
    NodePermissions,
    OnLoss,
    ResourceConfig,
    Selector,
)

__all__ = [
    "DEFAULT_CONFIG_PATH",
    "DEFAULT_DOMAIN",
    "DEFAULT_LISTEN",
    "DEFAULT_LOG_LEVEL",
    "DEFAULT_PLUGIN_DIRECTORY",
    "DEFAULT_POD_RESOURCES_SOCKET",
    "LOG_LEVELS",
    "Config",
    "ConfigWatcher",
    "DeviceSelector",
    "Extra",
    "FileSettings",
    "Loaded",
    "LockConfig",
    "Match",
    "NodePermissions",
    "OnLoss",
    "Parsed",
    "ResourceConfig",
    "Selector",
    "load_config",
    "matches",
    "may_overlap",
    "parse_config",
]
