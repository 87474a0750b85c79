"""One server for all tests of online requests and batches."""

from collections.abc import Iterator

import pytest

from tests.getp.serve.running import RunningServer


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("served"), max_queue=200)
    yield running
    assert running.stop() == 0
