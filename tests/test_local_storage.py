"""The local Cloud Storage, asked by Google's own client: what it takes it gives back, and what it cannot do it says."""

import contextlib
import gzip
import io
import itertools
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import uvicorn
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage as google_storage
from google.cloud.storage.exceptions import InvalidResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse

from helpers.local import MANAGED_BUCKET, storage
from helpers.local.buckets import Buckets
from helpers.local.storage_transfers import Http

MIB = 2**20
ASK = {"Content-Range": "bytes */*"}  # how much of an upload has arrived?


@contextlib.contextmanager
def served(folder):
    """Serve a folder from a thread, and give the address; what the server relays comes back as text."""
    buckets = Buckets(folder / "buckets", folder / "storage.sqlite")
    routes = storage.routes(buckets, lambda request: PlainTextResponse(f"from outside: {request.url.path}"))
    config = uvicorn.Config(Starlette(routes=routes), http=Http, log_level="critical", timeout_graceful_shutdown=1)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextlib.contextmanager
def connected(address):
    """Give Google's client of a server."""
    client = google_storage.Client("local", AnonymousCredentials(), client_options={"api_endpoint": address})
    with contextlib.closing(client):
        yield client


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder, the address of its server and a client of that."""
    folder = tmp_path_factory.mktemp("store")
    with served(folder) as address, connected(address) as client:
        yield folder, address, client


@pytest.fixture
def bucket(store):
    """A bucket of the test's own."""
    return store[2].create_bucket(f"bucket-{uuid.uuid4().hex[:8]}", location="europe-west4")


@pytest.fixture
def folder(store, bucket):
    """The folder of that bucket, as a job sees it."""
    return store[0] / "buckets" / bucket.name


def names(bucket, **how):
    """List the names in a bucket."""
    return [blob.name for blob in bucket.list_blobs(**how)]


def put(bucket, *paths):
    """Put small objects whose content is their names."""
    for path in paths:
        bucket.blob(path).upload_from_string(path)


# Buckets


def test_a_bucket_is_a_folder_with_a_description(store, bucket):
    root, _, client = store
    assert (root / "buckets" / bucket.name).is_dir()
    assert (bucket.location, bucket.location_type, bucket.storage_class) == ("EUROPE-WEST4", "region", "STANDARD")
    assert bucket.project_number == 123456789012
    bucket.labels = {"course": "training", "lesson": "7"}
    bucket.patch()
    bucket.labels = {"course": "training"}
    bucket.patch()
    found = client.get_bucket(bucket.name)
    assert (found.labels, found.metageneration) == ({"course": "training"}, 3)
    found.labels = {}
    found.update()
    assert client.get_bucket(bucket.name).labels == {}
    (root / "buckets" / MANAGED_BUCKET).mkdir()
    for size in (1, 100):
        listed = [each.name for each in client.list_buckets(page_size=size)]
        assert (bucket.name in listed, MANAGED_BUCKET in listed) == (True, False)
    assert [each.name for each in client.list_buckets(prefix=bucket.name)] == [bucket.name]
    with pytest.raises(exceptions.Conflict, match="you already own it"):
        client.create_bucket(bucket.name)
    with pytest.raises(exceptions.BadRequest, match="Invalid bucket name: 'No'"):
        client.create_bucket("No")


def test_a_bucket_is_deleted_only_when_it_is_empty(store, bucket, folder):
    put(bucket, "a/b")
    with pytest.raises(exceptions.Conflict, match="not empty"):
        bucket.delete()
    (folder / "link").symlink_to("/etc")
    bucket.delete_blob("a/b")
    with pytest.raises(exceptions.Conflict, match="what is no object: link"):
        bucket.delete()
    (folder / "link").unlink()
    bucket.delete(force=True)
    assert not folder.exists()
    assert not bucket.exists()
    with pytest.raises(exceptions.NotFound, match="The specified bucket does not exist"):
        put(bucket, "a")


def test_a_bucket_keeps_its_policy(bucket):
    policy, stale = bucket.get_iam_policy(), bucket.get_iam_policy()
    policy["roles/storage.objectViewer"] = {"user:ada@example.com"}
    bucket.set_iam_policy(policy)
    assert bucket.get_iam_policy()["roles/storage.objectViewer"] == {"user:ada@example.com"}
    with pytest.raises(exceptions.PreconditionFailed, match="read it again"):
        bucket.set_iam_policy(stale)
    assert bucket.test_iam_permissions(["storage.objects.get"]) == ["storage.objects.get"]


# Uploads and downloads


@pytest.mark.parametrize("size", [0, 1, MIB, 3 * MIB + 7])
@pytest.mark.parametrize("chunk", [None, 256 * 1024])
def test_what_is_uploaded_is_downloaded(bucket, folder, size, chunk):
    data = random.Random(size).randbytes(size)
    blob = bucket.blob(f"{size}/{chunk}.bin", chunk_size=chunk)
    # Without a size, a stream with a chunk size is sent in parts of a whole that is not known.
    blob.upload_from_file(io.BytesIO(data), content_type="application/x-own", checksum="md5")
    assert (folder / blob.name).read_bytes() == data
    found = bucket.get_blob(blob.name)
    assert (found.size, found.content_type, found.generation) == (size, "application/x-own", blob.generation)
    for checksum in ("md5", "crc32c"):
        assert found.download_as_bytes(checksum=checksum) == data
    with found.open("rb", chunk_size=MIB) as file:
        assert file.read() == data


def test_a_stream_of_unknown_length_is_an_object_when_it_ends(bucket):
    with bucket.blob("log.txt").open("w", chunk_size=256 * 1024) as log:
        for number in range(60_000):
            log.write(f"line {number}\n")
        assert not bucket.blob("log.txt").exists()
    assert bucket.blob("log.txt").download_as_text().endswith("line 59999\n")


def test_a_part_of_an_object_is_downloaded(store, bucket):
    put(bucket, "0123456789")
    blob = bucket.blob("0123456789")
    assert blob.download_as_bytes(start=2, end=4) == b"234"
    assert blob.download_as_bytes(start=8, end=99) == b"89"
    assert blob.download_as_bytes(start=-3) == b"789"
    with pytest.raises(exceptions.RequestRangeNotSatisfiable):
        blob.download_as_bytes(start=10)
    # As TensorFlow reads, from the host of the XML API.
    url = f"{store[1]}/{bucket.name}/0123456789"
    answer = requests.get(url, headers={"Range": "bytes=4-6"}, timeout=9)
    assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (206, b"456", "bytes 4-6/10")
    assert requests.head(url, timeout=9).headers["Content-Length"] == "10"
    missing = requests.get(f"{store[1]}/{bucket.name}/missing", timeout=9)
    assert (missing.status_code, "<Code>NoSuchKey</Code>" in missing.text) == (404, True)


def test_an_upload_that_arrives_changed_is_refused(store, bucket):
    blob = bucket.blob("data")
    blob.md5_hash = "XUFAKrxLKna5cZ2REBfFkg=="
    with pytest.raises(exceptions.BadRequest, match=r"Provided MD5 hash .* doesn't match calculated MD5 hash"):
        blob.upload_from_string("other", checksum=None)
    url = f"{store[1]}/upload/storage/v1/b/{bucket.name}/o?uploadType=media&name=data"
    answer = requests.post(url, data=b"other", headers={"X-Goog-Hash": "crc32c=AAAAAA=="}, timeout=9)
    assert (answer.status_code, "Provided CRC32C" in answer.text) == (400, True)
    assert names(bucket) == []


def test_gzip_is_unzipped_for_who_does_not_know_it(store, bucket):
    blob = bucket.blob("text.txt")
    blob.content_encoding = "gzip"
    zipped = gzip.compress(b"the same words " * 1000)
    blob.upload_from_string(zipped, content_type="text/plain")
    assert blob.download_as_bytes() == b"the same words " * 1000
    assert blob.download_as_bytes(raw_download=True) == zipped
    plain = requests.get(f"{store[1]}/{bucket.name}/text.txt", headers={"Accept-Encoding": "identity"}, timeout=9)
    assert (plain.content, plain.headers.get("Content-Encoding")) == (b"the same words " * 1000, None)


def test_metadata_is_kept_changed_and_removed(bucket):
    blob = bucket.blob("data.csv")
    blob.metadata, blob.cache_control = {"source": "penguins", "rows": "344"}, "no-store"
    blob.upload_from_string("x")
    blob.metadata, blob.content_disposition = {"rows": None}, 'attachment; filename="données.csv"'
    blob.patch()
    found = bucket.get_blob("data.csv")
    assert (found.metadata, found.cache_control, found.metageneration) == ({"source": "penguins"}, "no-store", 2)
    assert found.updated > found.time_created
    assert blob.download_as_bytes() == b"x"
    found.metadata = {"only": "this"}
    found.update()
    assert bucket.get_blob("data.csv").metadata == {"only": "this"}
    found.content_type = "text/plain\r\nSet-Cookie: a=b"
    with pytest.raises(exceptions.BadRequest, match="expected printable text"):
        found.patch()


def test_tensorflow_is_understood(store, bucket):
    def ask(head, body=b""):
        """Send a head, and the body when the server has asked for it; return the answer."""
        with socket.create_connection(("127.0.0.1", int(store[1].rpartition(":")[2])), timeout=9) as raw:
            raw.sendall(f"{head}\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n".encode())
            if body:
                assert raw.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
                raw.sendall(body)
            return b"".join(iter(lambda: raw.recv(65536), b""))

    # A body that is empty, as TensorFlow says it, and a header that it finds in capitals only.
    uploads = f"/upload/storage/v1/b/{bucket.name}/o"
    empty = "Content-Length: 0\r\nTransfer-Encoding: identity"
    assert b'"name":"d/"' in ask(f"POST {uploads}?uploadType=media&name=d%2F HTTP/1.1\r\n{empty}")
    begun = ask(f"POST {uploads}?uploadType=resumable&name=d%2Fx HTTP/1.1\r\n{empty}")
    session = re.search(rb"\r\nLocation: http://[^/]+(\S+)", begun)[1].decode()
    assert b"308 Permanent Redirect" in ask(f"PUT {session} HTTP/1.1\r\nContent-Range: bytes */5\r\n{empty}")
    # A length beside chunks.
    sent = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes"
    part = ask(f"PUT {session} HTTP/1.1\r\n{sent} 0-1/5", b"2\r\nab\r\n0\r\n\r\n")
    assert b"\r\nRange: bytes=0-1\r\n" in part
    assert b'"size":"5"' in ask(f"PUT {session} HTTP/1.1\r\n{sent} 2-4/5", b"3\r\ncde\r\n0\r\n\r\n")
    assert bucket.blob("d/x").download_as_bytes() == b"abcde"


# Preconditions


def test_preconditions_decide(bucket):
    blob = bucket.blob("once")
    blob.upload_from_string("first", if_generation_match=0)
    first = blob.generation
    with pytest.raises(exceptions.PreconditionFailed, match="pre-conditions you specified did not hold"):
        blob.upload_from_string("second", if_generation_match=0)
    blob.upload_from_string("second", if_generation_match=first)
    assert blob.generation > first
    for refused in (
        lambda: blob.delete(if_generation_match=first),
        lambda: blob.patch(if_metageneration_match=9),
        lambda: bucket.blob("once").upload_from_string("x", if_generation_not_match=blob.generation),
        lambda: bucket.patch(if_metageneration_match=9),
    ):
        with pytest.raises(exceptions.PreconditionFailed):
            refused()
    with pytest.raises(exceptions.NotModified):
        bucket.blob("once").reload(if_generation_not_match=blob.generation)
    with pytest.raises(exceptions.NotModified):
        bucket.blob("once").reload(if_etag_not_match=blob.etag)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.blob("once").download_as_bytes(if_etag_match="another")
    with pytest.raises(exceptions.NotFound, match=f"No such object: {bucket.name}/once"):
        bucket.blob("once", generation=first).download_as_bytes()
    assert bucket.blob("once").download_as_bytes() == b"second"


def test_one_of_many_writers_wins(store, bucket):
    def write(number):
        with connected(store[1]) as client:
            blob = client.bucket(bucket.name).blob("lock")
            try:
                blob.upload_from_string(str(number), if_generation_match=0)
            except exceptions.PreconditionFailed:
                return None
            return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(write, range(16)) if number is not None]
    assert [bucket.blob("lock").download_as_text()] == [str(number) for number in winners]


# Lists


def test_lists_have_prefixes_pages_and_bounds(bucket):
    put(bucket, "a", "b/1", "b/2", "b/c/3", "b-", "d/", "d/4", "e")
    assert names(bucket) == ["a", "b-", "b/1", "b/2", "b/c/3", "d/", "d/4", "e"]
    assert names(bucket, prefix="b/") == ["b/1", "b/2", "b/c/3"]
    assert names(bucket, start_offset="b/2", end_offset="d/4") == ["b/2", "b/c/3", "d/"]
    for size in (1, 2, 3, 100):
        assert names(bucket, page_size=size) == names(bucket)
        listing = bucket.list_blobs(delimiter="/", page_size=size)
        assert [blob.name for blob in listing] == ["a", "b-", "e"]
        assert listing.prefixes == {"b/", "d/"}
    assert names(bucket, prefix="b/", delimiter="/") == ["b/1", "b/2"]
    assert names(bucket, delimiter="/", include_trailing_delimiter=True) == ["a", "b-", "d/", "e"]
    assert names(bucket, prefix="d/", delimiter="/") == ["d/", "d/4"]
    assert names(bucket, max_results=3) == ["a", "b-", "b/1"]


def test_lists_take_globs(bucket):
    put(bucket, "a.csv", "b.txt", "x/a.csv", "x/y/a.csv", "x/y/b.csv", "x/[1].csv")
    for pattern, found in {
        "*.csv": ["a.csv"],
        "**.csv": ["a.csv", "x/[1].csv", "x/a.csv", "x/y/a.csv", "x/y/b.csv"],
        "x/**/a.csv": ["x/a.csv", "x/y/a.csv"],
        "x/?/[!a].csv": ["x/y/b.csv"],
        "{a,b}.{csv,txt}": ["a.csv", "b.txt"],
    }.items():
        assert names(bucket, match_glob=pattern) == found, pattern


# Several objects at once


def test_objects_are_joined(bucket):
    put(bucket, "a", "b", "c")
    joined = bucket.blob("abc")
    joined.content_type = "text/plain"
    joined.compose([bucket.blob("a"), bucket.blob("b"), bucket.blob("c")])
    assert (joined.component_count, joined.md5_hash, joined.content_type) == (3, None, "text/plain")
    joined.compose([joined, bucket.blob("a")])
    assert (joined.download_as_bytes(), joined.component_count) == (b"abca", 4)
    assert bucket.copy_blob(joined, bucket, "copy").md5_hash is None
    with pytest.raises(exceptions.NotFound, match="/missing"):
        joined.compose([bucket.blob("a"), bucket.blob("missing")])
    with pytest.raises(exceptions.PreconditionFailed):
        joined.compose([bucket.blob("a")], if_source_generation_match=[7])
    assert bucket.blob("abc").download_as_bytes() == b"abca"


def test_objects_are_copied_and_moved(store, bucket):
    other = store[2].create_bucket(bucket.name + "-2")
    source = bucket.blob("source")
    source.metadata = {"a": "b"}
    source.upload_from_string("content", content_type="text/x-own")
    copies = [bucket.copy_blob(source, other), other.blob("rewritten")]
    assert copies[1].rewrite(source) == (None, 7, 7)
    for copy in [other.get_blob(copy.name) for copy in copies]:
        assert (copy.download_as_bytes(), copy.metadata, copy.content_type) == (b"content", {"a": "b"}, "text/x-own")
        assert (copy.md5_hash, copy.crc32c) == (source.md5_hash, source.crc32c)
    with pytest.raises(exceptions.PreconditionFailed):
        bucket.copy_blob(source, other, if_source_generation_match=7)
    assert bucket.rename_blob(source, "renamed").download_as_bytes() == b"content"
    bucket.move_blob(bucket.blob("renamed"), "moved")
    assert (names(bucket), names(other)) == (["moved"], ["rewritten", "source"])


def test_a_batch_is_answered_in_its_order(store, bucket):
    put(bucket, "a", "b", "ü/ ?#%")
    with store[2].batch():
        bucket.delete_blob("a")
        blob = bucket.blob("ü/ ?#%")
        blob.metadata = {"seen": "ja, natürlich"}
        blob.patch()
    assert blob.metadata == {"seen": "ja, natürlich"}
    with pytest.raises(exceptions.NotFound, match=f"No such object: {bucket.name}/missing"), store[2].batch():
        bucket.delete_blob("missing")
        bucket.delete_blob("b")
    assert names(bucket) == ["ü/ ?#%"]


# Names

STRANGE = (
    *("a", "a/", "a/b", "a/b/c", "a//b", "a/./b", "a/../../b", "../x", "/", "//", "/etc/passwd", "./x", "x/.", "x/.."),
    *(
        " ",
        "a b",
        "a%2Fb",
        "a?b#c",
        "a+b&c=d",
        "ünïcödé/日本/🐧",
        "e\u0301",
        "\u00e9",
        "tab\there",
        "nul\0nul",
        "back\\slash",
    ),
    *("o/p", "rewriteTo/b/x/o/y", "compose", "~", "*", "[1]", "'\"", "x" * 255, "y" * 300, "z/" * 100, "😀" * 256),
)


def test_any_name_that_google_takes_is_kept(store, bucket, folder):
    before = {path for path in store[0].rglob("*") if store[0] / "buckets" not in path.parents}
    for name in STRANGE:
        bucket.blob(name).upload_from_string(name.encode()[::-1])
    assert names(bucket) == sorted(STRANGE)
    for name in STRANGE:
        blob = bucket.get_blob(name)
        assert (blob.name, blob.download_as_bytes()) == (name, name.encode()[::-1])
    bucket.copy_blob(bucket.blob("a//b"), bucket, "../../y")
    assert bucket.blob("../../y").download_as_bytes() == b"b//a"
    assert {path.name for path in (store[0] / "buckets").iterdir()} >= {bucket.name}
    outside = {path for path in store[0].rglob("*") if store[0] / "buckets" not in path.parents} - before
    assert {path.relative_to(store[0]).parts[0] for path in outside} == {"aside"}
    assert (folder / "ünïcödé/日本/🐧").is_file()
    for name in (*STRANGE, "../../y"):
        bucket.delete_blob(name)
    assert (names(bucket), list(folder.iterdir())) == ([], [])
    bucket.delete()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("..", "Invalid object name"),
        (".", "Invalid object name"),
        ("a\nb", "Disallowed unicode characters"),
        ("a\rb", "Disallowed unicode characters"),
        ("é" * 513, "The maximum object length is 1024 characters, but got a name with 1026 characters"),
        (".well-known/acme-challenge/x", "Invalid object name"),
    ],
)
def test_a_name_that_google_refuses_is_refused(bucket, name, words):
    with pytest.raises(exceptions.BadRequest, match=words):
        bucket.blob(name).upload_from_string("x")
    assert names(bucket) == []


def test_a_file_and_a_folder_may_share_a_name(bucket, folder):
    put(bucket, "model", "model/weights", "model/", "logs/1", "logs")
    assert names(bucket) == ["logs", "logs/1", "model", "model/", "model/weights"]
    assert (folder / "model").read_text() == "model"  # who comes first has the path
    assert (folder / "logs/1").read_text() == "logs/1"
    bucket.delete_blob("model")
    put(bucket, "model/weights")
    assert (folder / "model/weights").read_text() == "model/weights"
    assert names(bucket) == ["logs", "logs/1", "model/", "model/weights"]
    # Whatever has the path counts, and nothing old comes back when it goes.
    (folder / "model/weights").unlink()
    (folder / "logs/1").unlink()
    (folder / "logs").rmdir()
    (folder / "logs").write_text("by a job")
    assert names(bucket) == ["logs", "model/"]
    assert bucket.blob("logs").download_as_bytes() == b"by a job"


def test_nothing_of_a_bucket_that_was_removed_by_hand_comes_back(store, bucket, folder):
    put(bucket, "a//b", "c")
    shutil.rmtree(folder)
    assert not bucket.exists()
    again = store[2].create_bucket(bucket.name)
    assert (names(again), again.location) == ([], "US")
    assert not (store[0] / "aside" / bucket.name).exists()


def test_a_folder_that_is_marked_is_there_for_jobs_and_goes_with_its_mark(bucket, folder):
    bucket.blob("out/run/").upload_from_string("")
    assert (folder / "out/run").is_dir()
    put(bucket, "out/run/1")
    bucket.delete_blob("out/run/1")
    assert names(bucket) == ["out/run/"]
    (folder / "out/run").rmdir()
    assert names(bucket) == []
    assert not bucket.blob("out/run/").exists()
    bucket.blob("out/run/").upload_from_string("")
    bucket.delete_blob("out/run/")
    assert list(folder.iterdir()) == []


def test_nothing_outside_of_the_bucket_is_served_or_written(store, bucket, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "link").symlink_to(secret)
    (folder / "way").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    for name in ("link", "way/secret", "pipe"):
        assert not bucket.blob(name).exists()
        with pytest.raises(exceptions.NotFound):
            bucket.blob(name).download_as_bytes()
    assert names(bucket) == []
    put(bucket, "way/new", "way/deep/new")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert names(bucket) == ["way/deep/new", "way/new"]
    for path in (
        f"/{bucket.name}/%2e%2e%2f%2e%2e%2fstorage.sqlite",
        "/%2e%2e/storage.sqlite",
        "/..%2fstorage.sqlite/x",
    ):
        with socket.create_connection(("127.0.0.1", int(store[1].rpartition(":")[2]))) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: storage.googleapis.com\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert b"SQLite format" not in answer


# Files that a job writes


def test_a_file_that_a_job_writes_is_an_object_at_once(bucket, folder):
    (folder / "model/1").mkdir(parents=True)
    (folder / "model/1/metrics.json").write_text('{"rmse": 530.5}')
    (listed,) = bucket.list_blobs()
    found = bucket.get_blob("model/1/metrics.json")
    status = (folder / found.name).stat()
    assert listed.name == found.name
    assert (found.size, found.content_type) == (15, "application/json")
    assert abs(found.updated.timestamp() - status.st_mtime) < 0.01
    assert found.download_as_bytes(checksum="crc32c") == b'{"rmse": 530.5}'
    assert found.crc32c
    found.metadata = {"lesson": "7"}
    found.patch()
    assert bucket.get_blob(found.name).metadata == {"lesson": "7"}


def test_what_is_known_of_an_object_ends_when_a_job_overwrites_it(bucket, folder):
    for round_ in range(20):
        blob = bucket.blob("data.csv")
        blob.metadata = {"round": "first"}
        blob.upload_from_string("upload", content_type="text/x-own")
        # In place, of the same length, and at the same moment for a coarse clock.
        with (folder / "data.csv").open("r+") as file:
            file.write(f"job {round_:02}")
        found = bucket.get_blob("data.csv")
        assert (found.metadata, found.content_type, found.metageneration) == (None, "text/csv", 1)
        assert found.generation != blob.generation
        assert found.download_as_bytes(checksum="crc32c") == f"job {round_:02}".encode()
    (folder / "data.csv").unlink()
    assert names(bucket) == []
    (folder / "future").write_text("x")
    os.utime(folder / "future", (4e9, 4e9))
    later = bucket.get_blob("future").generation
    blob = bucket.blob("future")
    blob.upload_from_string("y", if_generation_match=later)
    assert blob.generation > later


# Interruptions


SERVER = """
import pathlib, resource, sys, uvicorn
from starlette.applications import Starlette
from helpers.local import storage
from helpers.local.buckets import Buckets
folder, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
uvicorn.run(Starlette(routes=storage.routes(Buckets(folder / "buckets", folder / "storage.sqlite"), None)), port=0)
"""


@contextlib.contextmanager
def process(folder, limit=resource.RLIM_INFINITY):
    """Serve a folder from a process that may write files of `limit` bytes; it is killed at the end."""
    call = [sys.executable, "-c", SERVER, str(folder), str(limit)]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as server:
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://127.0.0.1:\d+", line)))
            with connected(address) as client:
                yield server, address, client
        finally:
            server.kill()


def test_an_upload_goes_on_after_the_server_was_killed(tmp_path):
    data = random.Random(1).randbytes(4 * MIB)
    with process(tmp_path) as (_, address, client):
        bucket = client.create_bucket("interrupted")
        put(bucket, "big")
        session = bucket.blob("big").create_resumable_upload_session("text/x-own", size=len(data))
        part = {"Content-Range": f"bytes 0-{MIB - 1}/{len(data)}"}
        assert requests.put(session, data=data[:MIB], headers=part, timeout=9).headers["Range"] == f"bytes=0-{MIB - 1}"
    with process(tmp_path) as (_, address, client):
        bucket = client.bucket("interrupted")
        assert (names(bucket), bucket.blob("big").download_as_bytes()) == (["big"], b"big")
        session = address + session[session.index("/upload") :]
        asked = requests.put(session, headers={"Content-Range": f"bytes */{len(data)}"}, timeout=9)
        assert (asked.status_code, asked.headers["Range"]) == (308, f"bytes=0-{MIB - 1}")
        # From an earlier place, as a client does that has not heard how much arrived.
        rest = {"Content-Range": f"bytes {MIB // 2}-{len(data) - 1}/{len(data)}"}
        assert requests.put(session, data=data[MIB // 2 :], headers=rest, timeout=9).status_code == 200
        found = bucket.get_blob("big")
        assert (found.download_as_bytes(checksum="md5"), found.content_type) == (data, "text/x-own")
        # The client missed the answer.
        asked = requests.put(session, headers={"Content-Range": f"bytes */{len(data)}"}, timeout=9)
        assert (asked.status_code, asked.json()["generation"]) == (200, str(found.generation))


def test_a_connection_that_is_cut_leaves_what_arrived(store, bucket):
    data, arrived = random.Random(2).randbytes(3 * MIB), MIB // 2 + 5
    session = bucket.blob("cut").create_resumable_upload_session(size=len(data))
    path = session[session.index("/upload") :]
    with socket.create_connection(("127.0.0.1", int(store[1].rpartition(":")[2]))) as raw:
        size = len(data)
        sent = f"Content-Length: {size}\r\nContent-Range: bytes 0-{size - 1}/{size}"
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\n{sent}"
        raw.sendall(head.encode() + b"\r\n\r\n" + data[:arrived])
    deadline = time.monotonic() + 20
    while requests.put(session, headers=ASK, timeout=9).headers.get("Range") != f"bytes=0-{arrived - 1}":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rest = {"Content-Range": f"bytes {arrived}-{len(data) - 1}/{len(data)}"}
    assert requests.put(session, data=data[arrived:], headers=rest, timeout=9).status_code == 200
    assert bucket.blob("cut").download_as_bytes() == data
    gap = bucket.blob("gap").create_resumable_upload_session(size=10)
    refused = requests.put(gap, data=b"x", headers={"Content-Range": "bytes 5-5/10"}, timeout=9)
    assert (refused.status_code, "exceeds already uploaded size of 0 byte(s)" in refused.text) == (400, True)


def test_a_kill_leaves_the_old_object_or_the_new_one(tmp_path):
    contents = [bytes([65 + number]) * (MIB + number) for number in range(2)]

    def check(client):
        (found,) = client.list_blobs("killed")
        assert found.download_as_bytes(checksum="md5") == contents[int(found.content_type[-1])]
        assert list((tmp_path / "uploads").iterdir()) == []

    with process(tmp_path) as (_, _, client):
        client.create_bucket("killed").blob("object").upload_from_string(contents[0], content_type="type/0")
    for seconds in (0.05, 0.07, 0.09):
        with process(tmp_path) as (server, _, client):
            check(client)
            blob = client.bucket("killed").blob("object")
            threading.Timer(seconds, server.kill).start()
            with contextlib.suppress(requests.RequestException):
                for number in itertools.cycle(range(2)):
                    blob.upload_from_string(contents[number], content_type=f"type/{number}", retry=None)
    with process(tmp_path) as (_, _, client):
        check(client)


def test_a_full_disk_is_said_and_leaves_no_half_object(tmp_path):
    with process(tmp_path, limit=2 * MIB) as (_, _, client):
        bucket = client.create_bucket("full-disk")
        put(bucket, "small")
        for kind in ({}, {"chunk_size": MIB}):
            with pytest.raises(
                (exceptions.GoogleAPICallError, InvalidResponse), match="disk of the local cloud's folder is full"
            ):
                bucket.blob("big", **kind).upload_from_file(io.BytesIO(bytes(9 * MIB)))
        with pytest.raises(exceptions.GoogleAPICallError, match="disk"):
            bucket.blob("media").upload_from_string(bytes(3 * MIB))
        put(bucket, "after")
        assert names(bucket) == ["after", "small"]
        assert list((tmp_path / "uploads").iterdir()) == []


# What is elsewhere, and what is refused


def test_reading_a_bucket_that_is_elsewhere_is_relayed(store):
    assert store[2].bucket("keras-weights").blob("a b").download_as_bytes().startswith(b"from outside: ")
    assert not store[2].bucket("keras-weights").exists()
    with pytest.raises(exceptions.NotFound, match="The specified bucket does not exist"):
        put(store[2].bucket("keras-weights"), "mine")


def test_what_is_not_done_is_refused_with_what_to_use_instead(store, bucket):
    put(bucket, "a")
    blob = bucket.blob("a")
    blob.temporary_hold = True
    bucket.versioning_enabled = True
    for refused, words in {
        lambda: bucket.acl.reload(): "uniform bucket-level access",
        lambda: blob.make_public(): "uniform bucket-level access",
        lambda: bucket.blob("b").upload_from_string("x", predefined_acl="publicRead"): "uniform bucket-level access",
        lambda: bucket.blob("b", encryption_key=b"k" * 32).upload_from_string("x"): "objects are plain files",
        lambda: bucket.patch(): "an object has one version here",
        lambda: bucket.restore_blob("a", generation=1): "what is deleted is gone",
        lambda: blob.patch(): "The field temporaryHold is not part of the local cloud",
        lambda: bucket.list_notifications().pages.__next__(): "notificationConfigs is not part of the local cloud",
    }.items():
        with pytest.raises(exceptions.MethodNotImplemented, match=words):
            refused()
    assert names(bucket) == ["a"]


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "storage/v1/b", b"{", "Parse Error"),
        ("POST", "storage/v1/b", b"[]", "Parse Error"),
        ("POST", "storage/v1/b/BUCKET/o/a/compose", b'{"sourceObjects": [1]}', "Invalid value for field sourceObjects"),
        ("PATCH", "storage/v1/b/BUCKET/o/a", b'{"metadata": {"a": 1}}', "Invalid value for field metadata"),
        ("GET", "storage/v1/b/BUCKET/o?pageToken=%00", b"", "Invalid page token"),
        ("GET", "storage/v1/b/BUCKET/o?maxResults=many", b"", "Invalid value for parameter maxResults"),
        ("GET", "storage/v1/b/BUCKET/o?matchGlob=%7Ba", b"", "Invalid glob pattern"),
        ("GET", "storage/v1/b/BUCKET/o/%FF", b"", "must be valid UTF-8"),
        ("POST", "upload/storage/v1/b/BUCKET/o?uploadType=multipart", b"--x", "Malformed multipart body"),
        ("POST", "upload/storage/v1/b/BUCKET/o?uploadType=media", b"x", "Required parameter: name"),
        ("PUT", "upload/storage/v1/b/BUCKET/o?upload_id=../storage.sqlite", b"x", "There is no such upload session"),
        ("POST", "batch/storage/v1", b"x", "Malformed batch"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(store, bucket, method, path, body, words):
    put(bucket, "a")
    answer = requests.request(method, f"{store[1]}/{path.replace('BUCKET', bucket.name)}", data=body, timeout=9)
    assert answer.status_code in (400, 404)
    assert words in answer.json()["error"]["message"]
