"""The gRPC status of a failed Allocate."""

import grpc
import pytest

from tests.rigs.vocabulary import KEY, LAB
from usbip_plugin import errors as e
from usbip_plugin.kubelet.device_plugin import MAX_DETAIL_CHARACTERS, status_code, status_details
from usbip_plugin.model import UsbId

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (e.LockHeld("d", "node-b"), Code.FAILED_PRECONDITION),
        (e.LockLost("d", "node-b"), Code.FAILED_PRECONDITION),
        (e.DeviceBusy(KEY), Code.FAILED_PRECONDITION),
        (e.ClaimBusy("d"), Code.FAILED_PRECONDITION),
        (e.ServerUnreachable(LAB, "refused"), Code.UNAVAILABLE),
        (e.LockUnavailable("d", "API"), Code.UNAVAILABLE),
        (e.KubeUnreachable("get", "leases", "gone"), Code.UNAVAILABLE),
        (e.ServerTimeout(LAB, "import", 3), Code.DEADLINE_EXCEEDED),
        (e.AllocateTimeout("late"), Code.DEADLINE_EXCEEDED),
        (e.AttachStuck("005"), Code.DEADLINE_EXCEEDED),
        (e.UnknownDevice("d"), Code.NOT_FOUND),
        (e.DeviceUnknown(KEY), Code.NOT_FOUND),
        (e.PortsExhausted("hs", 8), Code.RESOURCE_EXHAUSTED),
        (e.WrongDevice(KEY, UsbId(1, 2), UsbId(3, 4)), Code.INTERNAL),
        (e.AttachRefused("EINVAL"), Code.INTERNAL),
        (e.KubeForbidden("update", "leases", "no"), Code.INTERNAL),
        (e.AllocateError("alone"), Code.INTERNAL),
    ],
)
def test_each_error_has_its_status_code(error: e.PluginError, code: grpc.StatusCode) -> None:
    assert status_code(error) is code


def test_an_allocate_error_has_the_status_code_of_its_cause() -> None:
    outer = e.AllocateError("could not")
    outer.__cause__ = e.LockHeld("d", "node-b")
    assert status_code(outer) is Code.FAILED_PRECONDITION


def test_the_details_are_one_line_that_is_cut_at_its_end() -> None:
    assert status_details(e.LockHeld("10.0.0.1:3240/1-1", "node-b")) == "10.0.0.1:3240/1-1 is held by node node-b"
    long = status_details(e.AllocateError("first\nsecond " + "x" * 5000))
    assert long.startswith("first second x")
    assert len(long) == MAX_DETAIL_CHARACTERS
    assert status_details(e.AllocateError("")) == "AllocateError"
