"""Plugins of two versions on one node and in one cluster: port records, CDI specs and the annotations of locks.

The older readers and writers are copies of what version 1 does with these formats, and stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from tests.rigs.vocabulary import KEY
from usbip_plugin.attach.cdi import FORMAT_VERSION, HandedOut, kind, read_spec, spec
from usbip_plugin.attach.containers import Injected
from usbip_plugin.locks import record
from usbip_plugin.locks.protocol import Create, LockMeta, Replace, Write, decide_acquire, decide_amend, decide_release
from usbip_plugin.locks.record import Lease, lock_of
from usbip_plugin.model import DeviceKey, Endpoint, NodeIdentity, ServerKey
from usbip_plugin.vhci.records import Record, format_record, parse_record

HERE = Endpoint("10.0.0.5", 40123)
DOMAIN = "usbip.dev"


class TestPortRecord:
    OLD = "10.20.30.40 3240 1-1.4\n65538 4711\n"
    DEVICE = DeviceKey(ServerKey("10.20.30.40"), "1-1.4")

    @staticmethod
    def read_by_version_1(text: str) -> tuple[str, tuple[int, int] | None] | None:
        """Returns the device and its occupant (devid, sockfd)."""
        first, _, second = text.partition("\n")
        fields = first.split()
        if len(fields) != 3 or len(text) > 1200:
            return None
        found = re.fullmatch(r"([0-9]{1,10}) ([0-9]{1,10})\n?", second)
        return f"{fields[0]}:{fields[1]}/{fields[2]}", (int(found[1]), int(found[2])) if found is not None else None

    def test_a_record_of_version_1_is_read_without_the_source(self) -> None:
        assert self.read_by_version_1(self.OLD) == (str(self.DEVICE), (65538, 4711))
        assert parse_record(self.OLD) == Record(self.DEVICE, (65538, 4711))

    def test_version_1_reads_the_device_of_a_record_and_no_occupant(self) -> None:
        text = format_record(Record(self.DEVICE, (65538, 4711), HERE))
        assert self.read_by_version_1(text) == (str(self.DEVICE), None)

    def test_a_later_version_may_add_words_and_lines(self) -> None:
        text = self.OLD + f"version=3 colour=red import-from={HERE} bare\nand more\n"
        assert parse_record(text) == Record(self.DEVICE, (65538, 4711), HERE)


class TestCdiSpec:
    ID = "usbip-" + "a" * 20

    def read_by_version_1(self, text: str) -> HandedOut | None:
        document = json.loads(text)
        resource = document["annotations"][f"{DOMAIN}/resource"]
        names = [re.fullmatch(re.escape(self.ID) + "-([0-9]+)", device["name"]) for device in document["devices"]]
        known = document.get("kind") == kind(DOMAIN, resource)
        return HandedOut(resource, tuple(sorted(int(name[1]) for name in names if name is not None))) if known else None

    def test_version_1_reads_a_spec(self) -> None:
        text = spec(DOMAIN, "storage", self.ID, {0: Injected((), {}), 2: Injected((), {})})
        assert json.loads(text)["annotations"][f"{DOMAIN}/format"] == FORMAT_VERSION
        assert self.read_by_version_1(text) == HandedOut("storage", (0, 2))

    def test_specs_without_a_version_and_of_a_later_one_are_read(self) -> None:
        document = json.loads(spec(DOMAIN, "storage", self.ID, {0: Injected((), {})}))
        del document["annotations"][f"{DOMAIN}/format"]
        assert read_spec(DOMAIN, self.ID, json.dumps(document)) == HandedOut("storage", (0,))
        document["annotations"] |= {f"{DOMAIN}/format": "3", f"{DOMAIN}/colour": "red"}
        assert read_spec(DOMAIN, self.ID, json.dumps(document | {"more": 1})) == HandedOut("storage", (0,))


class TestLock:
    ME, OTHER = NodeIdentity("node-a", "boot-1"), NodeIdentity("node-b", "boot-9")
    WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    KEYS_OF_VERSION_1 = frozenset(
        f"{DOMAIN}/{name}"
        for name in (
            *("lease", "server", "busid", "usb-id", "serial", "interfaces", "read-from", "boot-id", "vhci-port"),
            *("pod", "traceparent", "in-place-of", "failed-epoch", "write-id"),
        )
    )

    def acquired(self, lease: Lease | None = None, me: NodeIdentity = ME, source: Endpoint | None = HERE) -> Lease:
        meta = LockMeta(usb_id="0951:1666", import_from=source)
        decision = decide_acquire(lease, KEY, meta, Write(me, self.WHEN, "w", 40.0), None, importable=False)
        assert isinstance(decision, Create | Replace)
        return decision.lease

    @staticmethod
    def merged(lease: Lease, changes: Mapping[str, str | None]) -> dict[str, str]:
        notes = {**lease.annotations, **changes}
        return {name: value for name, value in notes.items() if value is not None}

    def released_by_version_1(self, lease: Lease) -> Lease:
        gone = dict.fromkeys((record.BOOT_ID, record.PORT, record.POD, record.IN_PLACE_OF))
        return replace(lease, holder="", annotations=self.merged(lease, {**gone, record.WRITE_ID: "old"}))

    def taken_by_version_1(self, lease: Lease, me: NodeIdentity) -> Lease:
        changes = {record.BOOT_ID: me.boot_id, record.PORT: None, record.POD: None, record.WRITE_ID: "old"}
        notes = self.merged(lease, changes)
        return replace(lease, holder=me.node, transitions=lease.transitions + 1, annotations=notes)

    def amended(self, lease: Lease, me: NodeIdentity, changes: Mapping[str, str | None]) -> Lease:
        decision = decide_amend(lease, Write(me, self.WHEN, "w", 40.0), changes)
        assert isinstance(decision, Replace)
        return decision.lease

    def test_the_source_is_on_the_lock_and_stays_after_a_release(self) -> None:
        held = self.acquired()
        assert held.annotations[record.FORMAT] == "2/1"
        assert lock_of(held).import_from == HERE
        decision = decide_release(held, Write(self.ME, self.WHEN, "w", 40.0), False)
        assert isinstance(decision, Replace)
        assert lock_of(decision.lease).import_from == HERE
        assert lock_of(self.released_by_version_1(held)).import_from == HERE

    def test_a_renewal_replaces_the_source_or_leaves_it(self) -> None:
        other = Endpoint("fd00::5", 7)
        held = self.amended(self.acquired(), self.ME, {record.IMPORT_FROM: str(other)})
        assert lock_of(held).import_from == other
        assert lock_of(self.amended(held, self.ME, {record.PORT: "3"})).import_from == other
        assert lock_of(self.acquired(held, source=None)).import_from == other, "the same holder writes once more"

    def test_the_next_holder_replaces_the_source_or_removes_it(self) -> None:
        free = self.released_by_version_1(self.acquired())
        other = Endpoint("10.0.0.6", 40123)
        assert lock_of(self.acquired(free, self.OTHER, other)).import_from == other
        assert record.IMPORT_FROM not in self.acquired(free, self.OTHER, None).annotations

    def test_a_source_that_version_1_has_left_on_its_own_lock_does_not_count(self) -> None:
        taken = self.taken_by_version_1(self.released_by_version_1(self.acquired()), self.OTHER)
        assert taken.annotations[record.IMPORT_FROM] == str(HERE)
        assert lock_of(taken).import_from is None
        assert lock_of(self.released_by_version_1(taken)).import_from is None

    def test_an_upgraded_plugin_does_not_revive_the_source_of_another_holder(self) -> None:
        taken = self.taken_by_version_1(self.released_by_version_1(self.acquired()), self.OTHER)
        written = self.amended(taken, self.OTHER, {record.PORT: "3"})
        assert record.IMPORT_FROM not in written.annotations
        assert written.annotations[record.FORMAT] == f"2/{written.transitions}"

    def test_a_lock_of_version_1_is_read(self) -> None:
        held = self.acquired()
        old = {name: value for name, value in held.annotations.items() if name in self.KEYS_OF_VERSION_1}
        lock = lock_of(replace(held, annotations=old))
        assert (lock.holder, lock.key, lock.boot_id, lock.import_from) == ("node-a", KEY, "boot-1", None)

    def test_a_lock_of_a_later_version_is_read_and_keeps_what_is_unknown(self) -> None:
        held = self.acquired()
        later = replace(held, annotations={**held.annotations, record.FORMAT: "3/1", f"{DOMAIN}/colour": "red"})
        assert lock_of(later).import_from == HERE
        assert self.amended(later, self.ME, {record.PORT: "3"}).annotations[f"{DOMAIN}/colour"] == "red"

    def test_a_damaged_format_or_source_counts_as_absent(self) -> None:
        held = self.acquired()
        for name, text in ((record.FORMAT, "2"), (record.FORMAT, "x/1"), (record.IMPORT_FROM, "lab:1")):
            assert lock_of(replace(held, annotations={**held.annotations, name: text})).import_from is None
