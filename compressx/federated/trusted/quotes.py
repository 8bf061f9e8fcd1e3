"""SGX quotes (DCAP, ECDSA-P256): reading, the signature chain, and the policy, in an order that wastes no work.

    quote      header 48 | report 384 | length u32 | signature data
    signature  signature 64 | attestation key 64 | QE report 384 | its signature 64 | auth (u16) | certificates (u16,
    u32)

Checks, in this order: size, structure, certificate chain up to a pinned root, the quoting enclave's report and who it
is, the quote's signature, debug and key attributes, measurement or signer, report data, TCB status. Nothing costly
happens before size and structure.

Revocation lists and Intel's TCB collateral are inputs (`revoked`, `tcb`): fetching them is the caller's. A production
verifier without a `tcb` function refuses.

Sources: Intel, "Intel SGX ECDSA Quote Library Reference: DCAP API", quote format version 3, appendix A; the quoting
enclave's signer, product and attributes are those of Intel's published QE identity.
"""

import datetime
import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from compressx.federated.trusted.refused import Refused

HEADER, REPORT = 48, 384
SIGNED = HEADER + REPORT
MIN_BYTES, MAX_BYTES = 1020, 8192
DCAP, SIMULATED = 3, 0x5353  # the version field; 0x5353 is "SS", which no quoting enclave writes
INTEL_QE = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
SIMULATED_QE = b"SIMULATED-NO-SGX"
INITIALISED, DEBUG, MODE64, PROVISION_KEY, LAUNCH_KEY = 1, 2, 4, 0x10, 0x20  # attribute flags
_P256 = 2
_PEM_CHAIN = 5


class Report(NamedTuple):
    """What an enclave's report says of it."""

    flags: int
    xfrm: int
    measurement: bytes
    signer: bytes
    product: int
    svn: int
    data: bytes

    @property
    def debug(self) -> bool:
        """Whether its memory can be read from outside."""
        return bool(self.flags & DEBUG)

    @property
    def initialised(self) -> bool:
        """Whether it is a running enclave at all."""
        return bool(self.flags & INITIALISED)


class Quote(NamedTuple):
    """A quote taken apart; nothing of it is verified."""

    version: int
    vendor: bytes
    report: Report
    signed: bytes
    signature: bytes
    key: bytes
    qe_report: bytes
    qe_signature: bytes
    auth: bytes
    certificates: bytes
    raw: bytes


class QuotingEnclave(NamedTuple):
    """Who may vouch for attestation keys: a quoting enclave's signer, product and attributes.

    Attributes:
      signer: MRSIGNER, 32 bytes.
      product: ISVPRODID.
      svn: least ISVSVN; Intel's collateral says which are up to date.
      flags: the attribute flags, but for `MODE64`, which either may have.
    """

    signer: bytes = bytes.fromhex("8c4f5775d796503e96137f77c68a829a0056ac8ded70140b081b094490c57bff")
    product: int = 1
    svn: int = 0
    flags: int = INITIALISED | PROVISION_KEY


@dataclass(frozen=True)
class Policy:
    """Which enclaves are accepted.

    Attributes:
      measurement: MRENCLAVE, 32 bytes; or None to accept by signer.
      signer: MRSIGNER, 32 bytes, with `product` and at least `svn`; or None.
      product: ISVPRODID.
      svn: least ISVSVN.
    """

    measurement: bytes | None = None
    signer: bytes | None = None
    product: int = 0
    svn: int = 0

    def __post_init__(self) -> None:
        if self.measurement is None and self.signer is None:
            raise ValueError("a policy needs a measurement or a signer; accepting any enclave is accepting none")
        for name, value in (("measurement", self.measurement), ("signer", self.signer)):
            if value is not None and len(value) != 32:
                raise ValueError(f"{name} has {len(value)} bytes; it needs 32")


def read_report(body: bytes) -> Report:
    """The fields of a report body of 384 bytes."""
    flags, xfrm = struct.unpack_from("<QQ", body, 48)
    product, svn = struct.unpack_from("<HH", body, 256)
    return Report(flags, xfrm, body[64:96], body[128:160], product, svn, body[320:384])


def write_report(report: Report) -> bytes:
    """The inverse of `read_report`, other fields zero."""
    body = bytearray(REPORT)
    struct.pack_into("<QQ", body, 48, report.flags, report.xfrm)
    body[64:96], body[128:160], body[320:384] = report.measurement, report.signer, report.data
    struct.pack_into("<HH", body, 256, report.product, report.svn)
    return bytes(body)


def read_quote(data: bytes) -> Quote:
    """Takes a quote apart.

    Raises:
      Refused: "size" or "structure".
    """
    if not MIN_BYTES <= len(data) <= MAX_BYTES:
        raise Refused("size", f"a quote of {len(data)} bytes; one has {MIN_BYTES} to {MAX_BYTES}")
    version, kind, _, _, _, vendor = struct.unpack_from("<HHIHH16s", data)
    if kind != _P256:
        raise Refused("structure", f"attestation key type {kind}; only ECDSA P-256 (2) is known")
    (length,) = struct.unpack_from("<I", data, SIGNED)
    rest = data[SIGNED + 4 :]
    if length != len(rest):
        raise Refused("structure", f"signature data of {length} bytes, {len(rest)} are there")
    signature, key, qe_report, qe_signature = rest[:64], rest[64:128], rest[128:512], rest[512:576]
    (auth_length,) = struct.unpack_from("<H", rest, 576)
    at = 578 + auth_length
    if at + 6 > len(rest):
        raise Refused("structure", f"authentication data of {auth_length} bytes do not fit")
    cert_kind, cert_length = struct.unpack_from("<HI", rest, at)
    if cert_kind != _PEM_CHAIN or at + 6 + cert_length != len(rest):
        raise Refused("structure", f"certification data of type {cert_kind} and {cert_length} bytes do not fit")
    report = read_report(data[HEADER:SIGNED])
    signed, auth, certificates = data[:SIGNED], rest[578:at], rest[at + 6 :]
    return Quote(version, vendor, report, signed, signature, key, qe_report, qe_signature, auth, certificates, data)


def write_quote(
    version: int,
    vendor: bytes,
    report: Report,
    attestation: ec.EllipticCurvePrivateKey,
    platform: ec.EllipticCurvePrivateKey,
    chain: bytes,
    auth: bytes = bytes(range(32)),
    qe: Report | None = None,
) -> bytes:
    """A quote signed by an attestation key that a platform key vouches for; the simulated attester and tests use it."""
    key = _raw(attestation)
    vouched = hashlib.sha256(key + auth).digest() + bytes(32)
    who = QuotingEnclave()
    qe = qe or Report(who.flags | MODE64, 3, hashlib.sha256(b"qe").digest(), who.signer, who.product, 1, vouched)
    qe = qe._replace(data=vouched)
    qe_body = write_report(qe)
    signed = struct.pack("<HHIHH16s20s", version, _P256, 0, 0, 0, vendor, bytes(20)) + write_report(report)
    rest = _sign(attestation, signed) + key + qe_body + _sign(platform, qe_body)
    rest += struct.pack("<H", len(auth)) + auth + struct.pack("<HI", _PEM_CHAIN, len(chain)) + chain
    return signed + struct.pack("<I", len(rest)) + rest


def verify(
    data: bytes,
    *,
    version: int,
    vendor: bytes,
    root: x509.Certificate,
    policy: Policy,
    report_data: bytes,
    now: datetime.datetime,
    revoked: frozenset[int] = frozenset(),
    tcb: Callable[[Quote, x509.Certificate], str] | None = None,
    quoting: QuotingEnclave = QuotingEnclave(),  # noqa: B008 (immutable)
) -> Report:
    """Checks a quote in the order of the module's description.

    Args:
      data: the quote.
      version: what its version field must be.
      vendor: what its quoting enclave's vendor must be.
      root: the pinned root certificate.
      policy: the enclaves accepted.
      report_data: 64 bytes that must be in the report.
      now: time for the certificates' validity.
      revoked: serial numbers of revoked certificates.
      tcb: `tcb(quote, leaf) -> "UpToDate"` or a reason to refuse.
      quoting: the quoting enclave that may vouch for the key; Intel's by default.

    Raises:
      Refused: with the first check that fails.
    """
    quote = read_quote(data)
    if quote.version != version or quote.vendor != vendor:
        raise Refused(
            "structure", f"a quote of version {quote.version:#x} by {quote.vendor.hex()}; not one accepted here"
        )
    leaf = _check_chain(quote.certificates, root, now, revoked)
    qe = read_report(quote.qe_report)
    _check_signature(leaf.public_key(), quote.qe_signature, quote.qe_report, "the quoting enclave's report")
    vouched = hashlib.sha256(quote.key + quote.auth).digest() + bytes(32)
    if not hmac.compare_digest(qe.data, vouched):
        raise Refused("signature", "the quoting enclave vouches for another attestation key")
    if qe.debug or not qe.initialised:
        raise Refused("debug", "a quoting enclave for debugging: its keys can be read from outside")
    if not hmac.compare_digest(qe.signer, quoting.signer) or qe.product != quoting.product:
        raise Refused("quoting enclave", f"signer {qe.signer.hex()}, product {qe.product} are not expected")
    if qe.flags & ~MODE64 != quoting.flags or qe.svn < quoting.svn:
        raise Refused("quoting enclave", f"attributes {qe.flags:#x}, security version {qe.svn} are not accepted")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + quote.key)
    except ValueError:
        raise Refused("signature", "the attestation key is no point of the curve") from None
    _check_signature(key, quote.signature, quote.signed, "the quote")
    report = quote.report
    if report.debug or not report.initialised:
        raise Refused("debug", "a debug enclave: its memory can be read from outside")
    if report.flags & (PROVISION_KEY | LAUNCH_KEY):
        raise Refused("attributes", "an enclave with provisioning or launch keys, which an aggregator has not")
    if policy.measurement is not None and not hmac.compare_digest(report.measurement, policy.measurement):
        raise Refused("measurement", f"enclave {report.measurement.hex()}; {policy.measurement.hex()} is expected")
    if policy.signer is not None:
        if not hmac.compare_digest(report.signer, policy.signer) or report.product != policy.product:
            raise Refused("measurement", f"signer {report.signer.hex()}, product {report.product} are not expected")
        if report.svn < policy.svn:
            raise Refused("measurement", f"security version {report.svn}; at least {policy.svn} is needed")
    if not hmac.compare_digest(report.data, report_data):
        raise Refused("binding", "the quote is bound to another nonce, key, session or policy")
    if tcb is None:
        raise Refused("tcb", "no TCB status is available; give the verifier a function that looks it up")
    status = tcb(quote, leaf)
    if status != "UpToDate":
        raise Refused("tcb", f"the platform's status is {status!r}")
    return report


def _check_chain(
    pem: bytes, root: x509.Certificate, now: datetime.datetime, revoked: frozenset[int]
) -> x509.Certificate:
    # Certificates are read lazily and by several layers, each of which raises what it likes on a crafted one
    # (UnsupportedAlgorithm, InvalidVersion, ...); none of it may be anything but a refusal here.
    try:
        return _walk_chain(x509.load_pem_x509_certificates(pem.rstrip(b"\0")), root, now, revoked)
    except Refused:
        raise
    except Exception as error:
        raise Refused("chain", f"the certificates cannot be read: {type(error).__name__}") from None


def _walk_chain(
    chain: list[x509.Certificate], root: x509.Certificate, now: datetime.datetime, revoked: frozenset[int]
) -> x509.Certificate:
    if not 2 <= len(chain) <= 4 or chain[-1] != root:
        raise Refused("chain", "the certificates do not end in the pinned root")
    for k, cert in enumerate(chain):
        issuer = chain[min(k + 1, len(chain) - 1)]
        try:
            cert.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            raise Refused("chain", f"certificate {k} is not issued by the next") from None
        if not cert.not_valid_before_utc <= now <= cert.not_valid_after_utc:
            raise Refused("chain", f"certificate {k} is not valid at {now:%Y-%m-%d}")
        if cert.serial_number in revoked:
            raise Refused("chain", f"certificate {k} is revoked")
        try:
            authority = cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            authority = False
        if authority != (k > 0):
            raise Refused("chain", f"certificate {k} {'is' if authority else 'is not'} an authority")
    return chain[0]


def _check_signature(key: object, signature: bytes, signed: bytes, what: str) -> None:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused("signature", f"the key of {what} is not of P-256")
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise Refused("signature", f"the signature of {what} does not fit") from None


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _raw(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PublicFormat.UncompressedPoint
    return key.public_key().public_bytes(serialization.Encoding.X962, form)[1:]
