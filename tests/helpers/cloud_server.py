"""S3, Google Cloud Storage and Azure on the loopback, as far as GET and HEAD go.

    S3       signature V4, and the token of temporary keys
    Google   a JWT that a service account has signed, or the token of a machine's account
    Azure    a shared key's signature, a shared access signature (SAS) of the container, or the
             token of a machine's account

The last two give out that token as well, as the metadata of a machine do. Written from the
protocols and beside obstore, so what they prove is that the two agree; no server of Amazon's,
Google's or Microsoft's has been asked.
"""

import base64
import contextlib
import functools
import hashlib
import hmac
import json
import os
import time
from calendar import timegm
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from triptych.tests.helpers.object_server import (
    MAX_SKEW_S,
    SECRET,
    ObjectHandler,
    ObjectServer,
    running,
)

KEY, TOKEN, REGION = "AKID-for-tests", "token-for-tests", "eu-west-1"
ACCOUNT, AZURE_KEY = "account", base64.b64encode(SECRET.encode()).decode()
EMAIL = "reader@project.iam.gserviceaccount.com"
SAS_FIELDS = "si sip spr sv sr snapshot ses rscc rscd rsce rscl rsct".split()
SIGNED_OF_CONTENT = "Encoding Language Length MD5 Type".split()
SIGNED_TOO = "Date If-Modified-Since If-Match If-None-Match If-Unmodified-Since Range".split()
"""Headers that a shared key signs, after those of Content- and in this order."""


@contextlib.contextmanager
def serving(scheme: str) -> Iterator[ObjectServer]:
    """A server of ``s3``, ``gs`` or ``az``, until the end of the block."""
    server = ObjectServer({"s3": _S3, "gs": _Google, "az": _Azure}[scheme])
    with running(server):
        yield server


def environment(scheme: str, endpoint: str, folder: Path) -> dict[str, str]:
    """What a person exports to read from a server; a key file goes to the folder."""
    if scheme == "s3":
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        return {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": REGION, **keys}
    if scheme == "az":
        keys = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
        return {"AZURE_STORAGE_ENDPOINT": endpoint, **keys}
    file = write_service_account(folder / "service_account.json", google_key())
    return {"GOOGLE_BASE_URL": endpoint, "GOOGLE_SERVICE_ACCOUNT": str(file)}


def keys_of_this_machine() -> list[str]:
    """The names of variables that a test unsets: they are none of its."""
    return [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]


@functools.cache
def google_key() -> RSAPrivateKey:
    """Of the service account."""
    return new_google_key()


def new_google_key() -> RSAPrivateKey:
    """Of nobody that is known."""
    return generate_private_key(65537, 2048)


def write_service_account(file: Path, key: RSAPrivateKey) -> Path:
    """The file that Google's console offers with a new key."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {"type": "service_account", "client_email": EMAIL, "private_key_id": "1"}
    file.write_text(json.dumps({**account, "private_key": pem}))
    return file


def azure_sas(container: str, expires: str = "2099-01-01T00:00:00Z") -> str:
    """A shared access signature to read a container."""
    fields = {"sp": "r", "se": expires, "spr": "https,http", "sv": "2022-11-02", "sr": "c"}
    return urlencode({**fields, "sig": _sas_signature(container, fields)})


def _sas_signature(container: str, fields: dict[str, str]) -> str:
    place = f"/blob/{ACCOUNT}/{container}"
    rights = [fields.get(name, "") for name in ("sp", "st", "se")]
    return _azure_hmac([*rights, place, *(fields.get(name, "") for name in SAS_FIELDS)])


def _azure_hmac(lines: list[str]) -> str:
    text = "\n".join(lines).encode()
    return base64.b64encode(hmac.digest(SECRET.encode(), text, "sha256")).decode()


class _S3(ObjectHandler):
    def problem(self) -> tuple[int, str] | None:
        date, said = self.headers["x-amz-date"], self.headers["Authorization"]
        if abs(timegm(time.strptime(date, "%Y%m%dT%H%M%SZ")) - time.time()) > MAX_SKEW_S:
            return 403, "RequestTimeTooSkewed"
        if self.headers.get("x-amz-security-token", TOKEN) != TOKEN:
            return 400, "ExpiredToken"
        scope = f"{date[:8]}/{REGION}/s3/aws4_request"
        if f"Credential={KEY}/{scope}," not in said:
            return 403, "InvalidAccessKeyId"
        signed = said.partition("SignedHeaders=")[2].partition(",")[0]
        headers = "".join(f"{name}:{self.headers[name]}\n" for name in signed.split(";"))
        hashed = self.headers["x-amz-content-sha256"]
        request = f"{self.command}\n{self.path}\n\n{headers}\n{signed}\n{hashed}"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{digest}"
        key = f"AWS4{SECRET}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        wanted = hmac.digest(key, text.encode(), "sha256").hex()
        return None if said.endswith(f"Signature={wanted}") else (403, "SignatureDoesNotMatch")


class _Google(ObjectHandler):
    def account_token(self) -> dict[str, object] | None:
        place = "/computeMetadata/v1/instance/service-accounts/default/token?"
        if self.path.startswith(place) and self.headers["Metadata-Flavor"] == "Google":
            return {"access_token": TOKEN, "expires_in": 3599, "token_type": "Bearer"}
        return None

    def problem(self) -> tuple[int, str] | None:
        token = self.headers["Authorization"].removeprefix("Bearer ")
        return None if token == TOKEN or _is_signed(token) else (401, "AuthenticationRequired")


def _is_signed(token: str) -> bool:
    """By the service account: RFC 7519, and Google's rules for access without a token server."""
    head, claims, signature = (base64.urlsafe_b64decode(f"{part}==") for part in token.split("."))
    try:
        text = token.rpartition(".")[0].encode()
        google_key().public_key().verify(signature, text, PKCS1v15(), SHA256())
    except InvalidSignature:
        return False
    told, now = json.loads(claims), time.time()
    return (
        json.loads(head)["alg"] == "RS256"
        and told["iss"] == told["sub"] == EMAIL
        and told["iat"] - 60 < now < told["exp"] <= told["iat"] + 3600
        and told["scope"] == "https://www.googleapis.com/auth/cloud-platform"
    )


class _Azure(ObjectHandler):
    no_such_object = "BlobNotFound"

    def account_token(self) -> dict[str, object] | None:
        is_asked = self.path.startswith("/metadata/identity/oauth2/token?")
        if is_asked and self.headers["Metadata"] == "true":
            times = {"expires_in": "3599", "expires_on": str(int(time.time()) + 3599)}
            return {"access_token": TOKEN, "token_type": "Bearer", **times}
        return None

    def problem(self) -> tuple[int, str] | None:
        if "?" in self.path:
            is_known = self._has_good_sas()
        else:
            is_known = self.headers["Authorization"] == f"Bearer {TOKEN}" or self._is_signed()
        return None if is_known else (403, "AuthenticationFailed")

    def _has_good_sas(self) -> bool:
        parts = urlsplit(self.path)
        fields = {name: value for name, [value] in parse_qs(parts.query).items()}
        signature = fields.pop("sig")
        expires_s = timegm(time.strptime(fields["se"], "%Y-%m-%dT%H:%M:%SZ"))
        return time.time() < expires_s and signature == _sas_signature(
            parts.path.split("/")[1], fields
        )

    def _is_signed(self) -> bool:
        date = self.headers["Date"]
        if abs(parsedate_to_datetime(date).timestamp() - time.time()) > MAX_SKEW_S:
            return False
        content = [self.headers.get(f"Content-{name}", "") for name in SIGNED_OF_CONTENT]
        content[2] = content[2].lstrip("0")
        found = [self.headers.get(name, "") for name in SIGNED_TOO]
        named = sorted((name.lower(), value) for name, value in self.headers.items())
        own = [f"{name}:{value}" for name, value in named if name.startswith("x-ms-")]
        signature = _azure_hmac([self.command, *content, *found, *own, f"/{ACCOUNT}{self.path}"])
        return self.headers["Authorization"] == f"SharedKey {ACCOUNT}:{signature}"
