"""What tests of the cloud share: a local cloud of their own, with nothing in it, for each process that runs tests."""

import os

import pytest

from helpers import environment


@pytest.fixture(scope="session")
def cloud(tmp_path_factory):
    """Lead this process to a fresh local cloud; gone at the end, with all that it ran."""
    from helpers.local import client

    before = os.environ.get("LOCAL_CLOUD_FOLDER")
    os.environ["LOCAL_CLOUD_FOLDER"] = str(tmp_path_factory.mktemp("cloud") / "folder")
    try:
        yield environment.connect()
    finally:
        environment.disconnect()
        client.reset(client.folder())
        os.environ.pop("LOCAL_CLOUD_FOLDER")
        if before is not None:
            os.environ["LOCAL_CLOUD_FOLDER"] = before
