"""What travels between node and control plane, and the signatures on it (Ed25519, RFC 8032).

Node requests carry a signature over (method, target, boot, seq, body digest). `boot` is a counter the node persists and
raises at every start, `seq` counts requests since then; the server accepts only growing (boot, seq), so a replay fails
without anybody's clock being right. Desired state is signed by the director's key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.errors import AuthError, InputError
from skerry.core.files import canonical_json, sha256_bytes, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HEADERS = ("Skerry-Node", "Skerry-Boot", "Skerry-Seq", "Skerry-Signature")
MAX_COUNTER = 1 << 53


def generate_key() -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def save_key(path: Path | str, key: Ed25519PrivateKey) -> None:
    """PEM (PKCS 8), readable by the owner only."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)


def load_key(path: Path | str) -> Ed25519PrivateKey:
    """Raises AuthError when the file is missing or holds no Ed25519 private key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise AuthError("load key", path, str(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise AuthError("load key", path, "not an Ed25519 private key")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _verify(public: str, signature: str, message: bytes, what: str) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError) as error:
        raise AuthError("verify", what, "the signature does not match") from error


def sign_document(document: Mapping[str, Any], key: Ed25519PrivateKey, key_id: str) -> dict[str, Any]:
    """An envelope whose signature covers the document's canonical JSON."""
    return {"signed": dict(document), "key_id": key_id, "signature": key.sign(canonical_json(document)).hex()}


def verify_document(envelope: Any, public: str) -> dict[str, Any]:
    """The signed document. Raises AuthError when it is malformed or the signature does not match."""
    if not isinstance(envelope, dict) or not isinstance(envelope.get("signed"), dict):
        raise AuthError("verify", "document", "not a signed envelope")
    _verify(public, str(envelope.get("signature", "")), canonical_json(envelope["signed"]), "document")
    return dict(envelope["signed"])


def _request_message(method: str, target: str, boot: int, seq: int, body: bytes) -> bytes:
    return f"skerry-request-1\n{method.upper()}\n{target}\n{boot}\n{seq}\n{sha256_bytes(body)}".encode()


def request_signature(
    key: Ed25519PrivateKey, node: str, method: str, target: str, boot: int, seq: int, body: bytes
) -> dict[str, str]:
    """The four headers; `target` is the path with its query, as sent."""
    signature = key.sign(_request_message(method, target, boot, seq, body)).hex()
    return dict(zip(HEADERS, (node, str(boot), str(seq), signature)))


def verify_request(public: str, method: str, target: str, headers: Mapping[str, str], body: bytes) -> tuple[int, int]:
    """(boot, seq) of a well-signed request; the caller checks that they grow. Raises AuthError."""
    lowered = {name.lower(): value for name, value in headers.items()}
    try:
        boot, seq = int(lowered["skerry-boot"]), int(lowered["skerry-seq"])
        signature = lowered["skerry-signature"]
    except (KeyError, ValueError) as error:
        raise AuthError("verify", "request", f"missing or malformed header {error}") from error
    if not (0 <= boot <= MAX_COUNTER and 0 <= seq <= MAX_COUNTER):
        raise AuthError("verify", "request", "counter out of range")
    _verify(public, signature, _request_message(method, target, boot, seq, body), "request")
    return boot, seq


@dataclass(frozen=True)
class Desired:
    """What the control plane wants of one node; `generation` only grows, and the node refuses a smaller one.

    `manifest_path` is the TUF target to install; `floor` is the security floor (releases with a smaller `floor` are
    refused); `quarantined` lists engine digests that must not be installed. Windows hold `window_requests` requests.
    `passed_over` says why this device was given none of the release's other bundles.
    """

    node: str
    generation: int
    release: str | None
    manifest_path: str | None
    manifest_sha256: str | None
    engine_digest: str | None
    poll_seconds: float
    window_requests: int
    quarantined: tuple[str, ...]
    floor: int
    hash_seed: int
    passed_over: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "quarantined": list(self.quarantined), "passed_over": list(self.passed_over)}

    @classmethod
    def from_json(cls, raw: Any) -> Desired:
        def text(name: str) -> str | None:
            value = raw.get(name)
            return None if value is None else str(value)[:512]

        try:
            desired = cls(
                node=str(raw["node"]), generation=int(raw["generation"]), release=text("release"),
                manifest_path=text("manifest_path"), manifest_sha256=text("manifest_sha256"),
                engine_digest=text("engine_digest"), poll_seconds=float(raw["poll_seconds"]),
                window_requests=int(raw["window_requests"]),
                quarantined=tuple(str(digest) for digest in raw["quarantined"][:10_000]),
                floor=int(raw["floor"]), hash_seed=int(raw["hash_seed"]),
                passed_over=tuple(str(reason)[:512] for reason in raw.get("passed_over", [])[:64]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("read desired state", "", f"malformed: {error!r}") from error
        if not (0.05 <= desired.poll_seconds <= 86_400 and 1 <= desired.window_requests <= 1_000_000):
            raise InputError("read desired state", "", "poll_seconds or window_requests out of range")
        return desired
