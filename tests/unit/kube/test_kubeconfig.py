"""What a kubeconfig selects, and the words for one that cannot be used."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ConfigError
from usbip_plugin.kube.client import connect
from usbip_plugin.kube.kubeconfig import Kubeconfig

WHOLE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "home",
    "contexts": [
        {"name": "home", "context": {"cluster": "pi", "user": "me"}},
        {"name": "work", "context": {"cluster": "prod", "user": "admin"}},
    ],
    "clusters": [
        {"name": "pi", "cluster": {"server": "http://pi:1"}},
        {"name": "prod", "cluster": {"server": "http://prod:2"}},
    ],
    "users": [
        {"name": "me", "user": {"token": "mine"}},
        {"name": "admin", "user": {"token": " of-admin\n"}},
        {"name": "sso", "user": {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "nosuchcmd"}}},
    ],
}


def written(directory: Path, value: Mapping[str, Any] | str = WHOLE) -> str:
    path = directory / "config"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.mark.parametrize(
    ("chosen", "host", "token"),
    [
        ({}, "http://pi:1", "Bearer mine"),
        ({"context": "work"}, "http://prod:2", "Bearer of-admin"),
        ({"cluster": "prod"}, "http://prod:2", "Bearer mine"),
        ({"user": "admin"}, "http://pi:1", "Bearer  of-admin"),
        ({"context": "work", "cluster": "pi", "user": "me"}, "http://pi:1", "Bearer mine"),
    ],
)
async def test_flags_choose_context_cluster_and_user(
    tmp_path: Path, chosen: dict[str, str], host: str, token: str
) -> None:
    configuration = await Kubeconfig(written(tmp_path), **chosen).load(SystemClock())
    assert configuration.host == host
    assert configuration.api_key["BearerToken"].split() == token.split()


def plugin(command: str) -> dict[str, Any]:
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": command}}
    return WHOLE | {"users": [{"name": "me", "user": user}]}


def script(directory: Path, text: str) -> str:
    path = directory / "plugin"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("value", "chosen", "message"),
    [
        ("hello", {}, "is not valid: expected a mapping with clusters, contexts and users"),
        ("- 1", {}, "is not valid: expected a mapping with clusters, contexts and users"),
        ("", {}, "is not valid: expected a mapping with clusters, contexts and users"),
        ("contexts: 5", {}, "is not valid: expected a mapping with clusters, contexts and users"),
        ("contexts: [{}]", {}, "is not valid: expected a mapping with clusters, contexts and users"),
        ("a: [", {}, "is not valid YAML: "),
        ("\x00\x01", {}, "is not valid YAML: "),
        ("kind: Config", {}, "selects no context; use --context, or run: kubectl config use-context NAME"),
        (WHOLE, {"context": "hom"}, "has no context 'hom'; it has home, work"),
        (WHOLE, {"cluster": "x"}, "has no cluster 'x'; it has pi, prod"),
        (WHOLE, {"user": "x"}, "has no user 'x'; it has me, admin, sso"),
        (WHOLE | {"contexts": [{"name": "home"}]}, {}, "is not valid: context 'home' is empty"),
        (WHOLE | {"clusters": []}, {}, "is not valid: "),
        (WHOLE, {"user": "sso"}, ": credential plugin 'nosuchcmd' not found; install it, or use another --user"),
    ],
)
async def test_an_unusable_kubeconfig_is_said_in_one_sentence_with_its_path(
    tmp_path: Path, value: Mapping[str, Any] | str, chosen: dict[str, str], message: str
) -> None:
    path = written(tmp_path, value)
    with pytest.raises(ConfigError) as caught:
        await Kubeconfig(path, **chosen).load(SystemClock())
    text = str(caught.value)
    assert text.startswith(f"kubeconfig {path}")
    assert message in text
    assert "\n" not in text


async def test_the_output_of_a_credential_plugin_that_fails_is_said(tmp_path: Path) -> None:
    failing = script(tmp_path, "echo please log in >&2; exit 3")
    with pytest.raises(ConfigError, match=r"credential plugin '.*/plugin' failed: process returned 3. please log in"):
        await Kubeconfig(written(tmp_path, plugin(failing))).load(SystemClock())


async def test_a_flag_rules_out_the_service_account_of_the_pod(tmp_path: Path) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443", "HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="ServiceAccount"):
        await connect(environ=pod, service_account=tmp_path)
    with pytest.raises(ConfigError, match="ServiceAccount"):
        await connect(environ=pod | {"KUBECONFIG": ""}, service_account=tmp_path)
    with pytest.raises(ConfigError, match="kubeconfig"):
        await connect(context="no-such-context", environ=pod, service_account=tmp_path)
