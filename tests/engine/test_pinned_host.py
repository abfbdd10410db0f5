"""Claims about where bytes rest in pinned memory that need no device to be seen."""

from __future__ import annotations

from lighterage.engine.arena import Arena
from lighterage.engine.pinned_host import HostTransport


class OnePagePins:
    """Pins nothing; an arena with a pinner splits its blocks where growths meet."""

    def pin(self, address: int, nbytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass


def test_ranges_of_a_block_in_two_registrations_have_no_address_and_others_have_their_own() -> None:
    arena = Arena(pinner=OnePagePins(), budget=1 << 20)
    transport = HostTransport.__new__(HostTransport)
    transport._arena, transport.has_room = arena, lambda: False  # type: ignore[method-assign]
    whole = transport._place([1024, 1024])
    assert [one.address - whole[0].address for one in whole] == [0, 1024]
    assert whole[1].parts[0].data_ptr() == whole[1].address
    torn = transport._place([2048, 2048, 2048])
    assert len(torn[0].shared.block.parts) == 2, "the block was to lie across two registrations"
    assert [one.address for one in torn] == [None] * 3
    assert [sum(part.numel() for part in one.parts) for one in torn] == [2048] * 3
    in_use = arena.bytes_in_use
    del whole[:]
    assert arena.bytes_in_use == in_use - 2048, "a block goes back with the last range in it"
    torn.pop(0)
    assert arena.bytes_in_use == in_use - 2048
    torn.clear()
    assert arena.bytes_in_use == 0
    arena.close()


def test_nothing_stays_for_the_room_there_is_where_it_must_leave() -> None:
    transport = HostTransport.__new__(HostTransport)
    transport.must_leave = True
    assert not transport.has_room()
