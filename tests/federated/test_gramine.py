"""What is shipped for SGX names the files that exist, and nothing that a production enclave must not have."""

import re
from pathlib import Path

import compressx.federated
from compressx.federated.trusted import attest

FOLDER = Path(compressx.federated.__file__).parent
TEMPLATE = (FOLDER / "gramine" / "aggregator.manifest.template").read_text()


def test_every_trusted_file_is_named_and_no_other() -> None:
    (listed,) = re.findall(r"for name in \[(.*?)\]", TEMPLATE)
    names = set(re.findall(r'"(\w+)"', listed))
    assert names == {p.stem for p in (FOLDER / "trusted").glob("*.py")}


def test_the_settings_are_those_of_production() -> None:
    settings = dict(re.findall(r"^([\w.]+) = (.+)$", TEMPLATE, re.MULTILINE))
    assert settings["sgx.debug"] == "false" and settings["sgx.remote_attestation"] == '"dcap"'
    assert "loader.insecure__use_cmdline_argv" not in settings and "loader.insecure__use_host_env" not in settings
    assert "simulated" not in "".join(settings.values())


def test_trusted_code_imports_only_itself_numpy_and_cryptography() -> None:
    found = set()
    for path in (FOLDER / "trusted").glob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE))
    ours = {name for name in found if name.startswith("compressx")}
    assert all(name.startswith("compressx.federated.trusted") for name in ours)
    import sys

    outside = {name.partition(".")[0] for name in found - ours} - set(sys.stdlib_module_names)
    assert outside == {"numpy", "cryptography"}


def test_the_measurement_is_of_the_files(tmp_path) -> None:
    for path in (FOLDER / "trusted").glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert attest.measure(tmp_path) == attest.measure()
    (tmp_path / "rounds.py").write_text((tmp_path / "rounds.py").read_text() + "\n")
    assert attest.measure(tmp_path) != attest.measure()
