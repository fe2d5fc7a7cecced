"""What is installed only where it is asked for: PyTorch."""

import http.server
import os
import shutil
import ssl
import subprocess
import threading
import zipfile

import miniature
import pytest
import rules
import trustme
from packaging.requirements import Requirement

CPU = "torch-1.0+cpu-py3-none-any.whl"


def wheel(path):
    """Write a package of one line, called as its wheel is."""
    name, version = path.name.split("-")[:2]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}")
        about = f"{name}-{version}.dist-info"
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


class Index(http.server.BaseHTTPRequestHandler):
    """An index without packages, and a proxy behind which every host is one that has PyTorch's build for CPUs."""

    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.authority.issue_cert(self.path.partition(":")[0]).configure_cert(context)
        self.connection = context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)

    def do_GET(self):
        content = self.server.wheel if self.path.endswith(".whl") else f'<a href="/{CPU}">{CPU}</a>'.encode()
        self.send_response(200 if isinstance(self.connection, ssl.SSLSocket) else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def finish(self):
        super().finish()
        self.connection.close()  # which the server knows by its socket without TLS

    do_HEAD = do_GET  # noqa: N815 - the name is the library's

    def log_message(self, *arguments):
        pass


@pytest.fixture
def course(tmp_path):
    """A course that asks for one small package, and has an extra; both lie beside it."""
    root = miniature.make(tmp_path / "root", lesson=["1"])
    for name in ("tiny-1.0-py3-none-any.whl", "torch-1.0-py3-none-any.whl"):
        wheel(root / name)
    (root / "requirements.txt").write_text("--find-links .\ntiny\n")
    (root / "requirements-torch.txt").write_text("torch==1.0\n")
    return root


@pytest.fixture
def index(tmp_path):
    """An index, and the variables that lead uv to it alone; that it is a proxy too is not among them."""
    wheel(tmp_path / CPU)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        server.authority, server.wheel = trustme.CA(), (tmp_path / CPU).read_bytes()
        server.authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "PATH": miniature.path_with_uv(),
            "UV_NO_CONFIG": "1",
            "UV_HTTP_RETRIES": "0",
            "UV_CACHE_DIR": str(tmp_path / "cache"),  # this machine's own must not take that build for PyTorch's
            "UV_DEFAULT_INDEX": f"http://127.0.0.1:{server.server_port}/simple",
            "HTTPS_PROXY": "http://127.0.0.1:9",
        }
        server.shutdown()


def call(root, environment, *words):
    """Call the front door for the lab, which is not there, so that it ends with the set-up; return what it said."""
    run = miniature.call(root, "lab", *words, **environment)
    assert "No module named jupyterlab" in run.stderr, run.stderr
    return run.stderr


def version(root):
    """Return the version of PyTorch in a course's environment; nothing if it is not there."""
    command = [root / ".venv/bin/python", "-c", "import torch; print(torch.version)"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def test_an_extra_is_added_where_it_is_asked_for_and_stays(course, index):
    assert "torch" not in call(course, index)
    assert version(course) == ""
    said = call(course, index, "--with", "torch")
    assert "Updating" in said
    assert "what requirements-torch.txt lists" in said
    assert version(course) == "1.0"
    assert "Ready" not in call(course, index, "--with", "torch")
    assert "Ready" not in call(course, index)
    with (course / "requirements.txt").open("a") as lock:
        lock.write("# changed\n")
    assert "what requirements-torch.txt lists" in call(course, index)
    assert "Ready" not in call(course, index, "--with", "torch")


def test_what_is_no_extra_is_refused(course):
    for words in (["lab", "--with", "torhc"], ["lab", "--with"]):
        run = miniature.call(course, *words)
        assert run.returncode == 2
        assert "nothing of that name can be added; there is torch" in run.stderr
    assert not (course / ".venv").exists()


def test_where_pytorchs_own_index_can_be_reached_its_build_for_cpus_is_taken(course, index, tmp_path):
    proxy = index["UV_DEFAULT_INDEX"].removesuffix("/simple")
    said = call(course, index | {"HTTPS_PROXY": proxy, "SSL_CERT_FILE": str(tmp_path / "ca.pem")}, "--with", "torch")
    assert "does not serve" not in said
    assert version(course) == "1.0+cpu"


def test_its_lock_satisfies_setup_cfg_and_agrees_with_the_other_lock():
    def pins(name):
        lines = (miniature.COURSE / name).read_text(encoding="utf-8").splitlines()
        return [Requirement(line) for line in lines if not line.startswith(("#", "-e"))]

    found = pins("requirements-torch.txt")
    for wanted in rules.requirements(rules.settings()["options.extras_require"]["torch"]):
        versions = [next(iter(pin.specifier)).version for pin in found if pin.name == wanted.name]
        assert versions and all(version in wanted.specifier for version in versions), wanted
    others = {pin.name for pin in pins("requirements.txt")}
    both = {(pin.name, str(pin.specifier)) for pin in found if pin.name in others}
    assert both <= {(pin.name, str(pin.specifier)) for pin in pins("requirements.txt")}


def test_the_tests_of_pytorch_pass_in_an_environment_with_it(tmp_path):
    """The course's own way there: it is what makes sure that nothing here leans on a PyTorch installed by hand."""
    if shutil.disk_usage(tmp_path).free < 15e9:
        pytest.skip("PyTorch's usual build and what it brings want 10 GB of disk, and some are left to others")
    root = tmp_path / "course"
    hidden = shutil.ignore_patterns("__pycache__", ".*", "notebooks", "output", "*.egg-info")
    shutil.copytree(miniature.COURSE, root, ignore=hidden)
    row = "tests/test_parity.py::test_every_framework_has_the_losses_of_plain_jax[torch]"
    tests = ["tests/test_trainer_torch.py", row]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    run = subprocess.run(
        miniature.command("test", "--with", "torch", *tests),
        cwd=root,
        capture_output=True,
        text=True,
        env=outside | {"PATH": miniature.path_with_uv()},
    )
    shutil.rmtree(root / ".venv", ignore_errors=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
