"""The commands for the whole cluster: devices, explain, release."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator

from usbip_plugin.cli.devices import LockedDevice, known_devices, paint, rows, show_devices, structured, wants_colour
from usbip_plugin.cli.explain import DeviceFacts, render
from usbip_plugin.cli.explain import explain as explanation_of
from usbip_plugin.cli.lookup import DeviceLookup, domain_of, find_config
from usbip_plugin.cli.node_commands import namespace_of
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.release import plan
from usbip_plugin.cli.release import release as carry_out
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ReleaseRefused
from usbip_plugin.kube.client import connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LeaseStore
from usbip_plugin.usbip.client import TcpUsbipClient


async def read_devices(options: argparse.Namespace) -> tuple[LockedDevice, ...]:
    """Returns every device that has a lock. Raises KubeError, or ConfigError if the kubeconfig cannot be used."""
    kube = await connect(options.kubeconfig)
    try:
        return await known_devices(KubernetesLeases(kube, namespace_of(options.namespace)))
    finally:
        await kube.close()


async def devices(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin devices`. Returns the exit status."""
    show_devices(rows(await read_devices(options), SystemClock().now()), options.output)
    return Exit.DONE


async def explain(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin explain DEVICE`. Returns the exit status."""
    async with _facts(options) as (facts, _store):
        found = explanation_of(facts)
    if options.output == "text":
        _say(render(found, colour=wants_colour(sys.stdout)))
    else:
        lists = {"because": list(found.because), "next": list(found.next)}
        _say(structured(dataclasses.asdict(found) | lists, options.output))
    return Exit.DONE if found.available else Exit.PROBLEM


async def release(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin release DEVICE`. Returns the exit status.

    Raises ReleaseRefused if the device may be attached and --force is not given, if the release is not confirmed, or
    if the lock has changed meanwhile.
    """
    async with _facts(options) as (facts, store):
        if not facts.holder or facts.known is None:
            _say(f"{facts.device} has no holder; there is nothing to release.")
            return Exit.DONE
        intended = plan(facts, facts.known)
        for sentence in intended.sentences:
            _say(sentence)
        if intended.refusal and not options.force:
            raise ReleaseRefused(f"not released: {intended.refusal}; delete its pod, or pass --force")
        if intended.refusal:
            _say(paint(f"Forced, although {intended.refusal}.", "silent", on=wants_colour(sys.stdout)))
        if options.dry_run:
            _say("Dry run: nothing was written.")
            return Exit.DONE
        if not options.yes and not await _confirmed(facts):
            raise ReleaseRefused("not released: not confirmed")
        await carry_out(store, facts.known, SystemClock().now())
        _say(f"Released. {facts.device} is available to the first pod that requests it.")
    return Exit.DONE


async def _confirmed(facts: DeviceFacts) -> bool:
    if not sys.stdin.isatty():
        raise ReleaseRefused("not released: stdin is not a terminal, cannot ask for confirmation; pass --yes")
    question = f"Take {facts.device} from node {facts.holder}? [y/N] "
    # to stderr, as kubectl does: standard output is for programs
    print(question, end="", file=sys.stderr, flush=True)  # noqa: T201
    answer = await asyncio.to_thread(sys.stdin.readline)
    return answer.strip().lower() in ("y", "yes")


@contextlib.asynccontextmanager
async def _facts(options: argparse.Namespace) -> AsyncIterator[tuple[DeviceFacts, LeaseStore]]:
    clock = SystemClock()
    namespace = namespace_of(options.namespace)
    kube = await connect(options.kubeconfig)
    try:
        store = KubernetesLeases(kube, namespace)
        config, source = await find_config(options, kube, namespace)
        with contextlib.closing(TcpUsbipClient(clock)) as client:
            domain = domain_of(options.domain, config)
            lookup = DeviceLookup(store, kube, client, clock, namespace, domain, config, source)
            yield await lookup.about(options.device), store
    finally:
        await kube.close()


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the command line's own voice
