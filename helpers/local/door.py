"""The one port that clients are led to: an HTTPS proxy on loopback, at which Google's hosts end and all others pass.

A client asks the proxy for a tunnel (CONNECT). A tunnel to a host of Google Cloud leads to this machine's own servers:
TLS that offers only HTTP/2 is gRPC, everything else REST. Any other host is reached as it would be without this proxy,
through the proxy that was there before if there was one.
"""

import contextlib
import logging
import os
import socket
import socketserver
import threading
import urllib.request
from base64 import b64encode
from urllib.parse import unquote, urlsplit

log = logging.getLogger(__name__)

LOCAL_DOMAINS = (".googleapis.com", ".prediction.vertexai.goog")
PASSED_HOSTS = ("fonts.googleapis.com", "ajax.googleapis.com")  # what pages load, and no API of Google Cloud
HEAD_BYTES = 65536
CONNECT_SECONDS = 20


def is_local(host: str) -> bool:
    """Say whether requests to a host are answered here."""
    return host.endswith(LOCAL_DOMAINS) and host not in PASSED_HOSTS


class Door(socketserver.ThreadingTCPServer):
    """The proxy. Two threads carry each tunnel, which costs less time a message than an event loop does."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, grpc_port: int, rest_port: int, proxy: str | None):
        """Listen on a port of loopback, any free one for 0; `proxy` is the URL of the proxy that was there before."""
        self.grpc_port, self.rest_port, self.proxy = grpc_port, rest_port, proxy
        super().__init__(("127.0.0.1", port), Tunnel)

    def handle_error(self, request, client_address):
        """Note what broke a tunnel; clients come and go as they like."""
        log.debug("a tunnel from %s broke", client_address, exc_info=True)


class Tunnel(socketserver.BaseRequestHandler):
    """One client's connection."""

    def handle(self):
        """Open the tunnel that the client asks for and carry it."""
        self.request.settimeout(CONNECT_SECONDS)
        host, port = self.read_head()
        if not host:
            return self.answer("400 Bad Request", "This is the local cloud's proxy: it opens tunnels (CONNECT) only.")
        try:
            if is_local(host):
                self.answer("200 Connection established")
                ours = self.server.grpc_port if offers_only_http2(self.request) else self.server.rest_port
                target = socket.create_connection(("127.0.0.1", ours))
            else:
                target = self.outside(host, port)
                self.answer("200 Connection established")
        except OSError as error:
            return self.answer("502 Bad Gateway", f"{host} cannot be reached: {error}")
        with target:
            carry(self.request, target)
        return None

    def read_head(self) -> tuple[str, int]:
        """Return the host and port of a CONNECT request; an empty host for anything else."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) < HEAD_BYTES:
            # A byte at a time: what follows the head belongs to the tunnel.
            if not (byte := self.request.recv(1)):
                return "", 0
            head += byte
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split()
        if len(words) != 3 or words[0] != "CONNECT":
            return "", 0
        host, _, port = words[1].rpartition(":")
        return (host.strip("[]").lower(), int(port)) if port.isdigit() else ("", 0)

    def answer(self, status: str, text: str = ""):
        """Send the proxy's own answer."""
        body = text.encode()
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        with contextlib.suppress(OSError):
            self.request.sendall(f"HTTP/1.1 {status}\r\n{length}\r\n".encode() + body)

    def outside(self, host: str, port: int) -> socket.socket:
        """Connect to a host that is not ours, through the proxy that was there before if it is meant for this host."""
        if not self.server.proxy or urllib.request.proxy_bypass_environment(host, {"no": no_proxy()}):
            return socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        before = urlsplit(self.server.proxy)
        if before.scheme != "http":
            raise OSError(f"{before.scheme}://{before.hostname} is a proxy that cannot be chained; expected http://")
        target = socket.create_connection((before.hostname, before.port or 80), timeout=CONNECT_SECONDS)
        lines = [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]
        if before.username:
            pair = f"{unquote(before.username)}:{unquote(before.password or '')}".encode()
            lines.append(f"Proxy-Authorization: Basic {b64encode(pair).decode()}")
        target.sendall("\r\n".join([*lines, "", ""]).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            if not (byte := target.recv(1)):
                break
            head += byte
        if head.split(b" ")[1:2] != [b"200"]:
            target.close()
            raise OSError(f"the proxy {before.hostname} answered {head.splitlines()[:1]}")
        return target


def no_proxy() -> str:
    """Return the hosts that a proxy is not meant for, as the environment has it."""
    return os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""


def carry(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes between two connections until both sides have ended."""
    for end in (one, other):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    back = threading.Thread(target=pump, args=(other, one), daemon=True)
    back.start()
    pump(one, other)
    back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until the source ends, and tell the target so."""
    buffer = bytearray(1 << 18)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            if hasattr(socket, "TCP_QUICKACK"):
                # A client that leaves Nagle's algorithm on waits for this before it sends the rest of a request.
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            target.sendall(view[:count])
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)


def offers_only_http2(connection: socket.socket) -> bool:
    """Say whether the TLS client that speaks next offers HTTP/2 and no older HTTP, as gRPC does; consume nothing."""
    return alpn(peek_hello(connection)) == [b"h2"]


def peek_hello(connection: socket.socket) -> bytes:
    """Return the first TLS record of a connection, and leave it there to be read."""
    header = connection.recv(5, socket.MSG_PEEK | socket.MSG_WAITALL)
    if len(header) < 5 or header[0] != 22:
        return b""
    length = 5 + int.from_bytes(header[3:5])
    return connection.recv(length, socket.MSG_PEEK | socket.MSG_WAITALL)[5:]


def alpn(hello: bytes) -> list[bytes]:
    """Return the protocols that a TLS ClientHello offers (RFC 8446, section 4.1.2; RFC 7301)."""
    try:
        place = 4 + 2 + 32  # type and length, version, random
        place += 1 + hello[place]  # session
        place += 2 + int.from_bytes(hello[place : place + 2])  # ciphers
        place += 1 + hello[place]  # compressions
        place += 2  # length of all extensions
        while place + 4 <= len(hello):
            kind, length = int.from_bytes(hello[place : place + 2]), int.from_bytes(hello[place + 2 : place + 4])
            place += 4
            if kind == 16:
                names, at, end = [], place + 2, place + length
                while at < end:
                    names.append(hello[at + 1 : at + 1 + hello[at]])
                    at += 1 + hello[at]
                return names
            place += length
    except IndexError:
        pass
    return []
