"""TLS of a worker: certificate and key, checked before an engine is loaded for them."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from skerry.core.errors import InputError, UsageError

log = logging.getLogger("skerry.tls")
READ = "read TLS files"
FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class TlsFiles:
    """`cert` holds the server's certificate and behind it those that vouch for it, `key` its private key; both PEM."""

    cert: Path
    key: Path

    @classmethod
    def of(cls, cert: Path | None, key: Path | None) -> TlsFiles | None:
        """None without both. Raises UsageError where one is missing."""
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            raise UsageError("serve", "", "--tls-cert and --tls-key go together", "give both")
        return cls(cert, key)

    def check(self) -> None:
        """Raises InputError: a file is missing, is no PEM, is encrypted, or the key is of another certificate."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        cert, key = _read(self.cert), _read(self.key)
        try:
            first = x509.load_pem_x509_certificates(cert)[0]
        except (ValueError, IndexError) as error:
            raise InputError(
                READ, self.cert, "it holds no PEM certificate", "the file with BEGIN CERTIFICATE"
            ) from error
        try:
            private = load_pem_private_key(key, None)
        except TypeError as error:
            hint = f"openssl pkey -in {self.key} -out plain.key, readable by the server alone"
            raise InputError(
                READ, self.key, "the key is encrypted, and nobody is there to type its passphrase", hint
            ) from error
        except Exception as error:  # its own classes for algorithms it has not, ValueError for what is no key
            raise InputError(
                READ, self.key, "it holds no PEM private key", "the file with BEGIN PRIVATE KEY"
            ) from error
        if private.public_key() != first.public_key():
            raise InputError(READ, self.key, f"it is not the key of {self.cert}", "the two that belong together")
        if first.not_valid_after_utc < datetime.now(UTC):
            log.warning("the certificate in %s expired on %s", self.cert, first.not_valid_after_utc)

    def context(self) -> ssl.SSLContext:
        """Raises InputError."""
        self.check()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Connections that come from now on get these files. Raises InputError, and then the old ones stay."""
        self.check()
        try:
            context.load_cert_chain(self.cert, self.key, password="")
        except (OSError, ValueError) as error:
            raise InputError(READ, self.cert, str(error)) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise InputError(READ, path, error.strerror or str(error)) from error
    if len(raw) > FILE_BYTES:
        raise InputError(READ, path, f"more than {FILE_BYTES} bytes are no PEM file")
    return raw
