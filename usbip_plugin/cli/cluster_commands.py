"""The commands for the whole cluster: devices, explain, release."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator

from usbip_plugin.cli.devices import paint, rows, show_devices, structured, wants_colour
from usbip_plugin.cli.explain import DeviceDetails, render
from usbip_plugin.cli.explain import explain as explanation_of
from usbip_plugin.cli.lookup import DeviceLookup, find_config
from usbip_plugin.cli.node_commands import namespace_of
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.release import impact, refusal
from usbip_plugin.cli.release import release as carry_out
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import DEFAULT_DOMAIN
from usbip_plugin.errors import ReleaseRefused
from usbip_plugin.kube.client import connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.locked_devices import LockedDevice, known_devices
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
    """Carries out `usbip-plugin devices`."""
    show_devices(rows(await read_devices(options), SystemClock().now()), options.output)
    return Exit.DONE


async def explain(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin explain DEVICE`."""
    async with _details(options) as (details, _store):
        found = explanation_of(details)
    if options.output == "text":
        _say(render(found, colour=wants_colour(sys.stdout)))
    else:
        lists = {"because": list(found.because), "next": list(found.next)}
        _say(structured(dataclasses.asdict(found) | lists, options.output))
    return Exit.DONE if found.available else Exit.PROBLEM


async def release(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin release DEVICE`.

    Raises ReleaseRefused without --force if the device may be attached, if the release is not confirmed, or if the
    lock has changed meanwhile.
    """
    async with _details(options) as (details, store):
        if not details.holder or details.known is None:
            _say(f"{details.device} has no holder; there is nothing to release.")
            return Exit.DONE
        _say("\n".join(impact(details, details.known)))
        refused = refusal(details, details.known)
        if refused and not options.force:
            raise ReleaseRefused(f"not released: {refused}; delete its pod, or pass --force")
        if refused:
            _say(paint(f"Forced, although {refused}.", "silent", on=wants_colour(sys.stdout)))
        if options.dry_run:
            _say("Dry run: nothing was written.")
            return Exit.DONE
        if not options.yes and not await _confirmed(details):
            raise ReleaseRefused("not released: not confirmed")
        await carry_out(store, details.known, SystemClock().now())
        _say(f"Released. {details.device} is available to the first pod that requests it.")
    return Exit.DONE


async def _confirmed(details: DeviceDetails) -> bool:
    if not sys.stdin.isatty():
        raise ReleaseRefused("not released: stdin is not a terminal, cannot ask for confirmation; pass --yes")
    question = f"Take {details.device} from node {details.holder}? [y/N] "
    # to stderr, as kubectl does: standard output is for programs
    print(question, end="", file=sys.stderr, flush=True)  # noqa: T201
    answer = await asyncio.to_thread(sys.stdin.readline)
    return answer.strip().lower() in ("y", "yes")


@contextlib.asynccontextmanager
async def _details(options: argparse.Namespace) -> AsyncIterator[tuple[DeviceDetails, LeaseStore]]:
    clock = SystemClock()
    namespace = namespace_of(options.namespace)
    kube = await connect(options.kubeconfig)
    try:
        store = KubernetesLeases(kube, namespace)
        config, source = await find_config(options, kube, namespace)
        with contextlib.closing(TcpUsbipClient(clock)) as client:
            domain = options.domain or (config.settings.domain if config is not None else None) or DEFAULT_DOMAIN
            lookup = DeviceLookup(store, kube, client, clock, namespace, domain, config, source)
            yield await lookup.about(options.device), store
    finally:
        await kube.close()


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the command line's own voice
