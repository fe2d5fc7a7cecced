"""Who may enter: a certificate authority and a service account of this folder's own, and the tokens made with it.

The keys are made once for each folder and never leave it. A token is good if the service account's key signed it and it
has not expired: the SDKs sign theirs themselves, others come from the token endpoint, which signs with the same key.
"""

import functools
import hashlib
import json
import secrets
import ssl
import time
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import crypt, jwt

from helpers.local import TENANT_PROJECT

TOKEN_SECONDS = 3600
TOKEN_URI = "https://oauth2.googleapis.com/token"


class Identity:
    """The keys in a folder, made if they are not there."""

    def __init__(self, folder: Path, project: str):
        """Read or make the keys; `folder` is created for the owner alone."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self.account_file = folder / "service-account.json"
        self.authority_file = folder / "ca.pem"
        key_file = folder / "ca-key.pem"
        if not self.account_file.exists():
            # Written last, so that a start that was interrupted is done again.
            authority = trustme.CA(organization_name="Local cloud of this folder")
            write_secret(key_file, authority.private_key_pem.bytes())
            authority.cert_pem.write_to_path(self.authority_file)
            write_secret(self.account_file, json.dumps(_service_account(project), indent=1).encode())
        self._authority = trustme.CA.from_pem(self.authority_file.read_bytes(), key_file.read_bytes())
        account = json.loads(self.account_file.read_text())
        self.email = account["client_email"]
        self.tenant_file = folder / "tenant-account.json"  # the same key, as a job finds it
        write_secret(self.tenant_file, json.dumps(account | {"project_id": TENANT_PROJECT}, indent=1).encode())
        self._signer = crypt.RSASigner.from_service_account_info(account)
        private = serialization.load_pem_private_key(account["private_key"].encode(), None)
        self._public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._good: dict[bytes, float] = {}  # the digests of tokens that were checked, and when they expire

    def token(self, seconds: int = TOKEN_SECONDS) -> str:
        """Return an access token that is good for some seconds."""
        now = int(time.time())
        claims = {"iss": self.email, "sub": self.email, "iat": now, "exp": now + seconds, "jti": secrets.token_hex(8)}
        return jwt.encode(self._signer, claims).decode()

    def allows(self, authorization: str) -> bool:
        """Say whether an Authorization header holds a token of this folder's service account."""
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and self.knows(token.strip())

    def knows(self, token: str) -> bool:
        """Say whether this folder's service account signed a token, and it has not expired."""
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        if self._good.get(digest, 0) > time.time():
            return True
        try:
            claims = jwt.decode(token, certs=self._public, clock_skew_in_seconds=10)
        except (ValueError, UnicodeError):
            return False
        if claims.get("iss") != self.email:
            return False
        if len(self._good) > 1000:
            self._good.clear()
        self._good[digest] = claims["exp"]
        return True

    def exchange(self, assertion: str) -> dict | None:
        """Return what Google's token endpoint answers to a signed assertion, or None for one of somebody else."""
        if not self.knows(assertion):
            return None
        return {"access_token": self.token(), "expires_in": TOKEN_SECONDS, "token_type": "Bearer"}

    def certificate(self, *hosts: str) -> tuple[bytes, bytes]:
        """Return the key and the certificate chain, as PEM, with which this machine may speak for hosts."""
        leaf = self._authority.issue_cert(*hosts)
        return leaf.private_key_pem.bytes(), b"".join(part.bytes() for part in leaf.cert_chain_pems)

    def tls(self) -> ssl.SSLContext:
        """Return the server side of TLS for whatever host of Google's a client asks for."""

        @functools.lru_cache(maxsize=256)
        def context_for(host):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.set_alpn_protocols(["http/1.1"])
            self._authority.issue_cert(host).configure_cert(context)
            return context

        def choose(connection, host, _):
            connection.context = context_for(host or "localhost")

        context = context_for("localhost")
        context.sni_callback = choose
        return context


def _service_account(project: str) -> dict:
    """Return the content of a service account's key file, with a key that was just made."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = f"local@{project}.iam.gserviceaccount.com"
    return {
        "type": "service_account",
        "project_id": project,
        "private_key_id": secrets.token_hex(20),
        "private_key": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        "client_email": name,
        "client_id": str(secrets.randbelow(10**20)),
        "auth_uri": "https://accounts.google.com/o/oauth2/auth",
        "token_uri": TOKEN_URI,
        "universe_domain": "googleapis.com",
    }


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that nobody but its owner can read, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    partial.replace(path)
