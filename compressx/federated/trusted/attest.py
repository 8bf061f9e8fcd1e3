"""Attesters and verifiers behind one interface: Gramine's, and a simulated one that says so.

An attester gives quotes and a sealing key; it lives where the enclave is. A verifier accepts or refuses a quote; it
lives at the client. A simulated quote has its own version, vendor and root, so a `DcapVerifier` refuses it by
construction, and a `SimulatedVerifier` refuses real ones.

A SIMULATED enclave protects nothing: whoever runs the machine reads all of its memory.
"""

import datetime
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from compressx.federated.trusted import quotes
from compressx.federated.trusted.quotes import Policy, Quote, Report
from compressx.federated.trusted.refused import Refused

_MARK = "SIMULATED, compressx, protects nothing"
log = logging.getLogger("compressx.federated")


class Attester(Protocol):
    """The enclave's side."""

    simulated: bool

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 64 bytes."""

    def measurement(self) -> bytes:
        """MRENCLAVE of this enclave, 32 bytes."""

    def sealing_key(self) -> bytes:
        """16 bytes that only this enclave on this machine gets."""


class Verifier(Protocol):
    """The client's side."""

    simulated: bool

    def verify(self, quote: bytes, report_data: bytes) -> Report:
        """The report of an accepted quote; raises `Refused`."""


class GramineAttester:
    """Quotes and keys from Gramine's pseudo-files.

    Raises:
      RuntimeError: this is not gramine-sgx with DCAP attestation; says what is missing.
    """

    simulated = False

    def __init__(self, root: str | Path = "/dev/attestation") -> None:
        self.root = Path(root)
        kind = self.root / "attestation_type"
        if not kind.exists():
            raise RuntimeError(
                f"{kind} does not exist: run under gramine-sgx (gramine-direct has no attestation) with "
                'sgx.remote_attestation = "dcap" in the manifest'
            )
        if kind.read_text().strip() != "dcap":
            raise RuntimeError(f'{kind} says {kind.read_text().strip()!r}; sgx.remote_attestation = "dcap" is needed')

    def quote(self, report_data: bytes) -> bytes:
        """A quote over 64 bytes; the data are written before the quote is read, as Gramine wants it."""
        if len(report_data) != 64:
            raise ValueError(f"report data have {len(report_data)} bytes; 64 are needed")
        (self.root / "user_report_data").write_bytes(report_data)
        data = (self.root / "quote").read_bytes()
        (length,) = (int.from_bytes(data[quotes.SIGNED : quotes.SIGNED + 4], "little"),)
        return data[: quotes.SIGNED + 4 + length]  # some versions fill the file up with zeros

    def measurement(self) -> bytes:
        """MRENCLAVE, from the quote."""
        return quotes.read_quote(self.quote(bytes(64))).report.measurement

    def sealing_key(self) -> bytes:
        """The key that Gramine derives from this CPU and MRENCLAVE."""
        return (self.root / "keys" / "_sgx_mrenclave").read_bytes()


class DcapVerifier:
    """Accepts quotes of real SGX enclaves.

    Args:
      root: Intel's SGX root certificate (PEM), from a source you trust; it is pinned.
      policy: the enclaves accepted.
      tcb: looks up the platform's TCB status in Intel's collateral; without one every quote is refused.
      revoked: serial numbers from the revocation lists.
      now: the time; the system's by default.

    Raises:
      ValueError: the root is that of a simulation.
    """

    simulated = False

    def __init__(
        self,
        root: bytes,
        policy: Policy,
        tcb: Callable[[Quote, x509.Certificate], str] | None = None,
        revoked: frozenset[int] = frozenset(),
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self.root, self.policy, self.tcb, self.revoked, self.now = _read_root(root), policy, tcb, revoked, now
        if _is_simulated(self.root):
            raise ValueError("this is the root of a simulation; a production verifier never accepts it")

    def verify(self, quote: bytes, report_data: bytes) -> Report:
        """See `quotes.verify`."""
        return quotes.verify(
            quote,
            version=quotes.DCAP,
            vendor=quotes.INTEL_QE,
            root=self.root,
            policy=self.policy,
            report_data=report_data,
            now=self.now(),
            revoked=self.revoked,
            tcb=self.tcb,
        )


class SimulatedAttester:
    """SIMULATED. Quotes of the real layout, signed under a root that it makes itself.

    Args:
      measurement: stands for MRENCLAVE; `measure()` of the trusted files.
      secret: stands for the CPU's fused key: the same secret and measurement give the same sealing key.
      debug: set the debug bit, for tests.
      identity: PEM of root and keys from `identity()`, so that a restarted enclave is on "the same machine".
    """

    simulated = True

    def __init__(
        self, measurement: bytes, secret: bytes, *, debug: bool = False, identity: bytes | None = None
    ) -> None:
        self._measurement, self._secret, self._debug = measurement, secret, debug
        self._identity = identity or make_identity()
        parts = self._identity.split(b"-----BEGIN CERTIFICATE-----", 1)
        keys = [b"-----BEGIN" + p for p in parts[0].split(b"-----BEGIN")[1:]]
        loaded = [serialization.load_pem_private_key(k, None) for k in keys]
        self._attestation, self._platform = (k for k in loaded if isinstance(k, ec.EllipticCurvePrivateKey))
        self._chain = b"-----BEGIN CERTIFICATE-----" + parts[1]
        self.root = b"-----BEGIN CERTIFICATE-----" + parts[1].rsplit(b"-----BEGIN CERTIFICATE-----", 1)[1]
        log.warning("SIMULATED enclave: nothing is protected from whoever runs this machine")

    def quote(self, report_data: bytes) -> bytes:
        """A simulated quote over 64 bytes."""
        signer = hashlib.sha256(b"simulated signer").digest()
        report = Report(1 | (2 if self._debug else 0), 3, self._measurement, signer, 1, 1, report_data)
        return quotes.write_quote(
            quotes.SIMULATED, quotes.SIMULATED_QE, report, self._attestation, self._platform, self._chain
        )

    def measurement(self) -> bytes:
        """As given."""
        return self._measurement

    def sealing_key(self) -> bytes:
        """Derived from the secret and the measurement."""
        return hashlib.sha256(b"seal" + self._secret + self._measurement).digest()[:16]

    def identity(self) -> bytes:
        """Keys and certificates, to be given to the next process on "the same machine"."""
        return self._identity


class SimulatedVerifier:
    """SIMULATED. Accepts simulated quotes under one root, with all the other checks of the real one."""

    simulated = True

    def __init__(self, root: bytes, policy: Policy) -> None:
        self.root, self.policy = _read_root(root), policy
        if not _is_simulated(self.root):
            raise ValueError("the root of a simulation is needed")
        log.warning("SIMULATED attestation: accepted quotes prove nothing")

    def verify(self, quote: bytes, report_data: bytes) -> Report:
        """See `quotes.verify`."""
        return quotes.verify(
            quote,
            version=quotes.SIMULATED,
            vendor=quotes.SIMULATED_QE,
            root=self.root,
            policy=self.policy,
            report_data=report_data,
            now=datetime.datetime.now(datetime.UTC),
            tcb=lambda quote, leaf: "UpToDate",
        )


def measure(folder: str | Path | None = None) -> bytes:
    """SHA-256 over the names and contents of the trusted files: what a simulated measurement stands for."""
    folder = Path(folder) if folder else Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
    return digest.digest()


def make_identity() -> bytes:
    """PEM of a simulated machine: attestation key, platform key, its certificate and the root's."""
    root_key, attestation, platform = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    now = datetime.datetime.now(datetime.UTC)

    def name(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def certificate(subject: str, key: ec.EllipticCurvePrivateKey, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(_MARK))
            .public_key(key.public_key())
            .serial_number(1 << 152 | int.from_bytes(os.urandom(19)))
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        while len((made := builder.sign(root_key, hashes.SHA256())).signature) != 71:
            pass  # DER has 70 to 72 bytes; one length, so that every simulated quote has one size and runs compare
        return made

    encoding = serialization.Encoding.PEM
    keys = [
        k.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        for k in (attestation, platform)
    ]
    certificates = [certificate("SIMULATED platform", platform, False), certificate(_MARK, root_key, True)]
    return b"".join(keys) + b"".join(c.public_bytes(encoding) for c in certificates)


def mode(root: str | Path = "/dev/attestation") -> str:
    """Where this program runs, in one line: what a doctor prints."""
    kind = Path(root) / "attestation_type"
    if kind.exists():
        return f"gramine-sgx, attestation {kind.read_text().strip()}"
    version = Path("/proc/version").read_text() if Path("/proc/version").exists() else ""
    return "gramine-direct: no SGX, no attestation" if "gramine" in version.lower() else "no enclave: SIMULATED only"


def _read_root(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise Refused("chain", f"the root certificate cannot be read: {error}") from None


def _is_simulated(root: x509.Certificate) -> bool:
    return any("SIMULATED" in str(a.value) for a in root.subject)
