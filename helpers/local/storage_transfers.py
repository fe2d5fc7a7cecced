"""Bodies that stream: uploads in one request or in several, downloads in ranges."""

import gzip
import re
from collections.abc import AsyncIterator, Iterator
from email.parser import BytesParser
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from helpers.local.buckets import BLOCK, Draft, StorageError
from helpers.local.storage_resources import parse

IDENTITY = b"\r\nTransfer-Encoding: identity"


class Http(HttpToolsProtocol):
    """HTTP/1.1 as TensorFlow speaks it, which parsers of today refuse.

    It sends a length beside `Transfer-Encoding: chunked`, and an empty body with `Transfer-Encoding: identity`, which
    once was the word for a body as it is.
    """

    def __init__(self, *arguments, **options):
        """Take a length that does not count."""
        super().__init__(*arguments, **options)
        self.parser.set_dangerous_leniencies(lenient_chunked_length=True, lenient_data_after_close=True)

    def data_received(self, data: bytes) -> None:
        """Read on, without the word where a head comes."""
        if IDENTITY in data and (self.cycle is None or self.cycle.response_complete):
            head, end, body = data.partition(b"\r\n\r\n")
            data = head.replace(IDENTITY, b"") + end + body
        super().data_received(data)


async def blocks(request: Request) -> AsyncIterator[bytes]:
    """Yield the body of a request in large pieces: all that came, even if the client then goes away."""
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size >= BLOCK:
                yield b"".join(chunks)
                chunks, size = [], 0
    except ClientDisconnect:
        yield b"".join(chunks)
        raise
    if chunks:
        yield b"".join(chunks)


async def related(request: Request) -> AsyncIterator:
    """Yield the resource in a multipart/related body, then the content that follows it, in pieces."""
    malformed = StorageError(400, "badRequest", "Malformed multipart body: expected JSON, then media, then an end.")
    found = re.search(r'boundary="?([^";]+)', request.headers.get("content-type", ""))
    mark = b"--" + found[1].encode() if found else b"--"
    # Lines end as the client writes them: with CR LF, or with LF alone.
    line = re.escape(mark)
    head = re.compile(rb"\s*%b(\r?\n).*?\r?\n\r?\n(.*?)\r?\n%b(\r?\n.*?)\r?\n\r?\n" % (line, line), re.DOTALL)
    source, data, start = blocks(request), b"", None
    while start is None:
        block = await anext(source, None)
        if block is None or len(data) > BLOCK:
            raise malformed
        data += block
        start = head.match(data)
    media = BytesParser().parsebytes(start[3].lstrip())
    yield {"contentType": media.get("content-type")} | parse(start[2])
    data, end = data[start.end() :], start[1] + mark
    while (place := data.find(end)) < 0:
        yield data[: -len(end)]
        block = await anext(source, None)
        if block is None:
            raise malformed
        data = data[-len(end) :] + block
    yield data[:place]
    async for _ in source:
        pass


def content_range(header: str | None) -> tuple[int | None, int | None, bool]:
    """Return the first byte that comes, the size of all, and whether the end comes now; None for what is not said."""
    if header is None:
        return 0, None, True
    found = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)", header)
    if not found:
        raise StorageError(400, "invalid", f"Failed to parse Content-Range header: {header!r}")
    first, total = (int(text) if text and text != "*" else None for text in found.groups())
    return first, total, False


class Cased(bytes):
    """The name of a header with its capitals, which servers send in lower case otherwise; TensorFlow looks for them."""

    def lower(self) -> "Cased":
        """Stay as it is."""
        return self


def bare(status: int, headers: dict[str, str]) -> Response:
    """Return a response without a body, whose headers keep their capitals."""
    response = Response(None, status)
    response.raw_headers += [(Cased(name.encode()), value.encode()) for name, value in headers.items()]
    return response


async def take(request: Request, draft: Draft, first: int) -> None:
    """Append a body that starts at byte `first` of a draft; what the draft has already is passed over."""
    known = draft.size - first
    async for data in blocks(request):
        if news := data[known:]:
            await run_in_threadpool(draft.write, news)
        known = max(0, known - len(data))


def verify(draft: Draft, body: dict, headers: Headers) -> None:
    """Raise when a checksum that came with an upload is not that of its content."""
    given = re.findall(r"(crc32c|md5)=([^\s,]+)", headers.get("x-goog-hash", ""))
    given += [("crc32c", body.get("crc32c")), ("md5", body.get("md5Hash")), ("md5", headers.get("content-md5"))]
    for kind, value in given:
        actual = draft.checksums()[kind]
        if value and value != actual:
            word = {"crc32c": "CRC32C", "md5": "MD5 hash"}[kind]
            message = f'Provided {word} "{value}" doesn\'t match calculated {word} "{actual}".'
            raise StorageError(400, "invalid", message)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the start and end of what a Range header asks for, None for everything; raise if there is no such byte."""
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header or "")
    if not found or not (found[1] or found[2]):
        return None
    if found[1]:
        start, end = int(found[1]), int(found[2]) + 1 if found[2] else size
    else:
        start, end = max(0, size - int(found[2])), size
    if start >= size:
        content = {"Content-Range": f"bytes */{size}"}
        raise StorageError(416, "requestedRangeNotSatisfiable", "Request range not satisfiable", content)
    return (start, min(end, size)) if start < end else None


def pieces(file: BinaryIO, start: int, length: float, unzip: bool) -> Iterator[bytes]:
    """Yield a part of an open file, and close it."""
    with file:
        source = gzip.GzipFile(fileobj=file) if unzip else file
        source.seek(start)
        while length > 0 and (data := source.read(min(BLOCK, length))):
            yield data
            length -= len(data)
