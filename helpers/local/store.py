"""What the local cloud knows: resources as protobuf messages in one SQLite file, whole after a crash at any moment."""

from __future__ import annotations  # inside the class, `list` is a method

import contextlib
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from helpers.local import errors

SCHEMA = """
CREATE TABLE IF NOT EXISTS resources (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of creation
    name TEXT UNIQUE NOT NULL,
    parent TEXT NOT NULL,
    collection TEXT NOT NULL,
    type TEXT NOT NULL,                        -- the full name of the protobuf message
    data BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS children ON resources (collection, parent);
"""


def new_id() -> str:
    """Return an identifier as Google Cloud makes them: 19 digits."""
    return str(10**18 + secrets.randbelow(9 * 10**18))


class Store:
    """Resources by name, in one file. Reading gives a copy; what is written is on disk when a call returns.

    All threads of the server share one connection: a write takes some tens of microseconds, and holding the lock for a
    transaction makes reading and changing one step.
    """

    def __init__(self, path: Path):
        """Open the file, or make it, with nobody's rights but the owner's."""
        path.touch(mode=0o600)
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        # The log survives a killed process; only a power cut could lose the last moments, and never the file.
        self._connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {SCHEMA}")
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._depth = 0

    def sql(self, statement: str, *values) -> list[tuple]:
        """Execute one statement and return its rows: for what a service keeps beside resources."""
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all that happens inside one step: it is written whole at the end, or not at all after an exception."""
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._connection.execute("BEGIN IMMEDIATE")
                yield
                if self._depth == 1:
                    self._connection.execute("COMMIT")
                    self._changed.notify_all()
            except BaseException:
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def find(self, name: str) -> Message | None:
        """Return the resource of this name, or None."""
        rows = self.sql("SELECT type, data FROM resources WHERE name = ?", name)
        return _message(*rows[0]) if rows else None

    def get(self, name: str) -> Message:
        """Return the resource of this name; Refused with NOT_FOUND if there is none."""
        found = self.find(name)
        if found is None:
            raise errors.not_found(name)
        return found

    def put(self, name: str, message: Message) -> None:
        """Write a resource, new or changed."""
        parent, collection, _ = ("/" + name).rsplit("/", 2)
        with self.transaction():
            self.sql(
                "INSERT INTO resources (name, parent, collection, type, data) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET data = excluded.data",
                *(name, parent[1:], collection, message.DESCRIPTOR.full_name, message.SerializeToString()),
            )

    @contextlib.contextmanager
    def change(self, name: str) -> Iterator[Message]:
        """Give the resource of this name to be changed in place, alone, and write it at the end."""
        with self.transaction():
            message = self.get(name)
            yield message
            self.put(name, message)

    def list(self, parent: str, collection: str) -> list[Message]:
        """Return the resources of a collection in the order of their creation; `-` in the parent stands for any."""
        if "/-" in parent:
            pattern = re.compile(re.escape(parent).replace(r"/\-", "/[^/]+"))
            rows = self.sql("SELECT parent, type, data FROM resources WHERE collection = ? ORDER BY number", collection)
            return [_message(*row) for at, *row in rows if pattern.fullmatch(at)]
        rows = self.sql(
            "SELECT type, data FROM resources WHERE collection = ? AND parent = ? ORDER BY number", collection, parent
        )
        return [_message(*row) for row in rows]

    def all(self, collection: str) -> list[Message]:
        """Return all resources of a collection, whatever their parents."""
        rows = self.sql("SELECT type, data FROM resources WHERE collection = ? ORDER BY number", collection)
        return [_message(*row) for row in rows]

    def delete(self, name: str) -> None:
        """Remove a resource and all below it."""
        with self.transaction():
            self.get(name)
            # `0` follows `/`: from NAME/ up to NAME0 are exactly the names below.
            self.sql("DELETE FROM resources WHERE name = ? OR (name > ? AND name < ?)", name, name + "/", name + "0")

    def wait(self, name: str, is_awaited, seconds: float) -> Message:
        """Return the resource as soon as `is_awaited(resource)`, and in any case after some seconds."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                message = self.get(name)
                remaining = deadline - time.monotonic()
                if remaining <= 0 or is_awaited(message):
                    return message
                self._changed.wait(remaining)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()


def _message(type_name: str, data: bytes) -> Message:
    descriptor = descriptor_pool.Default().FindMessageTypeByName(type_name)
    return message_factory.GetMessageClass(descriptor).FromString(data)
