"""The processes of these tests."""

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Pool, pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Processes that run a function together."""
    with pool() as processes:
        yield processes
