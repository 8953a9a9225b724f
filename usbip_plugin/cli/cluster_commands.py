"""The commands about one device or the Leases: explain, release, prune."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import sys

from usbip_plugin.cli.explain import explain as explanation_of
from usbip_plugin.cli.explain import render
from usbip_plugin.cli.lookup import DEVLIST_TIMEOUT_S, find_config, mapping
from usbip_plugin.cli.pages import withheld_interfaces
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.prune import prune as remove
from usbip_plugin.cli.prune import removable, summary
from usbip_plugin.cli.release import impact, refusal
from usbip_plugin.cli.release import release as carry_out
from usbip_plugin.cli.sources import connected, one_device
from usbip_plugin.cli.spinner import spinner
from usbip_plugin.cli.tables import paint, structured, wants_colour
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.errors import PluginError, PruneRefused, ReleaseRefused, UsbipError
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.locked_devices import LockedDevice, known_devices
from usbip_plugin.locks.record import SESSION_LABELS
from usbip_plugin.model import ServerKey
from usbip_plugin.usbip.client import TcpUsbipClient


async def read_devices(options: argparse.Namespace) -> tuple[LockedDevice, ...]:
    """Returns every device that has a lock. Raises KubeError, or ConfigError if the kubeconfig cannot be used."""
    async with connected(options) as (kube, namespace):
        return await known_devices(KubernetesLeases(kube, namespace))


async def explain(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin explain DEVICE`."""
    async with one_device(options) as (kube, namespace, details):
        withheld = await withheld_interfaces(kube, namespace, details)
    found = explanation_of(dataclasses.replace(details, withheld=withheld))
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
    async with one_device(options) as (kube, namespace, details):
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
        question = f"Take {details.device} from node {details.holder}?"
        if not options.yes and not await _confirmed(question, ReleaseRefused, "not released"):
            raise ReleaseRefused("not released: not confirmed")
        await carry_out(KubernetesLeases(kube, namespace), details.known, SystemClock().now())
        _say(f"Released. {details.device} is available to the first pod that requests it.")
    return Exit.DONE


async def prune(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin prune`. Raises PruneRefused if it is not confirmed."""
    clock = SystemClock()
    async with connected(options) as (kube, namespace):
        store = KubernetesLeases(kube, namespace)
        config, source = await find_config(options, kube, namespace)
        if config is None:
            _say(f"{source}; locks without a holder stay.")
        listed = await _listed(config.servers() if config is not None else frozenset(), clock)
        async with spinner("reading Leases and nodes"):
            known, sessions = await known_devices(store), (await store.list(SESSION_LABELS)).items
            found = removable(known, sessions, await _node_names(kube), config, listed, clock.now())
        if not found:
            _say(f"None of {len(known)} locks and {len(sessions)} sessions is of a node or device that is gone.")
            return Exit.DONE
        _say("\n".join(summary(found)))
        if options.dry_run:
            _say("Dry run: nothing was removed.")
            return Exit.DONE
        if not options.yes and not await _confirmed(f"Remove {len(found)} Leases?", PruneRefused, "not removed"):
            raise PruneRefused("not removed: not confirmed")
        removed = await remove(store, found)
        changed = f"; {len(found) - removed} have changed meanwhile and stay" if removed < len(found) else ""
        _say(f"Removed {removed} Leases{changed}.")
    return Exit.DONE


async def _listed(servers: frozenset[ServerKey], clock: Clock) -> dict[ServerKey, frozenset[str]]:
    """Returns the bus IDs that each server lists. Servers without an answer are left out, and said."""
    found: dict[ServerKey, frozenset[str]] = {}

    async def ask(server: ServerKey, client: TcpUsbipClient) -> None:
        try:
            answer = await client.devlist(server, timeout=DEVLIST_TIMEOUT_S)
        except UsbipError as error:
            _say(f"{error}; locks of its devices stay.")
        else:
            found[server] = frozenset(device.busid for device in answer.devices)

    with contextlib.closing(TcpUsbipClient(clock)) as client:
        async with asyncio.TaskGroup() as tasks:
            for server in sorted(servers):
                tasks.create_task(ask(server, client))
    return found


async def _node_names(kube: KubeClient) -> frozenset[str]:
    """Returns the names of all nodes of the cluster. Raises KubeError."""
    names: set[str] = set()
    async with contextlib.aclosing(kube.pages("/api/v1/nodes", resource="nodes")) as pages:
        async for page in pages:
            names |= {str(mapping(mapping(node).get("metadata")).get("name")) for node in page["items"]}
    return frozenset(names)


async def _confirmed(question: str, refused: type[PluginError], not_done: str) -> bool:
    """Asks for confirmation. Raises the error if nobody can be asked."""
    if not sys.stdin.isatty():
        raise refused(f"{not_done}: stdin is not a terminal, cannot ask for confirmation; pass --yes")
    # to stderr, as kubectl does: standard output is for programs
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201
    answer = await asyncio.to_thread(sys.stdin.readline)
    return answer.strip().lower() in ("y", "yes")


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the command line's own voice
