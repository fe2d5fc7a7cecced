"""Buckets as plain folders: an object is a file, and a row in SQLite holds what a file cannot.

The object `a/b` of a bucket is the file `BUCKET/a/b`, so a job that sees the folder as /gcs reads and writes the same
objects, and what it writes is an object at once. An object's generation is its file's time of modification in
microseconds. A row describes the file of one time and size only, so it never outlives a file that was overwritten.

Some names have no such file: `a//b`, `a/..`, what is too long for the file system, `a` beside `a/b`, and every `a/`.
Their files lie in the folder `aside`, each named by a hash. If `a/` marks a folder, that folder is made too, and the
mark goes when the folder does.
"""

import base64
import contextlib
import errno
import hashlib
import heapq
import json
import mimetypes
import os
import re
import shutil
import sqlite3
import stat
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import google_crc32c

BLOCK = 2**20  # bytes that are read or written at a time
CLOCK_NANOSECONDS = 20_000_000  # within these, two changes of a file may bear the same time
UPLOAD_SECONDS = 7 * 24 * 3600  # how long an upload in several requests may take, as in Google's

SCHEMA = """
CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY, known TEXT);
CREATE TABLE IF NOT EXISTS objects (
    bucket TEXT, name TEXT, modified INTEGER, size INTEGER, metageneration INTEGER, updated INTEGER,
    crc32c TEXT, md5 TEXT, resource TEXT, PRIMARY KEY (bucket, name, modified)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aside (bucket TEXT, name TEXT, is_mark INTEGER, PRIMARY KEY (bucket, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uploads (id TEXT PRIMARY KEY, bucket TEXT, begun REAL, request TEXT);
"""

# What a file system says of a name that it cannot hold, or cannot hold beside those that it holds.
NO_PLACE = (
    *(errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR),
    errno.ENOTEMPTY,
)


class StorageError(Exception):
    """A refusal as Cloud Storage words it: an HTTP status, a reason, a message, and headers where it has some."""

    def __init__(self, status: int, reason: str, message: str, headers: dict | None = None):
        """Keep what the client is told."""
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, headers


class NoSuchBucket(StorageError):  # noqa: N818 - it is an answer, not an accident
    """A bucket that is not here."""

    def __init__(self):
        """Say so."""
        super().__init__(404, "notFound", "The specified bucket does not exist.")


def no_such_object(bucket: str, name: str) -> StorageError:
    """Return the error for an object that is not there."""
    return StorageError(404, "notFound", f"No such object: {bucket}/{name}")


@dataclass(frozen=True)
class Object:
    """What is known of an object; `modified` is in nanoseconds and `updated` in microseconds since 1970."""

    bucket: str
    name: str
    modified: int
    size: int
    metageneration: int = 1
    updated: int = 0
    crc32c: str | None = None
    md5: str | None = None
    resource: dict = field(default_factory=dict)  # the fields of the JSON API that clients set

    @property
    def generation(self) -> int:
        """The number of this version."""
        return self.modified // 1000


Check = Callable[[Object | None], None]  # raises if the object, or that there is none, forbids what is to be done


class Draft:
    """A file that is not an object yet, with the checksums of what was written to it; leaving it removes it."""

    def __init__(self, path: Path):
        """Know of nothing written yet."""
        self.path, self.size = path, 0
        self._crc32c, self._md5 = google_crc32c.Checksum(), hashlib.md5(usedforsecurity=False)

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_):
        self.path.unlink(missing_ok=True)

    def _count(self, data: bytes) -> None:
        self.size += len(data)
        self._crc32c.update(data)
        self._md5.update(data)

    def catch_up(self) -> None:
        """Count what an earlier process wrote; raise FileNotFoundError when this is an object already."""
        with self.path.open("rb") as file:
            file.seek(self.size)
            while data := file.read(BLOCK):
                self._count(data)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        with self.path.open("ab") as file:
            file.write(data)
        self._count(data)

    def append(self, file: BinaryIO) -> None:
        """Append what is in an open file."""
        while data := file.read(BLOCK):
            self.write(data)

    def checksums(self) -> dict[str, str]:
        """Return both checksums in base64, as clients write them."""
        return {"crc32c": _base64(self._crc32c), "md5": _base64(self._md5)}


def _base64(checksum) -> str:
    return base64.b64encode(checksum.digest()).decode()


def fault_in(name: str) -> str | None:
    """Say why an object cannot have this name, or return None."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "Object names must be valid UTF-8."
    if length > 1024:
        start = f"'{name[:75]}...'"
        return f"The maximum object length is 1024 characters, but got a name with {length} characters: {start}"
    if "\n" in name or "\r" in name:
        return f"Disallowed unicode characters present in object name {name!r}"
    if name in ("", ".", "..") or name.startswith(".well-known/acme-challenge/"):
        return f"Invalid object name: '{name}'"
    return None


def is_bucket_name(name: str) -> bool:
    """Say whether a bucket can have this name."""
    parts = name.split(".")
    return bool(re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", name)) and all(0 < len(part) < 64 for part in parts)


class Buckets:
    """The buckets in a folder, for several threads of one process."""

    def __init__(self, root: Path, store_path: Path):
        """Open the folder `root`, and what lies beside it: the rows in `store_path`, `aside`, and `uploads`.

        All are made if needed, on one file system. What a killed process left behind is cleared away.
        """
        self.root = root.resolve()
        self.aside, self.uploads = (store_path.resolve().with_name(name) for name in ("aside", "uploads"))
        for folder in (self.root, self.aside, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        # One writer at a time: checking a precondition and writing are one step.
        self.lock = threading.RLock()
        self._db = sqlite3.connect(store_path, check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._db.close)
        self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {SCHEMA}")
        self._sql("DELETE FROM uploads WHERE begun < ?", time.time() - UPLOAD_SECONDS)
        under_way = {row[0] for row in self._sql("SELECT id FROM uploads")}
        for path in self.uploads.iterdir():
            if path.name not in under_way:
                path.unlink()

    def _sql(self, statement: str, *values) -> list[tuple]:
        with self.lock:
            return self._db.execute(statement, values).fetchall()

    def _tidy(self, statement: str, *values) -> None:
        """Remove rows that describe nothing any more; they may stay if a full disk has no room for the change."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._sql(statement, *values)

    # Buckets

    def folder(self, bucket: str) -> Path:
        """Return the folder of a bucket; raise NoSuchBucket."""
        path = self.root / bucket
        if not is_bucket_name(bucket) or path.is_symlink() or not path.is_dir():
            raise NoSuchBucket
        return path

    def buckets(self) -> list[str]:
        """Return the names of all buckets in order; a folder that was made by hand is one too."""
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if is_bucket_name(e.name) and e.is_dir(follow_symlinks=False))

    def bucket(self, bucket: str) -> dict:
        """Return what is known of a bucket: `resource` holds the fields of the JSON API that clients set."""
        created = self.folder(bucket).stat().st_mtime_ns // 1000
        known = {"location": "US", "resource": {}, "policy": {}, "metageneration": 1}
        known |= {"created": created, "updated": created}
        rows = self._sql("SELECT known FROM buckets WHERE name = ?", bucket)
        return known | json.loads(rows[0][0]) if rows else known

    def create(self, bucket: str, location: str, resource: dict) -> None:
        """Make a bucket."""
        if not is_bucket_name(bucket):
            rules = "3 to 63 lower-case letters, digits, dashes, underscores and dots, a letter or digit first and last"
            raise StorageError(400, "invalid", f"Invalid bucket name: '{bucket}'. Expected {rules}.")
        with self.lock:
            if os.path.lexists(self.root / bucket):
                message = "Your previous request to create the named bucket succeeded and you already own it."
                raise StorageError(409, "conflict", message)
            self._forget(bucket)
            now = time.time_ns() // 1000
            known = {"location": location, "resource": resource, "metageneration": 0, "created": now}
            self.change_bucket(bucket, known)
            (self.root / bucket).mkdir()

    def change_bucket(self, bucket: str, known: dict) -> None:
        """Write what is known of a bucket, as its next metageneration."""
        known |= {"metageneration": known["metageneration"] + 1, "updated": time.time_ns() // 1000}
        self._sql("INSERT OR REPLACE INTO buckets VALUES (?, ?)", bucket, json.dumps(known))

    def delete(self, bucket: str) -> None:
        """Delete a bucket that holds no objects; nothing but empty folders is removed with it."""
        with self.lock:
            folder = self.folder(bucket)
            if next(self.names(bucket), None):
                raise StorageError(409, "conflict", "The bucket you tried to delete is not empty.")
            try:
                for path, _, _ in os.walk(folder, topdown=False):
                    Path(path).rmdir()
            except OSError:
                rest = ", ".join(sorted(path.name for path in folder.iterdir()))
                message = f"The bucket you tried to delete is not empty: its folder holds what is no object: {rest}"
                raise StorageError(409, "conflict", message) from None
            self._forget(bucket)

    def _forget(self, bucket: str) -> None:
        shutil.rmtree(self.aside / bucket, ignore_errors=True)
        for table in ("objects", "aside", "uploads"):
            self._sql(f"DELETE FROM {table} WHERE bucket = ?", bucket)
        self._sql("DELETE FROM buckets WHERE name = ?", bucket)

    # Where the file of an object is

    def _plain(self, bucket: str, name: str) -> Path | None:
        """Return the path that a name spells, or None if it spells none below the bucket's folder."""
        if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            return None
        return self.root / bucket / name

    def _hashed(self, bucket: str, name: str) -> Path:
        return self.aside / bucket / hashlib.sha256(name.encode()).hexdigest()

    def _is_there(self, bucket: str, name: str, is_mark: bool) -> bool:
        """Say whether an object set aside still counts: the mark of a folder goes with its folder."""
        return not is_mark or self._plain(bucket, name[:-1]).is_dir()

    def _files(self, bucket: str, name: str) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the paths of an object's files with their status: at most two, and the first one counts."""
        if fault := fault_in(name):
            raise StorageError(400, "invalid", fault)
        paths = [self._plain(bucket, name)]
        rows = self._sql("SELECT is_mark FROM aside WHERE bucket = ? AND name = ?", bucket, name)
        if rows and self._is_there(bucket, name, rows[0][0]):
            paths.append(self._hashed(bucket, name))
        for path in filter(None, paths):
            with contextlib.suppress(OSError):
                status = path.lstat()
                # A link, also one on the way to the file, may lead out of the bucket.
                if stat.S_ISREG(status.st_mode) and path.parent.resolve() == path.parent:
                    yield path, status

    def _make_folder(self, path: Path) -> None:
        """Make a folder inside a bucket; raise an OSError of NO_PLACE if a file or a link is in its way."""
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        if nearest.resolve() != nearest:
            raise NotADirectoryError(errno.ENOTDIR, "a link is in the way", str(nearest))
        path.mkdir(parents=True, exist_ok=True)

    def _place(self, draft: Path, bucket: str, name: str) -> Path:
        """Make a file the object's file, in one step, and return where it is now."""
        if plain := self._plain(bucket, name):
            try:
                self._make_folder(plain.parent)
                return draft.rename(plain)
            except OSError as error:
                if error.errno not in NO_PLACE:
                    raise
                self._prune(bucket, name)
        is_mark = False
        if name.endswith("/") and (marked := self._plain(bucket, name[:-1])):
            try:
                self._make_folder(marked)
                is_mark = True
            except OSError as error:
                if error.errno not in NO_PLACE:
                    raise
        self._sql("INSERT OR REPLACE INTO aside VALUES (?, ?, ?)", bucket, name, is_mark)
        hashed = self._hashed(bucket, name)
        hashed.parent.mkdir(exist_ok=True)
        return draft.rename(hashed)

    def _prune(self, bucket: str, name: str) -> None:
        """Remove the folders on the way to a name that are empty now and that no object marks."""
        parts = name.split("/")[:-1]
        while parts and (folder := self._plain(bucket, "/".join(parts))):
            mark = "/".join([*parts, ""])
            if self._sql("SELECT 1 FROM aside WHERE bucket = ? AND name = ? AND is_mark", bucket, mark):
                return
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return
            parts.pop()

    # Objects

    def _describe(self, bucket: str, name: str, status: os.stat_result) -> Object:
        """Return the object whose file has this status."""
        modified, size = status.st_mtime_ns, status.st_size
        rows = self._sql(
            "SELECT metageneration, updated, crc32c, md5, resource FROM objects "
            "WHERE bucket = ? AND name = ? AND modified = ? AND size = ?",
            *(bucket, name, modified, size),
        )
        if rows:
            *columns, resource = rows[0]
            return Object(bucket, name, modified, size, *columns, json.loads(resource))
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Object(bucket, name, modified, size, updated=modified // 1000, resource={"contentType": kind})

    def _save(self, found: Object) -> None:
        columns = vars(found) | {"resource": json.dumps(found.resource)}
        self._sql("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", *columns.values())

    def find(self, bucket: str, name: str) -> Object | None:
        """Return an object, or None; raise NoSuchBucket."""
        self.folder(bucket)
        _, status = next(self._files(bucket, name), (None, None))
        return status and self._describe(bucket, name, status)

    def open(self, bucket: str, name: str) -> tuple[Object, BinaryIO]:
        """Return an object and its open file, which stays as it is when another takes the object's place."""
        self.folder(bucket)
        for path, _ in self._files(bucket, name):
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                return self._describe(bucket, name, os.fstat(file.fileno())), file
        raise no_such_object(bucket, name)

    def checked(self, found: Object) -> Object:
        """Return an object with its CRC32C, read from its file if a job wrote it; such an object has no MD5."""
        if found.crc32c:
            return found
        read, file = self.open(found.bucket, found.name)
        checksum = google_crc32c.Checksum()
        with file:
            while data := file.read(BLOCK):
                checksum.update(data)
        with self.lock:
            now = self.find(found.bucket, found.name)
            if now is None or not now.modified == read.modified == found.modified:
                return found
            now = replace(now, crc32c=_base64(checksum))
            if time.time_ns() - now.modified > CLOCK_NANOSECONDS:
                self._save(now)
            return now

    def draft(self, upload: str | None = None) -> Draft:
        """Return the draft of an upload, or a new one."""
        draft = Draft(self.uploads / (upload or uuid.uuid4().hex))
        if upload is None:
            draft.path.touch()
        return draft

    def put(self, bucket: str, name: str, draft: Draft, resource: dict, check: Check, checksums: dict) -> Object:
        """Make a draft the object of this name, in one step, if `check` allows it, and return the object."""
        with self.lock:
            current = self.find(bucket, name)
            check(current)
            generation = max(time.time_ns() // 1000, current.generation + 1 if current else 0)
            os.utime(draft.path, ns=(generation * 1000,) * 2)
            status = draft.path.stat()
            made = Object(bucket, name, status.st_mtime_ns, status.st_size, resource=resource, **checksums)
            made = replace(made, updated=made.generation)
            # The row first: until the file is moved, the rows of the old file and of the new one both hold.
            self._save(made)
            path = self._place(draft.path, bucket, name)
            for other, _ in list(self._files(bucket, name)):
                if other != path:
                    other.unlink()
            others = "DELETE FROM objects WHERE bucket = ? AND name = ? AND modified != ?"
            self._tidy(others, bucket, name, made.modified)
            return made

    def change(self, bucket: str, name: str, check: Check, resource_of: Callable[[dict], dict]) -> Object:
        """Replace an object's resource by what `resource_of` makes of it, and return the object."""
        with self.lock:
            found = self.find(bucket, name)
            check(found)
            news = {"metageneration": found.metageneration + 1, "updated": time.time_ns() // 1000}
            found = replace(found, resource=resource_of(found.resource), **news)
            self._save(found)
            return found

    def remove(self, bucket: str, name: str, check: Check) -> None:
        """Delete an object, if `check` allows it."""
        with self.lock:
            check(self.find(bucket, name))
            for path, _ in list(self._files(bucket, name)):
                path.unlink()
            for table in ("objects", "aside"):
                self._tidy(f"DELETE FROM {table} WHERE bucket = ? AND name = ?", bucket, name)
            self._prune(bucket, name)

    # Lists

    def _walk(self, folder: str | Path, prefix: str, start: str, passed: list[str] | None) -> Iterator:
        """Yield the names of the files in and below a folder in order, from `start` on; links are not followed."""
        try:
            with os.scandir(folder) as entries:
                found = sorted((prefix + e.name + "/" * e.is_dir(follow_symlinks=False), e) for e in entries)
        except OSError:
            return
        for name, entry in found:
            if passed and prefix.startswith(passed[-1]):
                return
            is_folder = name.endswith("/")
            if (name < start and not (is_folder and start.startswith(name))) or fault_in(name):
                continue
            if is_folder:
                yield from self._walk(entry.path, name, start, passed)
            elif entry.is_file(follow_symlinks=False):
                yield name, entry

    def _walk_aside(self, bucket: str, start: str) -> Iterator[tuple[str, Path]]:
        ordered = "SELECT name, is_mark FROM aside WHERE bucket = ? AND name >= ? ORDER BY name"
        for name, is_mark in self._sql(ordered, bucket, start):
            path = self._hashed(bucket, name)
            if path.exists() and self._is_there(bucket, name, is_mark):
                yield name, path

    def names(self, bucket: str, start: str = "", passed: list[str] | None = None) -> Iterator:
        """Yield the names of all objects in order, from `start` on, each with its directory entry or path.

        Folders below the last prefix in `passed`, a list that may grow meanwhile, are passed over.
        """
        walks = self._walk(self.folder(bucket), "", start, passed), self._walk_aside(bucket, start)
        last = None
        for name, entry in heapq.merge(*walks, key=lambda pair: pair[0]):
            if name != last:
                yield name, entry
            last = name

    def page(
        self,
        bucket: str,
        limit: int,
        start: str = "",
        end: str = "",
        prefix: str = "",
        delimiter: str = "",
        with_marks: bool = False,
        matches: Callable | None = None,
    ) -> tuple[list[Object], list[str], str | None]:
        """Return objects, prefixes and the name at which the next page starts, None after the last one.

        `with_marks` lists an object that is named as a prefix too; `matches` says which names count.
        """
        objects, prefixes = [], []
        for name, entry in self.names(bucket, max(start, prefix), prefixes):
            if not name.startswith(prefix) or (end and name >= end):
                break
            if matches and not matches(name):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            rolled = name[: cut + len(delimiter)] if cut >= 0 else None
            if rolled and rolled in prefixes[-1:]:
                continue
            if len(objects) + len(prefixes) >= limit:
                return objects, prefixes, name
            if rolled:
                prefixes.append(rolled)
            if not rolled or (with_marks and rolled == name):
                with contextlib.suppress(FileNotFoundError):
                    objects.append(self._describe(bucket, name, entry.stat(follow_symlinks=False)))
        return objects, prefixes, None

    # Uploads in several requests

    def begin_upload(self, bucket: str, request: dict) -> str:
        """Return the id of a new upload; `request` is kept with it."""
        path = self.draft().path
        self._sql("INSERT INTO uploads VALUES (?, ?, ?, ?)", path.name, bucket, time.time(), json.dumps(request))
        return path.name

    def upload(self, bucket: str, upload: str) -> dict:
        """Return the request with which an upload began."""
        rows = self._sql("SELECT request FROM uploads WHERE id = ? AND bucket = ?", upload, bucket)
        if not rows:
            raise StorageError(404, "notFound", "There is no such upload session, or it is over: begin a new upload.")
        return json.loads(rows[0][0])

    def cancel_upload(self, upload: str) -> None:
        """Forget an upload and what came of it."""
        # The file first: on a full disk, there is no room for a change of the rows before.
        self.draft(upload).path.unlink(missing_ok=True)
        self._sql("DELETE FROM uploads WHERE id = ?", upload)
