"""What tests of the cloud share: local clouds of their own, with nothing in them."""

import importlib.util
import os
from pathlib import Path

import pytest

from helpers import environment
from helpers.local import client

# What needs PyTorch is run by test_extras.py, in an environment that has it.
collect_ignore = [] if importlib.util.find_spec("torch") else ["test_trainer_torch.py"]


@pytest.fixture(scope="session")
def cloud():
    """Lead this process to a fresh local cloud; gone at the end, with all that it ran."""
    before = os.environ.pop("LOCAL_CLOUD_FOLDER", None)
    with environment.fresh_local_cloud():
        try:
            yield environment.connect()
        finally:
            environment.disconnect()
    if before is not None:
        os.environ["LOCAL_CLOUD_FOLDER"] = before


class OwnCloud:
    """A local cloud that this process is not led to: it is asked over REST, at its door."""

    region = "projects/local-project/locations/us-central1"

    def __init__(self, place: Path):
        """Start a server for a folder."""
        self.place = place
        self.start()

    def start(self):
        """Start or join the server; return its address."""
        self.address = client.wait(self.place, client.start(self.place))
        return self.address

    def token(self):
        """Return a token of the folder's service account."""
        from google.oauth2 import service_account

        path = str(self.place / "identity/service-account.json")
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        credentials = service_account.Credentials.from_service_account_file(path, scopes=scopes)
        return credentials.with_always_use_jwt_access(True)._make_authorization_grant_assertion().decode()

    def call(self, verb, path, host="us-central1-aiplatform.googleapis.com", token=None, **options):
        """Return the response to a request; `token` is an own one unless it is given."""
        import requests

        with requests.Session() as session:
            session.trust_env = False
            return session.request(
                verb,
                f"https://{host}{path}",
                headers={"Authorization": f"Bearer {self.token() if token is None else token}"},
                proxies={"https": f"http://127.0.0.1:{self.address['port']}"},
                verify=str(self.place / "identity/ca.pem"),
                timeout=60,
                **options,
            )

    def vertex(self, verb, path, **options):
        """Return the JSON answer of a call to Vertex AI in the region; fail if it is an error."""
        response = self.call(verb, f"/v1/{self.region}/{path}", **options)
        assert response.ok, response.text
        return response.json()


@pytest.fixture
def own_cloud(tmp_path):
    """Return a local cloud in a folder of its own."""
    found = OwnCloud(tmp_path / "cloud")
    yield found
    client.reset(found.place)
