"""X.509 certificates of a federation: its authority, and those that it signs. ECDSA, P-256, SHA-256 (RFC 5280)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 7300  # validity of the authority's certificate
MAX_DAYS = 3650  # validity of the certificates that it signs, at most
CLOCK_TOLERANCE = timedelta(
    days=1
)  # a certificate is valid this long before it is made: a device's clock may be behind


class FederationError(ValueError):
    """A federation's folder, certificate or broker is wrong; says what, and what to do."""


@dataclass(frozen=True)
class Issued:
    """A certificate and its key as PEM, its serial number as 40 hexadecimal digits, and when it expires (UTC)."""

    certificate: bytes
    key: bytes
    serial: str
    expires: datetime


def make_authority(name: str) -> Issued:
    """Make a self-signed authority, valid for `AUTHORITY_DAYS` days, that cannot make other authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return _signed(subject, subject, key, key, AUTHORITY_DAYS, [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_usage(key_cert_sign=True, crl_sign=True), True),
    ])  # fmt: skip


class Authority:
    """Signs certificates. Raises FederationError if its files are damaged, or do not belong together.

    certificate, key: PEM.
    """

    def __init__(self, certificate: bytes, key: bytes) -> None:
        try:
            self.certificate = x509.load_pem_x509_certificate(certificate)
            loaded = serialization.load_pem_private_key(key, password=None)
        except (ValueError, TypeError) as error:
            raise FederationError(
                f"the authority's key or certificate is damaged: take them from a copy ({error})"
            ) from None
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != self.certificate.public_key():
            raise FederationError("the authority's key is not that of its certificate: take both from one copy")
        self._key = loaded

    @property
    def expires(self) -> datetime:
        """The time (UTC) at which the authority's certificate expires, and with it all that it has signed."""
        return self.certificate.not_valid_after_utc

    def client(self, who: str, days: int) -> Issued:
        """Make a certificate for the server or a client, which connect to the broker.

        who: such as "client-3". The certificate's only alternative name is the e-mail address "WHO.SERIAL@hosfl", so
        that two certificates of the same client are never the same user: see `identity`.
        """
        serial = x509.random_serial_number()
        name = x509.RFC822Name(identity(who, _hex(serial)))
        return self._issue(who, days, [name], ExtendedKeyUsageOID.CLIENT_AUTH, serial)

    def broker(self, host: str, days: int) -> Issued:
        """Make a certificate for the broker at `host`, a DNS name or an IP address, and at localhost."""
        hosts = dict.fromkeys([host, "localhost", "127.0.0.1"])
        return self._issue("broker", days, [_host(each) for each in hosts], ExtendedKeyUsageOID.SERVER_AUTH)

    def _issue(
        self,
        who: str,
        days: int,
        names: list[x509.GeneralName],
        use: x509.ObjectIdentifier,
        serial: int | None = None,
    ) -> Issued:
        if _now() + timedelta(days=days) > self.expires:
            raise FederationError(
                f"the authority's certificate ends on {self.expires:%Y-%m-%d}, in fewer than {days} days, and nothing"
                " it signs can last longer: ask for fewer days, or make a new federation"
            )
        authority_key = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        key = ec.generate_private_key(ec.SECP256R1())
        return _signed(subject, self.certificate.subject, key, self._key, days, [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([use]), False),
            (x509.SubjectAlternativeName(names), False),
            (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_key), False),
        ], serial)  # fmt: skip


def identity(who: str, serial: str) -> str:
    """Return a certificate's user name at the broker: "client-3", serial -> "client-3.SERIAL@hosfl"."""
    return f"{who}.{serial}@hosfl"


def read_certificate(pem: bytes) -> tuple[str, datetime, datetime]:
    """Read a PEM certificate: (its owner, such as "client-3"; begin, end of validity, UTC). Raises FederationError."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise FederationError(f"this is no certificate ({error})") from None
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    who = str(names[0].value) if names else "nobody"
    return who, certificate.not_valid_before_utc, certificate.not_valid_after_utc


def signed_by(authority: bytes, pem: bytes) -> bool:
    """Whether a PEM certificate is signed by an authority's; False if either is invalid."""
    try:
        issuer = x509.load_pem_x509_certificate(authority)
        x509.load_pem_x509_certificate(pem).verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    extensions: list[tuple[x509.ExtensionType, bool]],
    serial: int | None = None,
) -> Issued:
    serial = serial or x509.random_serial_number()
    now = _now()
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), serial)
    builder = builder.not_valid_before(now - CLOCK_TOLERANCE).not_valid_after(now + timedelta(days=days))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    certificate = builder.sign(signer, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Issued(certificate.public_bytes(pem), private, _hex(serial), certificate.not_valid_after_utc)


def _usage(**used: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: used.get(name, False) for name in names})


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hex(serial: int) -> str:
    return f"{serial:040x}"


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
