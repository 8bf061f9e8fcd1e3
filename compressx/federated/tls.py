"""Certificates for a server on one machine: its own authority, a certificate for the names given."""

import datetime
import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Certificates(NamedTuple):
    """Certificates of a server, as PEM.

    Attributes:
      authority: that clients trust.
      server: the server's certificate.
      key: the server's private key.

    Example:
      >>> from compressx.federated.tls import make
      >>> certificates = make(["localhost", "127.0.0.1"])
      >>> certificates.authority.splitlines()[0].decode()
      '-----BEGIN CERTIFICATE-----'
    """

    authority: bytes
    server: bytes
    key: bytes


def make(names: Sequence[str] = ("localhost",), days: int = 30) -> Certificates:
    """Fresh certificates for host names or addresses.

    Args:
      names: host names or addresses of the server, at least one.
      days: for which the certificates hold.

    Returns:
      `Certificates`, with new keys on the curve P-256 each time.

    Example:
      >>> from cryptography import x509
      >>> from compressx.federated.tls import make
      >>> server = x509.load_pem_x509_certificate(make(["localhost"], days=1).server)
      >>> server.subject.rfc4514_string()
      'CN=localhost'
    """
    now = datetime.datetime.now(datetime.UTC)
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "compressx federation")])

    def builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )

    def alternative(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    authority = builder(issuer, authority_key, True).sign(authority_key, hashes.SHA256())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    alternatives = x509.SubjectAlternativeName([alternative(n) for n in names])
    server = builder(subject, server_key, False).add_extension(alternatives, critical=False)
    pem = serialization.Encoding.PEM
    private = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signed = server.sign(authority_key, hashes.SHA256())
    return Certificates(authority.public_bytes(pem), signed.public_bytes(pem), private)
