"""Quotes: read, verified in order, and every attack on them refused."""

import base64
import datetime
import hashlib
import struct

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from compressx.federated.trusted import attest, quotes
from compressx.federated.trusted.quotes import Policy, Report
from compressx.federated.trusted.refused import Refused

DATA = bytes(range(64))
MEASUREMENT = hashlib.sha256(b"aggregator").digest()
SIGNER = hashlib.sha256(b"signer").digest()
NOW = datetime.datetime.now(datetime.UTC)


def certificate(subject: str, key, issuer: str, issuer_key, authority: bool, *, days: int = 30, serial: int = 0):
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=60))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    return builder.sign(issuer_key, hashes.SHA256())


class Machine:
    """A platform with the shape of a real one, under a root of our own: root, intermediate, leaf."""

    def __init__(self) -> None:
        self.keys = {n: ec.generate_private_key(ec.SECP256R1()) for n in ("root", "mid", "leaf", "attestation")}
        k = self.keys
        self.root = certificate("Test SGX Root", k["root"], "Test SGX Root", k["root"], True)
        self.mid = certificate("Test SGX PCK CA", k["mid"], "Test SGX Root", k["root"], True)
        self.leaf = certificate("Test SGX PCK", k["leaf"], "Test SGX PCK CA", k["mid"], False, serial=77)
        self.report = Report(1, 3, MEASUREMENT, SIGNER, 4, 7, DATA)

    def chain(self, *certificates) -> bytes:
        chosen = certificates or (self.leaf, self.mid, self.root)
        return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chosen)

    def quote(self, report: Report | None = None, **changes) -> bytes:
        settings = {
            "version": quotes.DCAP,
            "vendor": quotes.INTEL_QE,
            "attestation": self.keys["attestation"],
            "platform": self.keys["leaf"],
            "chain": self.chain(),
        } | changes
        return quotes.write_quote(report=report or self.report, **settings)

    def verifier(self, policy: Policy | None = None, **changes) -> attest.DcapVerifier:
        settings = {"tcb": lambda quote, leaf: "UpToDate"} | changes
        pem = self.root.public_bytes(serialization.Encoding.PEM)
        return attest.DcapVerifier(pem, policy or Policy(MEASUREMENT), **settings)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine()


def reason(call) -> str:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.reason


def test_offsets_are_those_of_the_published_layout(machine) -> None:
    data = machine.quote()
    assert data[112:144] == MEASUREMENT and data[176:208] == SIGNER and data[368:432] == DATA
    assert struct.unpack_from("<HH", data, 304) == (4, 7) and struct.unpack_from("<H", data, 0) == (3,)
    assert struct.unpack_from("<I", data, 432) == (len(data) - 436,)
    read = quotes.read_quote(data)
    assert read.report == machine.report and read.certificates == machine.chain()


def test_a_good_quote_is_accepted(machine) -> None:
    assert machine.verifier().verify(machine.quote(), DATA) == machine.report
    by_signer = Policy(signer=SIGNER, product=4, svn=7)
    assert machine.verifier(by_signer).verify(machine.quote(), DATA) == machine.report


@pytest.mark.parametrize("length", [0, 47, 432, 1019, 8193, 100_000])
def test_sizes_are_checked_first(machine, length: int) -> None:
    data = (machine.quote() + bytes(100_000))[:length]
    assert reason(lambda: machine.verifier().verify(data, DATA)) == "size"


def test_a_truncated_quote_is_refused_wherever_it_is_cut(machine) -> None:
    data = machine.quote()
    for cut in range(quotes.MIN_BYTES, len(data), 37):
        assert reason(lambda cut=cut: machine.verifier().verify(data[:cut], DATA)) == "structure"
    assert reason(lambda: machine.verifier().verify(data + b"\0", DATA)) == "structure"


def test_every_flipped_bit_is_refused(machine) -> None:
    data, verifier = machine.quote(), machine.verifier()
    padding = data.index(machine.chain()) - 6
    for at in range(0, padding + 40, 11):
        bad = bytearray(data)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(Refused):
            verifier.verify(bytes(bad), DATA)


def test_debug_enclaves_are_refused(machine) -> None:
    debug = machine.report._replace(flags=3)
    assert reason(lambda: machine.verifier().verify(machine.quote(debug), DATA)) == "debug"
    quoting = Report(3, 3, bytes(32), bytes(32), 1, 1, bytes(64))
    assert reason(lambda: machine.verifier().verify(machine.quote(qe=quoting), DATA)) == "debug"


def test_other_enclaves_are_refused(machine) -> None:
    other = machine.report._replace(measurement=bytes(32))
    assert reason(lambda: machine.verifier().verify(machine.quote(other), DATA)) == "measurement"
    for policy in (
        Policy(signer=bytes(32), product=4),
        Policy(signer=SIGNER, product=5),
        Policy(signer=SIGNER, product=4, svn=8),
    ):
        assert reason(lambda p=policy: machine.verifier(p).verify(machine.quote(), DATA)) == "measurement"


def test_a_replayed_quote_is_bound_to_other_data(machine) -> None:
    assert reason(lambda: machine.verifier().verify(machine.quote(), bytes(64))) == "binding"


def test_chains_are_checked(machine) -> None:
    stranger = Machine()
    assert reason(lambda: machine.verifier().verify(stranger.quote(), DATA)) == "chain"
    swapped = machine.chain(machine.leaf, stranger.mid, machine.root)
    assert reason(lambda: machine.verifier().verify(machine.quote(chain=swapped), DATA)) == "chain"
    no_leaf = machine.chain(machine.mid, machine.root)  # an authority is no platform
    assert (
        reason(lambda: machine.verifier().verify(machine.quote(chain=no_leaf, platform=machine.keys["mid"]), DATA))
        == "chain"
    )
    k = machine.keys
    old = certificate("Test SGX PCK", k["leaf"], "Test SGX PCK CA", k["mid"], False, days=-1)
    expired = machine.chain(old, machine.mid, machine.root)
    assert reason(lambda: machine.verifier().verify(machine.quote(chain=expired), DATA)) == "chain"
    revoked = machine.verifier(revoked=frozenset({77}))
    assert reason(lambda: revoked.verify(machine.quote(), DATA)) == "chain"
    assert reason(lambda: machine.verifier().verify(machine.quote(chain=b"no certificate" * 40), DATA)) == "chain"


def test_signatures_are_checked(machine) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    assert reason(lambda: machine.verifier().verify(machine.quote(platform=other), DATA)) == "signature"
    mixed = bytearray(machine.quote())
    theirs = machine.quote(attestation=other)
    mixed[436:564] = theirs[436:564]  # signature and key of an attestation key nobody vouches for
    assert reason(lambda: machine.verifier().verify(bytes(mixed), DATA)) == "signature"


def test_without_a_tcb_status_nothing_is_accepted(machine) -> None:
    assert reason(lambda: machine.verifier(tcb=None).verify(machine.quote(), DATA)) == "tcb"
    outdated = machine.verifier(tcb=lambda quote, leaf: "OutOfDate")
    assert reason(lambda: outdated.verify(machine.quote(), DATA)) == "tcb"


def test_simulated_quotes_are_refused_by_a_production_verifier(machine) -> None:
    simulated = attest.SimulatedAttester(MEASUREMENT, b"s")
    assert reason(lambda: machine.verifier().verify(simulated.quote(DATA), DATA)) == "structure"
    with pytest.raises(ValueError, match="production verifier never accepts"):
        attest.DcapVerifier(simulated.root, Policy(MEASUREMENT))
    # even relabelled as real, it is under no real root
    relabelled = bytearray(simulated.quote(DATA))
    relabelled[0:2], relabelled[12:28] = struct.pack("<H", quotes.DCAP), quotes.INTEL_QE
    assert reason(lambda: machine.verifier().verify(bytes(relabelled), DATA)) == "chain"


def test_real_quotes_are_refused_by_a_simulated_verifier(machine) -> None:
    simulated = attest.SimulatedAttester(MEASUREMENT, b"s")
    verifier = attest.SimulatedVerifier(simulated.root, Policy(MEASUREMENT))
    assert verifier.verify(simulated.quote(DATA), DATA).measurement == MEASUREMENT
    assert reason(lambda: verifier.verify(machine.quote(), DATA)) == "structure"
    with pytest.raises(ValueError, match="root of a simulation"):
        attest.SimulatedVerifier(machine.root.public_bytes(serialization.Encoding.PEM), Policy(MEASUREMENT))


def test_a_policy_that_accepts_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="accepting any enclave"):
        Policy()


def test_gramine_files_are_used_as_gramine_wants_them(machine, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="run under gramine-sgx"):
        attest.GramineAttester(tmp_path)
    (tmp_path / "attestation_type").write_text("none")
    with pytest.raises(RuntimeError, match='"dcap"'):
        attest.GramineAttester(tmp_path)
    (tmp_path / "attestation_type").write_text("dcap\n")
    (tmp_path / "quote").write_bytes(machine.quote() + bytes(100))  # filled up, as some versions do
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "_sgx_mrenclave").write_bytes(b"k" * 16)
    attester = attest.GramineAttester(tmp_path)
    assert machine.verifier().verify(attester.quote(DATA), DATA) == machine.report
    assert (tmp_path / "user_report_data").read_bytes() == bytes(64) or (
        tmp_path / "user_report_data"
    ).read_bytes() == DATA
    assert attester.measurement() == MEASUREMENT and attester.sealing_key() == b"k" * 16
    assert "dcap" in attest.mode(tmp_path)


def test_every_simulated_machine_has_quotes_of_one_size() -> None:
    assert len({len(attest.SimulatedAttester(bytes(32), bytes(32)).quote(bytes(64))) for _ in range(6)}) == 1


def test_only_intels_quoting_enclave_may_vouch(machine) -> None:
    who = quotes.QuotingEnclave()
    good = Report(who.flags, 3, bytes(32), who.signer, who.product, 3, DATA)
    accepts = lambda qe, **more: machine.verifier(**more).verify(machine.quote(qe=qe), DATA)
    assert accepts(good) and accepts(good._replace(flags=who.flags | quotes.MODE64))
    for bad in (
        good._replace(signer=SIGNER),
        good._replace(product=2),
        good._replace(flags=quotes.INITIALISED),
        good._replace(flags=who.flags | quotes.LAUNCH_KEY),
    ):
        assert reason(lambda bad=bad: accepts(bad)) == "quoting enclave"
    with pytest.raises(Refused, match="security version 3"):
        quotes.verify(
            machine.quote(qe=good), version=quotes.DCAP, vendor=quotes.INTEL_QE, root=machine.root,
            policy=Policy(MEASUREMENT), report_data=DATA, now=NOW, tcb=lambda *_: "UpToDate",
            quoting=who._replace(svn=4),
        )  # fmt: skip


@pytest.mark.parametrize("key", [quotes.PROVISION_KEY, quotes.LAUNCH_KEY])
def test_an_aggregator_with_keys_of_the_platform_is_refused(machine, key: int) -> None:
    report = machine.report._replace(flags=quotes.INITIALISED | quotes.MODE64 | key)
    assert reason(lambda: machine.verifier().verify(machine.quote(report), DATA)) == "attributes"


def test_crafted_certificates_are_refused_whatever_the_library_raises(machine) -> None:
    """Bytes of a certificate exchanged one by one: its version, its algorithms, its times, its extensions."""
    rng = np.random.default_rng(0)
    verifier, der = machine.verifier(), machine.leaf.public_bytes(serialization.Encoding.DER)
    rest = machine.chain(machine.mid, machine.root)
    for at in range(0, len(der) - 1, 3):
        bad = bytearray(der)
        bad[at] ^= int(rng.integers(1, 256))
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(bad)) + b"-----END CERTIFICATE-----\n"
        with pytest.raises(Refused):
            verifier.verify(machine.quote(chain=pem + rest), DATA)
