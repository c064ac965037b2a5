"""The recorded calls, in the order in which they run.

Not here: digests of what they return (tests/support/record.py).
"""

from collections.abc import Iterator

from tests.support.recorded import calls, family, hosts, pieces, ranks
from tests.support.recorded.case import Call, Custom


def cases() -> Iterator[Call | Custom]:
    for room in (calls, family, pieces, ranks, hosts):
        yield from room.cases()
