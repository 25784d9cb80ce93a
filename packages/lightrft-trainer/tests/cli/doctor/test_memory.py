from __future__ import annotations

from lightrft.cli.doctor.memory import MIB, Memory


def test_a_part_is_never_more_than_the_whole() -> None:
    assert str(Memory(own=50 * MIB, children=2 * MIB)) == "52 MiB per rank"
    assert str(Memory(own=14 * MIB, children=910 * MIB)) == "924 MiB per rank, 910 of it in processes that it started"
    assert str(Memory(own=-14 * MIB, children=910 * MIB)) == "896 MiB per rank, all of it in processes that it started"
