"""The local cloud lets no one in but its own, and stands in nobody's way."""

import base64
import json
import os
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time

import psutil
import pytest

from helpers.local import door
from helpers.local.identity import Identity


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return one local cloud for the tests that only ask."""
    from conftest import OwnCloud

    from helpers.local import client

    found = OwnCloud(tmp_path_factory.mktemp("door") / "cloud")
    yield found
    client.reset(found.place)


def forged(tmp_path, project="local-project"):
    """Return a token that another folder's service account signed, with the same names in it."""
    return Identity(tmp_path / "other", project).token()


def unsigned(claims):
    """Return a token without a signature."""
    parts = ({"alg": "none", "typ": "JWT"}, claims)
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, ""])


SERVICES = (
    ("us-central1-aiplatform.googleapis.com", "/v1/projects/local-project/locations/us-central1/models"),
    ("storage.googleapis.com", "/storage/v1/b?project=local-project"),
    ("bigquery.googleapis.com", "/bigquery/v2/projects/local-project/datasets"),
    ("cloudresourcemanager.googleapis.com", "/v3/projects/local-project"),
)


@pytest.mark.parametrize(("host", "path"), SERVICES)
def test_rest_takes_only_tokens_of_its_own(shared, tmp_path, host, path):
    assert shared.call("GET", path, host=host).status_code == 200
    mail = Identity(shared.place / "identity", "local-project").email
    strangers = {
        "none": "",
        "a word": "local",
        "another key": forged(tmp_path),
        "no signature": unsigned({"iss": mail, "iat": int(time.time()), "exp": int(time.time()) + 3600}),
        "expired": Identity(shared.place / "identity", "local-project").token(seconds=-60),
    }
    for name, token in strangers.items():
        refused = shared.call("GET", path, host=host, token=token)
        assert refused.status_code == 401, name
        assert refused.json()["error"]["status"] == "UNAUTHENTICATED"
    assert shared.call("GET", path, host=host).status_code == 200


def test_grpc_takes_only_tokens_of_its_own(shared, tmp_path):
    """In a process of its own: gRPC keeps the certificates that it trusts for good."""
    source = f"""
        import grpc, sys
        from google.cloud.aiplatform_v1 import types
        roots = open({str(shared.place / "identity/ca.pem")!r}, "rb").read()
        channel = grpc.secure_channel("us-central1-aiplatform.googleapis.com:443", grpc.ssl_channel_credentials(roots))
        request = types.ListModelsRequest(parent="projects/local-project/locations/us-central1")
        call = channel.unary_unary("/google.cloud.aiplatform.v1.ModelService/ListModels",
            types.ListModelsRequest.serialize, types.ListModelsResponse.deserialize)
        for token in sys.argv[1:]:
            try:
                call(request, metadata=[("authorization", "Bearer " + token)])
                print("OK")
            except grpc.RpcError as error:
                print(error.code().name)
    """
    lines = "\n".join(
        line.strip() if line.startswith(" " * 8) and not line.startswith(" " * 9) else line[8:]
        for line in source.splitlines()
    )
    proxy = f"http://127.0.0.1:{shared.address['port']}"
    done = subprocess.run(
        [sys.executable, "-c", lines, shared.token(), "local", forged(tmp_path), ""],
        env=os.environ | {"grpc_proxy": proxy},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["OK", "UNAUTHENTICATED", "UNAUTHENTICATED", "UNAUTHENTICATED"]


def test_the_token_endpoint_answers_only_its_own_key(shared, tmp_path):
    def exchange(assertion):
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion}
        return shared.call("POST", "/token", host="oauth2.googleapis.com", token="", data=form)

    assert exchange(forged(tmp_path)).status_code == 400
    answer = exchange(shared.token())
    token = answer.json()["access_token"]
    assert shared.call("GET", SERVICES[0][1], host=SERVICES[0][0], token=token).status_code == 200


def test_everything_listens_on_loopback_alone(shared):
    server = psutil.Process(shared.address["pid"])
    listening = [one.laddr.ip for one in server.net_connections() if one.status == psutil.CONN_LISTEN]
    assert len(listening) >= 3
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_keys_are_readable_by_their_owner_only(shared):
    for name in ("identity", "identity/ca-key.pem", "identity/service-account.json", "state.sqlite"):
        assert stat.S_IMODE((shared.place / name).stat().st_mode) & 0o077 == 0, name


@pytest.mark.parametrize(
    "uri",
    ["gs://../identity", "gs://a/../../identity", "gs:///etc", "/etc/passwd", "gs://.hidden/x", "gs://bucket/..%2f"],
)
def test_artifacts_cannot_lie_outside_of_the_buckets(shared, uri):
    shared.call("POST", "/storage/v1/b?project=local-project", host="storage.googleapis.com", json={"name": "bucket"})
    image = "us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest"
    model = {"displayName": "m", "artifactUri": uri, "containerSpec": {"imageUri": image}}
    answer = shared.call("POST", f"/v1/{shared.region}/models:upload", json={"model": model})
    error = answer.json().get("error")
    assert error, answer.text
    assert error["code"] in (3, 9, 400, 404), error


def test_a_link_in_a_bucket_does_not_lead_out_of_it(shared):
    shared.call("POST", "/storage/v1/b?project=local-project", host="storage.googleapis.com", json={"name": "links"})
    (shared.place / "buckets/links/keys").symlink_to(shared.place / "identity")
    path = "/storage/v1/b/links/o/keys%2Fservice-account.json?alt=media"
    assert shared.call("GET", path, host="storage.googleapis.com").status_code == 404
    image = "us-docker.pkg.dev/vertex-ai/prediction/sklearn-cpu.1-6:latest"
    model = {"displayName": "m", "artifactUri": "gs://links/keys", "containerSpec": {"imageUri": image}}
    assert "error" in shared.call("POST", f"/v1/{shared.region}/models:upload", json={"model": model}).json()


def test_an_unknown_service_says_that_it_is_not_here(shared):
    answer = shared.call("POST", "/v2/projects/p/translate", host="translation.googleapis.com", json={})
    assert answer.status_code == 501
    assert "not part of the local cloud" in answer.json()["error"]["message"]


# Other hosts


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, in capitals."""

    def handle(self):
        """Answer one message."""
        self.request.sendall(self.request.recv(100).upper())


class Before(socketserver.BaseRequestHandler):
    """The proxy that was there before: notes what is asked for and opens a tunnel to a fixed place."""

    def handle(self):
        """Answer one CONNECT."""
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(1)
        self.server.heads.append(head.decode())
        with socket.create_connection(self.server.target) as target:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            door.carry(self.request, target)


@pytest.fixture
def tcp():
    """Return a function that serves a handler on loopback."""
    servers = []

    def serve(handler):
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(port, head, message):
    """Open a tunnel at a proxy, send a message through it and return the answers of the proxy and of the far side."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head)
        answer = connection.recv(1000)
        if b" 200 " not in answer.split(b"\r\n")[0]:
            return answer, b""
        connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
        return answer, connection.recv(1000)


def test_another_host_is_reached_as_it_is(shared, tcp):
    echo = tcp(Echo).server_address
    head = f"CONNECT 127.0.0.1:{echo[1]} HTTP/1.1\r\n\r\n".encode()
    assert ask(shared.address["port"], head, b"hello")[1] == b"HELLO"


def test_another_host_is_reached_through_the_proxy_that_was_there_before(tcp):
    echo, before = tcp(Echo), tcp(Before)
    before.target, before.heads = echo.server_address, []
    proxy = f"http://user:secret@127.0.0.1:{before.server_address[1]}"
    with door.Door(0, 1, 1, proxy) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        head = b"CONNECT pypi.example:443 HTTP/1.1\r\n\r\n"
        assert ask(opened.server_address[1], head, b"hello")[1] == b"HELLO"
        opened.shutdown()
    assert before.heads[0].startswith("CONNECT pypi.example:443 HTTP/1.1")
    assert "Proxy-Authorization: Basic " + base64.b64encode(b"user:secret").decode() in before.heads[0]


def test_a_host_that_is_not_there_and_a_broken_request_get_an_answer(shared):
    port = shared.address["port"]
    nowhere = ask(port, b"CONNECT nowhere.invalid:443 HTTP/1.1\r\n\r\n", b"")[0]
    assert nowhere.startswith(b"HTTP/1.1 502")
    assert ask(port, b"GET / HTTP/1.1\r\n\r\n", b"")[0].startswith(b"HTTP/1.1 400")
    assert ask(port, b"CONNECT nonsense HTTP/1.1\r\n\r\n", b"")[0].startswith(b"HTTP/1.1 400")
    shared.vertex("GET", "models")


def test_what_a_client_offers_is_read_from_its_first_message():
    import ssl

    for offered in (["h2"], ["h2", "http/1.1"], ["http/1.1"], []):
        context = ssl.create_default_context()
        if offered:
            context.set_alpn_protocols(offered)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            context.wrap_bio(incoming, outgoing, server_hostname="x.googleapis.com").do_handshake()
        hello = outgoing.read()[5:]
        assert door.alpn(hello) == [name.encode() for name in offered]
        assert door.alpn(hello[:40]) == []
