"""The local Cloud Storage against a dictionary: whatever is done in whatever order, both hold the same objects."""

import random

import pytest
from google.api_core import exceptions
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from test_local_storage import connected, served

# Names that get in each other's way on a file system.
NO_PATHS = ["a/", "a/b/", "a//b", "a/../b"]
NAMES = some.sampled_from(["a", "a/b", "a/b/c", "ab", "a-b", "é", "é/ü", *NO_PATHS])
CONTENTS = some.binary(max_size=20)
EFFORT = settings(max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


def reference_list(names, prefix, delimiter):
    """Return the objects and the prefixes that a list shows."""
    objects, prefixes = [], set()
    for name in sorted(names):
        if name.startswith(prefix):
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.add(prefix + head + delimiter)
            else:
                objects.append(name)
    return objects, prefixes


def machine(folder, client):
    """Return the class of what is tried: each instance has a bucket of its own."""

    class Objects(RuleBasedStateMachine):
        @initialize()
        def begin(self):
            self.bucket = client.create_bucket(f"model-{random.SystemRandom().getrandbits(60):x}")
            self.folder = folder / self.bucket.name
            self.model = {}  # a name to its content, its metadata and its generation

        def blob(self, name):
            return self.bucket.blob(name)

        def keep(self, blob, content, metadata):
            assert blob.generation > self.model.get(blob.name, (b"", None, 0))[2]
            self.model[blob.name] = content, metadata, blob.generation

        @rule(name=NAMES, content=CONTENTS, label=some.text(max_size=3), in_parts=some.booleans())
        def put(self, name, content, label, in_parts):
            blob = self.bucket.blob(name, chunk_size=256 * 1024 if in_parts else None)
            blob.metadata = {"label": label}
            blob.upload_from_string(content)
            self.keep(blob, content, {"label": label})

        @rule(name=NAMES, content=CONTENTS, expected=some.sampled_from(["none", "current", "other"]))
        def put_on_condition(self, name, content, expected):
            current = self.model.get(name, (None, None, 0))[2]
            wanted = {"none": 0, "current": current, "other": current + 1}[expected]
            blob = self.blob(name)
            if wanted == current:
                blob.upload_from_string(content, if_generation_match=wanted)
                self.keep(blob, content, None)
            else:
                with pytest.raises(exceptions.PreconditionFailed):
                    blob.upload_from_string(content, if_generation_match=wanted)

        @rule(name=NAMES)
        def get(self, name):
            if name not in self.model:
                with pytest.raises(exceptions.NotFound):
                    self.blob(name).download_as_bytes()
                return
            content, metadata, generation = self.model[name]
            found = self.bucket.get_blob(name)
            assert (found.metadata, found.size) == (metadata, len(content))
            assert generation in (None, found.generation)
            assert found.download_as_bytes(checksum="crc32c") == content

        @rule(name=NAMES, start=some.integers(-25, 25), length=some.integers(1, 25))
        def get_range(self, name, start, length):
            content = self.model.get(name, (b"",))[0]
            end = start + length - 1 if start >= 0 else None
            if -len(content) <= start < len(content):
                expected = content[start : None if end is None else end + 1]
                assert self.blob(name).download_as_bytes(start=start, end=end) == expected
            elif start >= 0:
                refusal = exceptions.RequestRangeNotSatisfiable if name in self.model else exceptions.NotFound
                with pytest.raises(refusal):
                    self.blob(name).download_as_bytes(start=start, end=end)

        @rule(name=NAMES)
        def delete(self, name):
            if name in self.model:
                self.blob(name).delete()
                del self.model[name]
            else:
                with pytest.raises(exceptions.NotFound):
                    self.blob(name).delete()

        @rule(sources=some.lists(NAMES, min_size=1, max_size=4), name=NAMES)
        def compose(self, sources, name):
            blob = self.blob(name)
            if set(sources) <= self.model.keys():
                blob.compose([self.blob(source) for source in sources])
                self.keep(blob, b"".join(self.model[source][0] for source in sources), None)
            else:
                with pytest.raises(exceptions.NotFound):
                    blob.compose([self.blob(source) for source in sources])

        @rule(source=NAMES, name=NAMES)
        def rewrite(self, source, name):
            blob = self.blob(name)
            if source in self.model:
                blob.rewrite(self.blob(source))
                self.keep(blob, *self.model[source][:2])
            else:
                with pytest.raises(exceptions.NotFound):
                    blob.rewrite(self.blob(source))

        @rule(name=NAMES, content=CONTENTS)
        def write_file(self, name, content):
            path = self.folder / name
            # A job cannot reach what has no path, nor an object whose path another one has.
            if name in NO_PATHS or (name in self.model and not path.is_file()):
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            except (FileExistsError, IsADirectoryError, NotADirectoryError):
                return
            self.model[name] = content, None, 0
            self.model[name] = content, None, self.bucket.get_blob(name).generation

        @rule(name=NAMES)
        def remove_file(self, name):
            path = self.folder / name
            if name not in NO_PATHS and path.is_file():
                path.unlink()
                del self.model[name]

        @rule(
            prefix=some.sampled_from(["", "a", "a/", "a/b", "é", "x"]),
            delimiter=some.sampled_from([None, "/", "b", "-"]),
            size=some.integers(1, 4),
        )
        def list_some(self, prefix, delimiter, size):
            listing = self.bucket.list_blobs(prefix=prefix, delimiter=delimiter, page_size=size)
            names = [blob.name for blob in listing]
            assert (names, listing.prefixes) == reference_list(self.model, prefix, delimiter)

        @invariant()
        def holds_the_same(self):
            assert {blob.name: blob.size for blob in self.bucket.list_blobs()} == {
                name: len(content) for name, (content, _, _) in self.model.items()
            }

        def teardown(self):
            for name in self.model:
                self.bucket.delete_blob(name)
            self.bucket.delete()
            assert not self.folder.exists()

    return Objects


def test_any_order_of_calls_leaves_what_a_dictionary_would_hold(tmp_path):
    with served(tmp_path) as address, connected(address) as client:
        run_state_machine_as_test(lambda: machine(tmp_path / "buckets", client)(), settings=EFFORT)
