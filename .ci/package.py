"""What a user gets: builds wheel and sdist into dist/, checks them, installs each in fresh environments, and uses it.

    make package        or: python .ci/package.py [--pythons PYTHON ...]

On the oldest and the newest supported Python that are found here, the README's lines train, harden, retrain and save a
network, which is loaded, verified and inspected. Nothing of the checkout can be imported there, and no extra is needed.
Printed are sizes, the number of packages that pip installs, and seconds. Needs a package index.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINORS = (11, 12, 13)  # of the Pythons that setup.cfg supports
FIRST_USE = "import time; t = time.process_time(); import compressx{}; print(time.process_time() - t)"


def run(*command: str | Path, cwd: Path) -> str:
    """A command's output; its error ends this program, after what it printed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def pythons() -> list[str]:
    """The oldest and the newest supported Python that run and can make environments; pyenv's own are tried too."""
    found = []
    for minor in MINORS:
        name = f"python3.{minor}"
        versions = sorted((Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/{name}"))
        works = "import ensurepip, sys, venv; sys.exit(sys.version_info[1] != " + f"{minor})"
        for candidate in [name, *map(str, versions)]:
            if shutil.which(candidate) and not subprocess.run([candidate, "-c", works], capture_output=True).returncode:
                found.append(candidate)
                break
    return found[:1] + found[1:][-1:]


def environment(python: str | Path, folder: Path) -> Path:
    """A fresh environment: its Python."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def build(work: Path) -> list[Path]:
    """The sdist, and the wheel that is built from it; of the files that git knows or would add, and no others."""
    source = work / "source"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    tools = environment(sys.executable, work / "tools")
    run(tools, "-m", "pip", "install", "-q", "build", "twine", cwd=work)
    run(tools, "-m", "build", "--outdir", work / "dist", source, cwd=work)
    made = sorted((work / "dist").iterdir())
    print(run(tools, "-m", "twine", "check", "--strict", *made, cwd=work).strip())
    return made


def check_contents(wheel: Path, sdist: Path) -> None:
    """The library and nothing else; the sources of the kernels, and the types."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    wrong = sorted(t for t in tops if t != "compressx" and not t.endswith(".dist-info"))
    if wrong:
        sys.exit(f"{wheel.name} holds {', '.join(wrong)} beside compressx")
    for needed in ("compressx/py.typed", "compressx/native/", "compressx/federated/gramine/"):
        if not any(n.startswith(needed) for n in names):
            sys.exit(f"{wheel.name} lacks {needed}")
    with tarfile.open(sdist) as archive:
        inside = {n.partition("/")[2] for n in archive.getnames()}
    lost = sorted(n for n in names if n.startswith("compressx/") and n not in inside)
    if lost:
        sys.exit(f"{sdist.name} lacks {', '.join(lost[:5])}")


def use(python: str, made: Path, work: Path) -> dict[str, object]:
    """Installs a wheel or an sdist in a fresh environment and uses it there; what that took."""
    begin = time.perf_counter()
    folder = work / f"{Path(python).name}-{'wheel' if made.suffix == '.whl' else 'sdist'}"
    own = environment(python, folder)
    run(own, "-m", "pip", "install", "-q", made, cwd=work)
    seconds = time.perf_counter() - begin
    packages = [p["name"] for p in json.loads(run(own, "-m", "pip", "list", "--format=json", cwd=work))]
    model = work / f"{folder.name}.safetensors"
    run(own, "-I", ROOT / ".ci" / "three_lines.py", ROOT / "README.md", model, cwd=work)
    command = folder / "bin" / "compressx"
    verified = run(command, "verify", model, cwd=work).splitlines()[-1].partition(": ")[2]
    run(command, "inspect", model, cwd=work)
    first = {
        f"import_{'admm' if more else 'compressx'}_cpu_s": statistics.median(
            float(run(own, "-I", "-c", FIRST_USE.format(more), cwd=work)) for _ in range(5)
        )
        for more in ("", "; compressx.admm")
    }
    out = {
        "python": run(own, "-c", "import platform; print(platform.python_version())", cwd=work).strip(),
        "installed": made.name,
        "jax": run(own, "-c", "import importlib.metadata as m; print(m.version('jax'))", cwd=work).strip(),
        "packages": len(set(packages) - {"pip", "setuptools", "wheel"}),
        "environment_mb": round(sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6),
        "install_s": round(seconds),
        "verify": verified,
        **{k: round(v, 2) for k, v in first.items()},
    }
    shutil.rmtree(folder)
    return out


def main() -> None:
    """Builds, checks, installs, uses and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", help="instead of the oldest and the newest that are found")
    given = parser.parse_args().pythons or pythons()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compressx-package-") as name:
        work = Path(name)
        made = build(work)
        sdist, wheel = sorted(made, key=lambda p: p.suffix == ".whl")
        check_contents(wheel, sdist)
        for file in made:
            print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")
        for python in given:
            for file in (wheel, sdist):
                print(json.dumps(use(python, file, work)), flush=True)
        (ROOT / "dist").mkdir(exist_ok=True)
        for file in made:
            shutil.copy2(file, ROOT / "dist" / file.name)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.perf_counter() - begin:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU"
    print(f"{len(given)} Pythons, wheel and sdist: all used as README says, in {took}")


if __name__ == "__main__":
    main()
