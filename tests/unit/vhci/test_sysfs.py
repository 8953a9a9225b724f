"""The texts of the sysfs files of vhci_hcd, and the choice of a port."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.vhci.sysfs import (
    Port,
    PortStatus,
    choose_port,
    format_attach,
    format_detach,
    hub_of,
    parse_nports,
    parse_status,
    status_files,
)

# Linux 6.12, three serial converters and a SuperSpeed disk; rows shortened to two free ports per hub.
STATUS = """\
hub port sta spd dev      sockfd local_busid
hs  0000 006 002 00010002 000003 4-1
hs  0001 005 000 00000000 000000 0-0
hs  0002 004 000 00000000 000000 0-0
hs  0003 007 000 00000000 000000 0-0
ss  0015 006 005 00020002 000012 5-1
ss  0016 004 000 00000000 000000 0-0
"""


def free(number: int, hub: str = "hs", controller: int = 0) -> Port:
    return Port(number, "ss" if hub == "ss" else "hs", PortStatus.NULL, controller=controller)


class TestStatus:
    def test_each_row_is_a_port(self) -> None:
        ports = parse_status(STATUS, 0)
        assert ports[0] == Port(0, "hs", PortStatus.USED, 2, 0x10002, "4-1", 0, 1, 3)
        assert [port.status for port in ports] == [6, 5, 4, 7, 6, 4]
        assert [port.local_busid for port in ports] == ["4-1", None, None, None, "5-1", None]
        assert ports[4].speed == 5

    def test_root_ports_are_counted_per_hub(self) -> None:
        assert [(port.hub, port.root_port) for port in parse_status(STATUS)] == [
            *(("hs", number) for number in (1, 2, 3, 4)),
            *(("ss", number) for number in (1, 2)),
        ]

    def test_an_occupant_is_identified_by_devid_and_socket(self) -> None:
        ports = parse_status(STATUS)
        assert [port.occupant for port in ports] == [(0x10002, 3), None, None, None, (0x20002, 12), None]

    @pytest.mark.parametrize(
        "row",
        [
            "hs 0 4 0 0 0",  # a column short
            "0000 004 000 00000000 000003 0-0",  # before 4.17: no hub column
            "fs 0000 004 000 00000000 000000 0-0",
            "hs x 004 000 00000000 000000 0-0",
            "hs 0000 003 000 00000000 000000 0-0",  # a status of the server's side
            "hs 0000 004 -01 00000000 000000 0-0",
            "hs 0000 004 000 zzzzzzzz 000000 0-0",
            "hs 0000 004 000 00000000 ffff 0-0",
        ],
    )
    def test_an_invalid_row_is_an_error(self, row: str) -> None:
        with pytest.raises(ValueError, match="vhci status row"):
            parse_status(f"hub port sta spd dev sockfd local_busid\n{row}\n")

    @given(st.text(max_size=400))
    def test_any_text_is_parsed_or_a_value_error(self, text: str) -> None:
        try:
            ports = parse_status(text)
        except ValueError:
            return
        assert all(isinstance(port, Port) for port in ports)

    @given(st.lists(st.sampled_from(STATUS.splitlines()[1:]), max_size=20))
    def test_every_row_is_a_port(self, rows: list[str]) -> None:
        assert len(parse_status("\n".join(rows))) == len(rows)


class TestNumbers:
    @pytest.mark.parametrize(("text", "number"), [("240\n", 240), ("8", 8)])
    def test_the_number_of_ports_is_read(self, text: str, number: int) -> None:
        assert parse_nports(text) == number

    @pytest.mark.parametrize("text", ["", "0\n", "-8\n", "many\n", "5000\n"])
    def test_an_invalid_number_of_ports_is_an_error(self, text: str) -> None:
        with pytest.raises(ValueError, match=r".*"):
            parse_nports(text)

    @pytest.mark.parametrize(
        ("nports", "first", "files"),
        [
            (240, 30, ("status", *(f"status.{n}" for n in range(1, 8)))),
            (16, 16, ("status",)),
            (16, 0, ("status",)),
            (33, 16, ("status", "status.1", "status.2")),
        ],
    )
    def test_the_status_files_follow_from_the_number_of_ports(
        self, nports: int, first: int, files: tuple[str, ...]
    ) -> None:
        assert status_files(nports, first) == files

    def test_attach_and_detach_have_the_format_of_the_kernel(self) -> None:
        assert format_attach(15, 7, 0x20002, 5) == "15 7 131074 5"
        assert format_detach(15) == "15"

    @pytest.mark.parametrize("wrong", [(-1, 3, 1, 3), (0, -2, 1, 3), (0, 3, 1 << 32, 3), (0, 3, 1, 0), (0, 3, 1, 7)])
    def test_numbers_that_the_kernel_would_misread_are_refused(self, wrong: tuple[int, int, int, int]) -> None:
        with pytest.raises(ValueError, match="cannot attach"):
            format_attach(*wrong)
        with pytest.raises(ValueError, match="cannot detach"):
            format_detach(-1)


class TestChoice:
    @pytest.mark.parametrize(("speed", "hub"), [(1, "hs"), (2, "hs"), (3, "hs"), (4, "hs"), (5, "ss"), (6, "ss")])
    def test_the_hub_follows_the_speed(self, speed: int, hub: str) -> None:
        chosen = choose_port([free(0), free(15, "ss")], speed)
        assert chosen is not None
        assert chosen.hub == hub == hub_of(speed)

    def test_the_lowest_free_port_of_all_controllers_is_chosen(self) -> None:
        ports = (*parse_status(STATUS), free(30, controller=1), free(45, "ss", controller=1))
        hs, ss = choose_port(ports, 3), choose_port(ports, 5)
        assert (hs and hs.number, ss and ss.number) == (2, 16)
        taken = tuple(port for port in ports if port.number not in (2, 16))
        hs, ss = choose_port(taken, 3), choose_port(taken, 5)
        assert (hs and hs.number, ss and ss.number) == (30, 45)

    def test_no_port_of_the_other_hub_is_chosen(self) -> None:
        assert choose_port([free(15, "ss")], 3) is None

    def test_a_penalty_moves_a_port_to_the_end_and_no_further(self) -> None:
        ports = [free(0), free(1), free(2)]
        penalties = {0: 2, 1: 1}
        order = []
        while ports:
            chosen = choose_port(ports, 3, lambda port: penalties.get(port.number, 0))
            assert chosen is not None
            order.append(chosen.number)
            ports.remove(chosen)
        assert order == [2, 1, 0]
