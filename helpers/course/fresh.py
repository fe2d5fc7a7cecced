"""A plugin of pytest: all lessons that a run of the tests executes share a local cloud that is theirs alone."""

import contextlib

from helpers.environment import fresh_local_cloud

STACK = contextlib.ExitStack()


def pytest_configure(config):
    """Make the cloud before anything runs; the processes that run tests inherit where it is."""
    if not hasattr(config, "workerinput"):
        STACK.enter_context(fresh_local_cloud())


def pytest_unconfigure(config):
    """Remove it."""
    STACK.close()
