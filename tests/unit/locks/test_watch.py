"""The cache of all locks: it ends with the stored records for any order of own calls, events, lists and restores."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rigs.vocabulary import KEY
from usbip_plugin.locks.record import LOCK_LABELS, ChangeType, Lease, LeaseChange, LeaseList
from usbip_plugin.locks.watch import LockCache, LockChange, OwnCall
from usbip_sim.leases import MemoryBackend

ID = KEY.id
BUMP = 1_000_000_000


def lease(version: int, holder: str = "a") -> Lease:
    return Lease(ID, holder=holder, labels=LOCK_LABELS, resource_version=str(version))


def event(version: int, holder: str = "a", kind: ChangeType = ChangeType.MODIFIED) -> LeaseChange:
    return LeaseChange(kind, str(version), lease(version, holder))


def view() -> tuple[LockCache, list[LockChange]]:
    changes: list[LockChange] = []
    return LockCache(changes.append), changes


def listed(of: LockCache, version: int, *leases: Lease) -> None:
    keep = of.begin_list()
    of.reset(LeaseList(tuple(filter(keep, leases)), str(version)))


def answer(of: LockCache, found: Lease | None) -> bool:
    with of.call(ID) as call:
        return of.answered(call, found)


def holder(of: LockCache) -> str | None:
    return of.locks[ID].holder if ID in of.locks else None


def test_an_event_from_before_an_own_write_does_not_roll_it_back() -> None:
    v, changes = view()
    listed(v, 4, lease(4))
    answer(v, lease(9, "me"))
    v.apply(event(5, "other"))
    v.apply(event(9, "me"))
    assert holder(v) == "me"
    assert [change.holder for change in changes] == ["a", "me"]
    v.apply(event(10, "other"))
    assert holder(v) == "other"


def test_a_late_answer_does_not_restore_an_older_record_or_a_deleted_lock() -> None:
    v, _ = view()
    listed(v, 5, lease(5))
    with v.call(ID) as call:
        v.apply(event(7, "b"))
        v.apply(event(8, "b", kind=ChangeType.DELETED))
        assert v.answered(call, lease(7, "b"))
    assert ID not in v.locks
    answer(v, lease(9))
    assert holder(v) == "a"


def test_a_read_that_finds_no_lease_removes_the_lock_until_it_is_created_again() -> None:
    v, _ = view()
    listed(v, 5, lease(5))
    answer(v, None)
    v.apply(event(6, "b"))
    assert ID not in v.locks, "an event from before the deletion"
    v.apply(event(7, kind=ChangeType.DELETED))
    v.apply(event(8, "c"))
    assert holder(v) == "c"


def test_an_event_that_is_delivered_again_changes_nothing() -> None:
    v, changes = view()
    for version, who in ((5, "a"), (6, "b"), (5, "a"), (6, "b")):
        v.apply(event(version, who))
    assert [change.holder for change in changes] == ["a", "b"]


def test_a_list_is_the_truth_for_all_that_was_known_before_its_request() -> None:
    for version in (3, 900, BUMP):
        v, changes = view()
        listed(v, 5, lease(5))
        answer(v, lease(6, "me"))
        listed(v, version, lease(3, "b"))
        assert holder(v) == "b", "restored, whatever the version of the list"
        listed(v, version)
        assert ID not in v.locks
        assert [change.holder for change in changes] == ["a", "me", "b", ""]


def test_an_answer_that_comes_during_a_list_is_kept_and_doubted_until_a_read() -> None:
    for found, then in ((lease(9, "me"), "me"), (lease(10, "b"), "b"), (None, None)):
        v, _ = view()
        listed(v, 5, lease(5))
        v.begin_list()
        answer(v, lease(9, "me"))
        v.reset(LeaseList((lease(10, "b"),), "12"))
        assert (holder(v), v.doubtful) == ("me", {ID})
        assert answer(v, found)
        assert (holder(v), v.doubtful) == (then, set())


def test_a_lock_that_is_created_during_a_list_is_not_lost_by_the_list() -> None:
    v, changes = view()
    listed(v, 5)
    v.begin_list()
    answer(v, lease(9, "me"))
    v.reset(LeaseList((), "8"))
    assert (holder(v), v.doubtful) == ("me", {ID})
    v.apply(event(9, "me", ChangeType.ADDED))
    assert (holder(v), v.doubtful) == ("me", set())
    assert len(changes) == 1


def test_a_call_that_a_list_overtook_must_be_made_again() -> None:
    v, _ = view()
    listed(v, 5, lease(5))
    with v.call(ID) as call:
        listed(v, 3, lease(3, "b"))
        assert not v.answered(call, lease(5))
        assert v.answered(call, lease(3, "b"))
    assert holder(v) == "b"


def test_a_lease_that_loses_the_label_of_a_lock_is_gone_until_it_has_it_again() -> None:
    v, _ = view()
    listed(v, 5, lease(5))
    answer(v, replace(lease(6, "b"), labels={}))
    assert holder(v) == "b"
    v.apply(event(6, kind=ChangeType.DELETED))  # as a watch by label says it
    assert ID not in v.locks
    answer(v, replace(lease(6, "b"), labels={}))
    assert holder(v) == "b"
    v.apply(event(7, "c"))
    assert holder(v) == "c"


def test_leases_that_are_not_locks_are_ignored() -> None:
    v, changes = view()
    v.apply(LeaseChange(ChangeType.ADDED, "5", replace(lease(5), name="usbip-node-a")))
    listed(v, 7, replace(lease(5), name="../x"))
    assert not v.locks
    assert not changes


class Node:
    """A cache with its watch, one own call and one list at a time, each of which takes effect at any moment."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend, (self.cache, self.changes) = backend, view()
        self._delivered = 0
        self._restores = -1
        self._listing: LeaseList | None = None
        self._listing_begun = False
        self._call = self.cache.call(ID)
        self._open: OwnCall | None = None
        self._found: Lease | None = None
        self._evaluated = False

    def step(self, what: str) -> None:
        match what:
            case "list":
                self._list()
            case "event":
                self._event()
            case _:
                self._own_call(write=what == "own write")

    def _list(self) -> None:
        if not self._listing_begun:
            self.cache.begin_list()
            self._listing_begun, self._listing = True, None
        elif self._listing is None:
            self._listing, self._restores = self.backend.list(LOCK_LABELS), self.backend.restores
        else:
            self.cache.reset(self._listing)
            self._delivered = int(self._listing.resource_version)
            self._listing_begun = False

    def _event(self) -> None:
        if self._listing_begun or self._restores != self.backend.restores:
            return  # no watch is open
        for change in self.backend.since(self._delivered, LOCK_LABELS)[0][:1]:
            self.cache.apply(change)
            self._delivered = int(change.resource_version)

    def _own_call(self, *, write: bool) -> None:
        if self._open is None:
            self._call = self.cache.call(ID)
            self._open, self._evaluated = self._call.__enter__(), False
        elif not self._evaluated:
            current = self.backend.leases.get(ID)
            if write and current is None:
                current = self.backend.create(replace(lease(0), resource_version=""))
            elif write and current is not None:
                current = self.backend.replace(replace(current, transitions=current.transitions + 1))
            self._found, self._evaluated = current, True
        else:
            certain = self.cache.answered(self._open, self._found)
            self._call.__exit__(None, None, None)
            self._open = None
            if not certain:
                self._own_call(write=False)

    def finish(self) -> None:
        """Ends what is under way and, as in a node, reads what is doubtful; then delivers every event."""
        while self._open is not None:
            self._own_call(write=False)
        if self._restores != self.backend.restores and not self._listing_begun:
            self._list()
        while self._listing_begun:
            self._list()
        if self._restores != self.backend.restores:  # the list was from before the restore: the watch from it breaks
            for _ in range(3):
                self._list()
        for _ in range(3 if self.cache.doubtful else 0):
            self._own_call(write=False)
        while self.backend.since(self._delivered, LOCK_LABELS)[0]:
            self._event()


STEPS = ("write", "delete", "backup", "restore", "restore, bumped", "list", *["event"] * 3, *["read"] * 2, "own write")


@settings(deadline=None, max_examples=500)  # machines may be busy
@given(st.lists(st.sampled_from(STEPS), max_size=40))
def test_any_interleaving_ends_with_the_stored_lease(steps: list[str]) -> None:
    """The watch delivers all changes in order, and breaks at a restore. Own calls and lists take effect in between."""
    backend = MemoryBackend()
    node, backup = Node(backend), backend.backup()
    for step in ("list", "list", "list", *steps):
        current = backend.leases.get(ID)
        match step:
            case "write" if current is None:
                backend.create(replace(lease(0), resource_version=""))
            case "write":
                assert current is not None
                backend.replace(replace(current, transitions=current.transitions + 1))
            case "delete" if current is not None:
                backend.delete(ID, current.resource_version)
            case "delete":
                pass
            case "backup":
                backup = backend.backup()
            case "restore" | "restore, bumped":
                backend.restore(backup, BUMP if step != "restore" else 0)
            case _:
                node.step(step)
    node.finish()
    assert node.cache.lease(ID) == backend.leases.get(ID)
    assert not node.cache.doubtful
    assert not node.cache._ahead
    assert [change.old for change in node.changes[1:]] == [change.new for change in node.changes[:-1]]
