"""Public objects that the local cloud does not hold are fetched from the real service, without its token."""

import http.server
import os
import ssl
import threading

import pytest
import trustme

from helpers.local import client


class Real(http.server.BaseHTTPRequestHandler):
    """Cloud Storage as this test needs it, behind a proxy: one public object, and a note of what was asked."""

    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):
        """Open the tunnel, at whose end this server itself answers."""
        self.send_response(200)
        self.end_headers()
        with self.server.tls.wrap_socket(self.connection, server_side=True) as secure:
            type(self)(secure, self.client_address, self.server)
        self.close_connection = True

    def do_GET(self):
        """Answer with the object, or with what is not there."""
        self.server.asked.append((self.path, dict(self.headers)))
        found = self.path.startswith("/public/weights.h5")
        self.send_response(200 if found else 404)
        body = b"weights" if found else b"no"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def real(tmp_path):
    """Return a proxy that leads to a Cloud Storage of this test's."""
    authority = trustme.CA()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Real)
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("storage.googleapis.com").configure_cert(server.tls)
    server.asked = []
    server.authority = tmp_path / "real-ca.pem"
    authority.cert_pem.write_to_path(server.authority)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_public_object_comes_from_google_and_the_token_stays_here(real, tmp_path, monkeypatch):
    from conftest import OwnCloud

    outside = client.original()  # an earlier test may have led this process to its own local cloud
    for name in set(os.environ) | set(outside):
        if name not in outside or name.lower() in ("https_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, outside[name])
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{real.server_address[1]}")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(real.authority))
    cloud = OwnCloud(tmp_path / "cloud")
    host = "storage.googleapis.com"
    try:
        assert cloud.call("GET", "/public/weights.h5", host=host).content == b"weights"
        assert cloud.call("GET", "/public/secret.h5", host=host).status_code == 404
        cloud.call("POST", "/storage/v1/b?project=local-project", host=host, json={"name": "public"})
        assert cloud.call("GET", "/public/weights.h5", host=host).status_code == 404, "a bucket that is here is ours"
    finally:
        client.reset(cloud.place)
    assert [path for path, _ in real.asked] == ["/public/weights.h5", "/public/secret.h5"]
    assert not any(name.lower() == "authorization" for _, headers in real.asked for name in headers)


def test_without_a_network_it_says_where_it_looked(own_cloud):
    answer = own_cloud.call("GET", "/storage/v1/b/no-such-bucket/o/a?alt=media", host="storage.googleapis.com")
    assert answer.status_code == 404
    assert "The specified bucket does not exist" in answer.text
