"""Credentials are in no text that the plugin shows."""

from __future__ import annotations

import base64
import io
import json
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.kubeconfig import kubeconfig
from usbip_plugin.errors import PluginError
from usbip_plugin.kube.client import connect
from usbip_plugin.kube.events import NORMAL, EventText, event_body
from usbip_plugin.model import NodeIdentity
from usbip_plugin.observe.logs import JsonFormatter, TextFormatter
from usbip_plugin.observe.redaction import _RULES, MARGIN, REDACTED, redacted
from usbip_plugin.observe.spans import span
from usbip_plugin.observe.tracing import Tracing

TOKEN = "s3cr3t-" + "".join(random.Random(1).choices("abcdefgh", k=24))
ENCODED = base64.b64encode(TOKEN.encode()).decode()
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQifQ.c2lnbmF0dXJl"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\nabc\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {TOKEN}",
        f"headers {{'authorization': 'Basic {TOKEN}'}}",
        f'user "u": token: {TOKEN}',
        f'{{"token": "{TOKEN}", "x": 1}}',
        f"id-token={TOKEN}",
        f"password = {TOKEN}",
        f"client-key-data: {TOKEN}",
        f"https://user:{TOKEN}@proxy:3128/ refused",
    ],
)
def test_a_credential_is_removed_and_the_rest_of_the_text_stays(text: str) -> None:
    shown = redacted(text, 1000)
    assert TOKEN not in shown
    assert REDACTED in shown
    assert shown[:4] == text[:4]


def test_tokens_and_keys_are_recognized_by_their_form() -> None:
    assert redacted(f"a {JWT} b", 100) == f"a {REDACTED} b"
    assert redacted(f"a {PEM} b", 100) == f"a {REDACTED} b"
    assert redacted(f"a {PEM[:40]}", 100) == f"a {REDACTED}"


@pytest.mark.parametrize(
    "text",
    [
        "lab:3240/1-1 is held by node node-a for pod default/secret-reader since 2026-01-01T00:00:00+00:00",
        "API server: get secrets: forbidden; grant it to the ServiceAccount, see rbac/",
        "cannot read the token: gone",
        "USB/IP server http://lab:3240: connection refused",
    ],
)
def test_a_text_without_a_credential_stays(text: str) -> None:
    assert redacted(text, 1000) == text


@given(st.text())
def test_a_second_redaction_changes_nothing(text: str) -> None:
    assert redacted(redacted(text, 100), 100) == redacted(text, 100)


@pytest.mark.parametrize(
    "word",
    [
        *("bearer", "BASIC", "Token", "password", "passwd", "pa\u017f\u017fwd", "SECRET", "secret-TO\u212aEN"),
        *("api-key", "apikey", "API_KEY", "authorization", "client-key-data"),
    ],
)
@pytest.mark.parametrize("between", [" ", ": ", "='"])
def test_every_text_that_a_rule_changes_is_redacted(word: str, between: str) -> None:
    text = f"a {word}{between}12345678 b"
    ruled = text
    for pattern, replacement in _RULES:
        ruled = pattern.sub(replacement, ruled)
    assert redacted(text, 1000) == ruled


def shown(error: BaseException) -> str:
    """Returns an error as both kinds of log line with its traceback, as a span, and as an Event."""
    record = logging.LogRecord("n", logging.ERROR, "", 0, "failed", None, (type(error), error, error.__traceback__))
    record.cause = str(error)
    tracing = Tracing("n", version="1", environ={})
    with pytest.raises(type(error)), span(tracing.tracer, "x", {"usbip.cause": str(error)}):
        raise error
    body = event_body(NodeIdentity("n", "b"), EventText(NORMAL, "R", "A", str(error)), None, "e", "t")
    stream = io.StringIO()
    stream.write(JsonFormatter().format(record) + TextFormatter().format(record) + json.dumps(body))
    stream.write(repr(tracing.recent.traces()))
    return stream.getvalue()


BROKEN_KUBECONFIGS = {
    "not YAML": f"users: [{{name: u, user: {{token: {TOKEN}",
    "a tab": f"users:\n\t- name: u\n\t  user: {{token: {TOKEN}}}\n",
    "a list": f"- {TOKEN}\n- token: {TOKEN}\n",
    "no context": f"apiVersion: v1\nkind: Config\nusers: [{{name: u, user: {{token: {TOKEN}}}}}]\n",
    "bad base64": (
        "apiVersion: v1\nkind: Config\ncurrent-context: x\n"
        "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1', certificate-authority-data: '?'}}]\n"
        f"contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\nusers: [{{name: u, user: {{token: {TOKEN}}}}}]\n"
    ),
    "an invalid key": (
        "apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]\n"
        "contexts: [{name: x, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {client-certificate-data: "
        f"'{ENCODED}', client-key-data: '{ENCODED}'}}}}]\n"
    ),
}


@pytest.mark.parametrize("text", BROKEN_KUBECONFIGS.values(), ids=BROKEN_KUBECONFIGS)
async def test_an_invalid_kubeconfig_is_not_quoted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((PluginError, OSError)) as caught:
        await _ask(path)
    for text in (str(caught.value), shown(caught.value)):
        assert TOKEN not in text
        assert ENCODED not in text


async def _ask(kubeconfig: Path) -> None:
    client = await connect(str(kubeconfig))
    try:
        await client.request("get", "/version", resource="version", timeout=5)
    finally:
        await client.close()


async def _echo(request: web.Request) -> web.Response:
    header = request.headers.get("Authorization", "")
    return web.json_response({"message": f"no: {header}"}, status=int(request.path.strip("/")))


async def _nonsense(request: web.Request) -> web.Response:
    return web.Response(text=f"<html>{request.headers}</html>", status=int(request.path.strip("/")))


@pytest.mark.parametrize("answer", [_echo, _nonsense], ids=["echo", "nonsense"])
@pytest.mark.parametrize("status", [200, 401, 403, 500])
async def test_an_api_server_or_proxy_that_echoes_the_token_is_not_quoted(
    answer: Callable[[web.Request], Awaitable[web.Response]],
    status: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = web.Application()
    app.router.add_get("/{status}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig(f"http://127.0.0.1:{runner.addresses[0][1]}", TOKEN), encoding="utf-8")
    client = await connect(str(path))
    try:
        if status == 200 and answer is _echo:
            assert TOKEN in (await client.request("get", "/200", resource="x"))["message"], "the token is sent"
            return
        with pytest.raises(PluginError) as caught:
            await client.request("get", f"/{status}", resource="x")
    finally:
        await client.close()
        await runner.cleanup()
    assert TOKEN not in str(caught.value), "the text also goes to the kubelet and to a collector"
    assert TOKEN not in shown(caught.value)
    assert TOKEN not in caplog.text


def test_a_credential_that_begins_within_the_limit_is_removed_and_the_text_is_cut() -> None:
    shown = redacted("x" * 90 + f" token: {'t' * 2000} " + "y" * (1 << 20), 100)
    assert "tt" not in shown
    assert len(shown) < 100 + MARGIN + len(REDACTED)
