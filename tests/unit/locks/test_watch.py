"""The cache of all locks: it ends with the newest records for any order of own writes and events."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rigs.vocabulary import KEY
from usbip_plugin.locks.record import LOCK_LABELS, ChangeType, Lease, LeaseChange, LeaseList
from usbip_plugin.locks.watch import LockCache, LockChange, newer
from usbip_sim.leases import MemoryBackend

ID = KEY.id


def lease(version: int, holder: str = "a") -> Lease:
    return Lease(ID, holder=holder, labels=LOCK_LABELS, resource_version=str(version))


def event(version: int, holder: str = "a", kind: ChangeType = ChangeType.MODIFIED) -> LeaseChange:
    return LeaseChange(kind, str(version), lease(version, holder))


def view() -> tuple[LockCache, list[LockChange]]:
    changes: list[LockChange] = []
    return LockCache(changes.append), changes


def holder(of: LockCache) -> str | None:
    return of.locks[ID].holder if ID in of.locks else None


def test_versions_compare_as_numbers() -> None:
    assert newer("10", "9")
    assert not newer("9", "10")
    assert not newer("9", "9")
    assert newer("abc", "9")


def test_an_older_event_does_not_roll_back_an_own_write() -> None:
    v, changes = view()
    v.put(lease(9, "me"))
    v.apply(event(5, "other"))
    v.apply(event(9, "me"))
    assert holder(v) == "me"
    assert len(changes) == 1


def test_a_late_answer_does_not_restore_a_deleted_lock() -> None:
    v, _ = view()
    v.apply(event(5))
    v.apply(event(8, kind=ChangeType.DELETED))
    v.put(lease(7))
    assert ID not in v.locks
    v.put(lease(9))
    assert holder(v) == "a"


def test_a_deletion_older_than_the_record_is_ignored() -> None:
    v, _ = view()
    v.put(lease(9))
    v.apply(event(8, kind=ChangeType.DELETED))
    assert holder(v) == "a"


def test_a_list_removes_missing_locks_except_newer_writes() -> None:
    v, changes = view()
    v.put(lease(5))
    v.reset(LeaseList((), "7"))
    assert ID not in v.locks
    v.put(lease(9))
    v.reset(LeaseList((), "8"))
    assert holder(v) == "a"
    assert [change.new is None for change in changes] == [False, True, False]


def test_a_list_does_not_roll_back_an_own_write() -> None:
    v, _ = view()
    v.put(lease(9, "me"))
    v.reset(LeaseList((lease(5, "other"),), "8"))
    assert holder(v) == "me"


def test_a_restored_backup_is_accepted() -> None:
    v, _ = view()
    v.apply(event(900, "a"))
    v.reset(LeaseList((lease(50, "b"),), "60"))
    assert holder(v) == "b"
    v.apply(event(70, "c"))
    assert holder(v) == "c"


def test_leases_that_are_not_locks_are_ignored() -> None:
    v, changes = view()
    v.apply(LeaseChange(ChangeType.ADDED, "5", replace(lease(5), name="usbip-node-a")))
    v.reset(LeaseList((replace(lease(5), name="../x"),), "7"))
    assert not v.locks
    assert not changes


@settings(deadline=None)  # machines may be busy
@given(st.data())
def test_any_interleaving_ends_with_the_stored_lease(data: st.DataObject) -> None:
    """The watch delivers all changes in order. Answers to reads and writes come at any time in between."""
    backend, history = MemoryBackend(), []
    start = backend.version
    for step in data.draw(st.lists(st.sampled_from(["write", "delete"]), max_size=12)):
        current = backend.leases.get(ID)
        if current is None:
            history.append(backend.create(replace(lease(0), resource_version="")))
        elif step == "delete":
            backend.delete(ID, current.resource_version)
        else:
            history.append(backend.replace(replace(current, transitions=current.transitions + 1)))
    v, changes = view()
    v.reset(LeaseList((), start))
    for change in backend.since(int(start), LOCK_LABELS)[0]:
        for answer in data.draw(st.lists(st.sampled_from(history), max_size=2)) if history else ():
            v.put(answer)
        v.apply(change)
    final = backend.leases.get(ID)
    assert v.lease(ID) == final
    assert [change.old for change in changes[1:]] == [change.new for change in changes[:-1]]
