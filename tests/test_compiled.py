"""The native libraries' cache: whatever lies there, a fresh process computes the right thing, or says why not.

Processes are forked by `fresh_process.py`. Most build with a stand-in for the compiler that copies a library which was
compiled once, a part at a time: the machinery is the same, and thousands of damaged caches take minutes.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from compressx import cache, cli, doctor
from compressx.kernels import tuning
from compressx.native import build as compiled
from experiments.common.data import cache_dir

GXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(GXX is None, reason="no C++ compiler to make the library of the tests")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")
RIGHT = 42
HELPER = Path(__file__).with_name("fresh_process.py")
STRANGER = 4242  # the id of another user


class Workshop:
    """A folder with a source, a stand-in for the compiler, and the process that forks fresh ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.source = folder / "tiny" / "answer.cc"
        self.source.parent.mkdir()
        (folder / "runs").mkdir()
        self.source.write_text(f'extern "C" int answer() {{ return {RIGHT}; }}\n')
        self.built = folder / "prebuilt"
        subprocess.run([GXX, "-shared", "-fPIC", self.source, "-o", self.built], check=True)
        self.compiler = folder / "cc"
        self.compiler.write_text(
            '#!/bin/sh\nfor out; do :; done\n[ "$out" = --version ] && exit 1\n'
            f'mktemp "{folder}/runs/XXXXXXXX" > /dev/null\n'
            f'head -c 2000 "{self.built}" > "$out" && sleep ${{DELAY:-0}} && tail -c +2001 "{self.built}" >> "$out"\n'
        )
        self.compiler.chmod(0o755)
        self.number = 0
        self.process = subprocess.Popen(
            [sys.executable, str(HELPER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def place(self) -> Path:
        """An empty folder, with `cache` and `tmp` to come."""
        self.number += 1
        place = self.folder / str(self.number)
        (place / "tmp").mkdir(parents=True)
        return place

    def run(self, place: Path, **task: Any) -> list[dict[str, Any]]:
        """Loads the library in fresh processes whose cache is in `place`; what they say."""
        environment = {
            "COMPRESSX_CACHE": str(place / "cache"),
            "TMPDIR": str(place / "tmp"),
            "CXX": str(self.compiler),
            "COMPRESSX_NATIVE": None,
            "COMPRESSX_NATIVE_FLAGS": None,
        } | task.pop("environment", {})
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"source": str(self.source), "environment": environment} | task) + "\n")
        self.process.stdin.flush()
        answers = self._answer()
        for a in answers:
            assert "value" in a, a  # neither a signal nor an exception
            assert all(w and "\n" not in w for w in a["warned"]), a
        return answers

    def one(self, place: Path, **task: Any) -> dict[str, Any]:
        """What a single fresh process says."""
        return self.run(place, **task)[0]

    def runs(self) -> int:
        """How often the stand-in has run."""
        return len(list((self.folder / "runs").iterdir()))


NO_COMPILER = {"CXX": "", "PATH": "/nowhere"}


@pytest.fixture(scope="module")
def workshop():
    folder = Path(tempfile.mkdtemp(prefix="compressx-tests-"))  # not under pytest's, which only its user can enter
    folder.chmod(0o755)
    made = Workshop(folder)
    with made.process:
        yield made
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pristine(workshop: Workshop) -> Path:
    """A cache as the first process leaves it, copied by the tests that damage it."""
    place = workshop.place()
    assert workshop.one(place)["value"] == RIGHT
    return place / "cache"


def libraries(place: Path) -> list[Path]:
    return sorted((place / "cache" / "native").glob("*.so"))


def unfinished(place: Path) -> list[Path]:
    return list(place.rglob(cache.UNFINISHED + "*"))


def test_a_library_is_built_once_and_then_found_by_any_process(workshop: Workshop) -> None:
    place, before = workshop.place(), workshop.runs()
    first, *others = (workshop.one(place, environment=e) for e in ({}, {}, NO_COMPILER, {"CXX": "no-such-compiler"}))
    assert [a["value"] for a in (first, *others)] == [RIGHT] * 4 and workshop.runs() == before + 1
    assert first["warned"] == [] and len(first["logged"]) == 1
    for word in ("answer.cc", "about 5 s", str(place / "cache" / "native")):
        assert word in first["logged"][0]
    assert all(not a["warned"] and not a["logged"] for a in others)
    assert len(libraries(place)) == 1 and not unfinished(place) and not list((place / "tmp").iterdir())


def test_the_name_follows_sources_headers_and_flags(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.source.parent, tmp_path / "a")
    source = tmp_path / "a" / "answer.cc"
    name = lambda *flags: compiled._name(compiled.Library(source, {}), flags)
    names = [name(), name("-g"), name("-march=native")]
    (source.parent / "more.h").write_text("")
    names.append(name())
    (source.parent / "more.h").write_text("// changed")
    names.append(name())
    source.write_text(source.read_text() + "\n")
    names.append(name())
    assert len(set(names)) == len(names) and name() == names[-1]
    shutil.copytree(source.parent, tmp_path / "b")
    assert compiled._name(compiled.Library(tmp_path / "b" / "answer.cc", {}), ()) == name()


# --- Damage


ODD = [
    b"",
    b"text",
    b"\x7fELF",
    b"\n{}",
    b"\n[]",
    b"\nnull",
    b"\n1",
    b'\n{"maker": 1, "sha256": 2}',
    b"\n" + b"[" * 9999,
]
ODD += [b'\n{"maker": "\\ud800", "sha256": ""}', b'\n{"maker": "", "sha256": ["a"]}', b"\n\xff\xfe"]


def _bytes(draw: random.Random, data: bytes) -> bytes:
    """Other bytes for a file, or the same ones."""
    cut, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    flips = bytearray(data)
    for _ in range(draw.randint(1, 4) if data else 0):
        near_the_end = draw.random() < 0.3
        flips[-draw.randint(1, min(150, len(data))) if near_the_end else draw.randrange(len(data))] ^= draw.randint(
            1, 255
        )
    other = (
        data[:cut],
        data[: len(data) - draw.randint(1, 200)],
        data[:cut] + bytes(len(data) - cut),
        data[:cut] + bytes(end - cut) + data[end:],
        data[:cut] + data[end:],
        bytes(flips),
        bytes(flips),
        data + draw.randbytes(draw.randint(1, 50)),
        draw.randbytes(draw.randint(0, 300)),
        draw.choice(ODD),
        data,  # another file with the same bytes
    )
    return draw.choice(other)


HOW = {
    "bytes": (None,),
    "delete": (None,),
    "folder": ("empty", "full"),
    "link": ("nowhere", "itself", "whole", "/etc/passwd", "/"),
    "pipe": (None,),
    "mode": (0, 0o200, 0o444, 0o755, 0o664, 0o666, 0o777),
    "owner": (0, STRANGER),
    "unfinished": ("file", "folder"),
    "lock": ("folder", "link", "pipe", "gone"),
    "native": ("file", "moved", "nowhere", 0o777, 0o775, 0o500, 0o000, "gone"),
    "root": ("file", "link", "nowhere", 0o777, 0o555, "gone"),
}


def _replace(path: Path, what: str) -> None:
    if path.exists() or path.is_symlink():
        cache.remove(path)
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("/etc/passwd")


def damage(draw: random.Random, place: Path, name: str, kind: str) -> None:
    """Damages a cache; what an earlier damage has made impossible raises OSError or does nothing."""
    root, folder = place / "cache", place / "cache" / "native"
    path, how = folder / name, draw.choice(HOW[kind])
    if kind in ("native", "root"):
        it = folder if kind == "native" else root
        if isinstance(how, int):
            it.chmod(how)
        elif how in ("moved", "link"):
            shutil.move(it, place / f"{kind}-elsewhere")
            it.symlink_to(place / f"{kind}-elsewhere")
        else:
            cache.remove(it)
            if how == "file":
                it.write_text("a file")
            elif how == "nowhere":
                it.symlink_to("/nowhere/at/all")
    elif kind == "unfinished":
        left = folder / f"{cache.UNFINISHED}abc"
        left.mkdir() if how == "folder" else left.write_text("half")
    elif kind == "lock":
        _replace(folder / ".lock", how)
    elif kind == "bytes" and path.is_file() and not path.is_symlink():
        path.write_bytes(_bytes(draw, path.read_bytes()))
    elif kind == "mode" and not path.is_symlink():
        path.chmod(how)
    elif kind == "owner":
        os.chown(path, how, how, follow_symlinks=False)
    elif kind == "link" and path.is_file():
        whole = place / "whole.so"
        shutil.copy2(path, whole)
        _replace(path, "gone")
        path.symlink_to({"nowhere": "/nowhere", "itself": name, "whole": whole}.get(how, how))
    elif kind == "folder":
        _replace(path, "folder")
        if how == "full":
            (path / "sub").mkdir()
            (path / "sub" / "file").write_text("text")
    elif kind in ("pipe", "delete"):
        _replace(path, "pipe" if kind == "pipe" else "gone")


def usable(folder: Path) -> bool:
    """Whether nobody else could have put something into a folder, which is there."""
    info = folder.stat() if folder.is_dir() else None
    return info is not None and info.st_uid == os.geteuid() and not info.st_mode & 0o022 and os.access(folder, os.X_OK)


def state(place: Path, name: str, right: bytes) -> str:
    """What a library's place holds, by comparing it with what was written: `whole`, `nothing` or `damage`."""
    folder = place / "cache" / "native"
    if not usable(folder):
        return "nothing"
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return "nothing"
    if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
        return "damage"
    info = path.stat()
    if info.st_uid != os.geteuid() or info.st_mode & 0o022 or path.read_bytes() != right:
        return "damage"
    return "whole"


@pytest.mark.parametrize("first", HOW)
@settings(max_examples=settings.default.max_examples // 8, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.integers(0, 2**32))
def test_any_damage_is_told_and_the_answer_stays_right(
    workshop: Workshop, pristine: Path, first: str, seed: int
) -> None:
    draw = random.Random(seed)
    processes, has_compiler = draw.choice((1, 1, 1, 3)), draw.random() < 0.75
    place = workshop.place()
    try:
        shutil.copytree(pristine, place / "cache")
        name = libraries(place)[0].name
        right = libraries(place)[0].read_bytes()
        for kind in (first, *draw.choices(list(HOW), k=draw.choice((0, 0, 1, 2)))):
            with contextlib.suppress(OSError):
                damage(draw, place, name, kind)
        before, runs = state(place, name, right), workshop.runs()
        event(before)
        answers = workshop.run(place, processes=processes, environment={} if has_compiler else NO_COMPILER)
        told = [line for a in answers for line in a["warned"]]
        built = workshop.runs() - runs
        if before == "whole":
            assert [a["value"] for a in answers] == [RIGHT] * processes and not told and built == 0
            return
        if not has_compiler:
            assert [a["value"] for a in answers] == [None] * processes and built == 0
            assert all(len(a["warned"]) == 1 and "no C++ compiler" in a["warned"][0] for a in answers)
            assert before != "damage" or all(name in line for line in told)
            return
        assert [a["value"] for a in answers] == [RIGHT] * processes and 1 <= built <= processes
        assert before != "damage" or any(name in line for line in told)
        again = workshop.one(place)
        assert again["value"] == RIGHT and workshop.runs() == runs + built
        if usable(place / "cache" / "native"):
            assert not again["warned"] and state(place, name, right) == "whole"
            lock = place / "cache" / "native" / ".lock"
            if not lock.is_symlink() and not lock.is_dir():  # without a lock only what is old is removed
                assert not unfinished(place)
    finally:
        for folder in (place / "cache", place / "cache" / "native"):
            with contextlib.suppress(OSError):
                folder.chmod(0o755)
        shutil.rmtree(place, ignore_errors=True)


@given(st.integers(0, 20_000), st.booleans())
def test_a_disk_that_is_full_leaves_nothing_damaged(workshop: Workshop, limit: int, once: bool) -> None:
    place = workshop.place()
    whole = workshop.built.stat().st_size
    limit = min(limit, whole + 300) if once else whole + limit % 300  # about the seal
    answer = workshop.one(place, file_size=limit)
    event(str(answer["value"]))
    left = [*place.rglob("*.so")]
    if answer["value"] is None:
        assert len(answer["warned"]) in (1, 3) and not left and not unfinished(place)
        assert all(word in " ".join(answer["warned"]) for word in ("XLA", str(place / "cache" / "native")))
    assert answer["value"] in (RIGHT, None) and (limit < whole + 300 or answer["value"] == RIGHT)
    after = workshop.one(place)
    assert after["value"] == RIGHT and not after["warned"]
    shutil.rmtree(place)


# --- Folders


@pytest.mark.parametrize("what", ["a file", "nowhere", "of everybody", pytest.param("of a stranger", marks=needs_root)])
def test_without_a_cache_libraries_lie_in_one_temporary_folder(workshop: Workshop, what: str) -> None:
    place = workshop.place()
    native = place / "cache" / "native"
    if what == "a file":
        (place / "cache").write_text("")
    elif what == "nowhere":
        (place / "cache").symlink_to("/proc/no/such")
    else:
        native.mkdir(parents=True)
        if what == "of a stranger":
            os.chown(native, STRANGER, STRANGER)
        else:
            native.chmod(0o777)
    runs = workshop.runs()
    answers = [workshop.one(place) for _ in range(3)]
    assert [a["value"] for a in answers] == [RIGHT] * 3 and workshop.runs() == runs + 1
    own = place / "tmp" / f"compressx-{os.geteuid()}"
    for a in answers:
        assert len(a["warned"]) == 1, a
        assert all(word in a["warned"][0] for word in (str(native), str(own), "$COMPRESSX_CACHE"))
    assert list((place / "tmp").iterdir()) == [own] and len(list(own.glob("*.so"))) == 1 and not unfinished(place)
    lean = workshop.one(place, environment=NO_COMPILER)
    assert lean["value"] == RIGHT and not lean["logged"]


def test_a_disk_without_room_is_told_before_anything_is_compiled(workshop: Workshop) -> None:
    place, runs = workshop.place(), workshop.runs()
    answer = workshop.one(place, space=1 << 60)
    assert answer["value"] is None and workshop.runs() == runs and not unfinished(place)
    assert len(answer["warned"]) == 3 and all("MiB are free there" in w for w in answer["warned"][:2])


def test_no_folder_at_all_is_told(workshop: Workshop) -> None:
    place, runs = workshop.place(), workshop.runs()
    (place / "cache").write_text("")
    (place / "tmp" / f"compressx-{os.geteuid()}").write_text("")
    answer = workshop.one(place)
    assert answer["value"] is None and workshop.runs() == runs
    assert len(answer["warned"]) == 3 and "no folder can hold" in answer["warned"][2]


@needs_root
@pytest.mark.parametrize("whose", ["folder", "file", "link"])
def test_nothing_that_a_stranger_may_have_written_is_opened(workshop: Workshop, pristine: Path, whose: str) -> None:
    place, runs = workshop.place(), workshop.runs()
    (place / "cache").write_text("")  # so that the temporary folder has to do
    own = place / "tmp" / "compressx-0"
    shutil.copytree(pristine / "native", own)
    if whose == "link":
        own.rename(place / "theirs")
        own.symlink_to(place / "theirs")
        os.chown(own, STRANGER, STRANGER, follow_symlinks=False)
    else:
        os.chown(own if whose == "folder" else next(own.glob("*.so")), STRANGER, STRANGER)
    answer = workshop.one(place)
    if whose == "file":  # in a folder of our own it is replaced
        assert answer["value"] == RIGHT and workshop.runs() == runs + 1
        assert next(own.glob("*.so")).stat().st_uid == 0
    else:
        assert answer["value"] is None and workshop.runs() == runs
    assert any(str(own) in w and f"belongs to the user {STRANGER}" in w for w in answer["warned"])
    lean = workshop.one(place, environment=NO_COMPILER)
    assert (lean["value"] == RIGHT) == (whose == "file")


@needs_root
def test_what_root_has_built_ahead_serves_other_users(workshop: Workshop, pristine: Path) -> None:
    place, runs = workshop.place(), workshop.runs()
    shutil.copytree(pristine, place / "cache")
    (place / "tmp").chmod(0o1777)
    for environment in ({}, NO_COMPILER):
        answer = workshop.one(place, user=STRANGER, environment=environment)
        assert answer["value"] == RIGHT and not answer["warned"] and not answer["logged"]
    assert workshop.runs() == runs and not list((place / "tmp").iterdir())
    libraries(place)[0].write_bytes(b"damaged")  # and they cannot mend it: each builds into a folder of their own
    for user in (STRANGER, STRANGER, STRANGER + 1):
        answer = workshop.one(place, user=user, environment={"CXX": GXX})
        assert answer["value"] == RIGHT and len(answer["warned"]) == 2 and "damaged" in answer["warned"][0]
    assert {p.name for p in (place / "tmp").iterdir()} == {f"compressx-{STRANGER}", f"compressx-{STRANGER + 1}"}


# --- Compilers


def script(workshop: Workshop, name: str, text: str) -> str:
    path = workshop.folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"'{path}'" if " " in name else str(path)


def test_the_compiler_may_have_several_words(workshop: Workshop) -> None:
    wrapper = script(workshop, "a wrapper", 'echo "$1" > "$(dirname "$0")/first-word"; shift; exec "$@"')
    for command in (f"env {GXX}", f"{wrapper} 'two words' {GXX} -O1", f"  {GXX} "):
        answer = workshop.one(workshop.place(), environment={"CXX": command})
        assert answer["value"] == RIGHT and not answer["warned"], answer
    assert (workshop.folder / "first-word").read_text() == "two words\n"
    answer = workshop.one(workshop.place(), environment={"CXX": "", "COMPRESSX_NATIVE_FLAGS": "-DTEXT='two words' -g"})
    assert answer["value"] == RIGHT and not answer["warned"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "echo first; echo >&2; echo second >&2; echo third >&2; echo fourth >&2; exit 3",
            ": first | second | third",
        ),
        ("exit 1", "it said nothing"),
        ("kill -9 $$", "exit code -9"),
        ("exit 0", "wrote no library"),
        ("printf '\\377\\376 bytes' >&2; exit 1", "\ufffd\ufffd bytes"),
        ("yes error | head -c 3000000 >&2; exit 1", "error | error | error"),
    ],
)
def test_a_compiler_that_fails_gives_its_reason(workshop: Workshop, text: str, words: str) -> None:
    place = workshop.place()
    command = script(workshop, "fails", text)
    answer = workshop.one(place, environment={"CXX": command}, times=3)
    assert answer["value"] is None and len(answer["warned"]) == 1 and not unfinished(place) and not libraries(place)
    line = answer["warned"][0]
    assert words in line and command in line and str(workshop.source) in line and "XLA" in line and len(line) < 2000
    assert workshop.one(place)["value"] == RIGHT


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("no-such-compiler -O2", "$CXX='no-such-compiler -O2' is not found"),
        ("g++ 'open", "cannot be split into words"),
        ("/dev/null", "is not found"),
        ("NOT-A-PROGRAM", "cannot be run"),
    ],
)
def test_a_compiler_that_is_none_is_told(workshop: Workshop, command: str, words: str) -> None:
    place = workshop.place()
    if words == "cannot be run":
        command = script(workshop, "no-program", "")
        Path(command).write_bytes(b"\x7fELF and no more")
    answer = workshop.one(place, environment={"CXX": command}, times=2)
    assert answer["value"] is None and len(answer["warned"]) == 1 and words in answer["warned"][0]
    flags = workshop.one(place, environment={"COMPRESSX_NATIVE_FLAGS": "'"})
    assert flags["value"] is None and "$COMPRESSX_NATIVE_FLAGS" in flags["warned"][0]


def test_no_compiler_and_nothing_built_is_told_and_off_is_silent(workshop: Workshop) -> None:
    place = workshop.place()
    answer = workshop.one(place, environment=NO_COMPILER, times=3)
    assert answer["value"] is None and len(answer["warned"]) == 1 and not list(place.rglob("*.so"))
    assert all(word in answer["warned"][0] for word in ("no C++ compiler", "XLA", str(place / "cache" / "native")))
    off = workshop.one(place, environment={"COMPRESSX_NATIVE": "off"})
    assert off["value"] is None and not off["warned"] and not off["logged"] and not (place / "cache").exists()


def test_a_library_that_does_not_open_is_built_anew_by_another_compiler_alone(workshop: Workshop) -> None:
    bad = script(
        workshop, "bad", f'for out; do :; done; mktemp {workshop.folder}/runs/XXXXXXXX; echo "no library" > "$out"'
    )
    place, runs = workshop.place(), workshop.runs()
    for environment in ({"CXX": bad}, {"CXX": bad}, NO_COMPILER):  # compiled once, not in every process
        answer = workshop.one(place, environment=environment)
        assert answer["value"] is None and len(answer["warned"]) == 1 and "cannot be opened" in answer["warned"][0]
        assert str(libraries(place)[0]) in answer["warned"][0] and workshop.runs() == runs + 1
    answer = workshop.one(place, processes=3)
    assert answer["value"] == RIGHT and any("cannot be opened" in w for w in answer["warned"])
    assert workshop.runs() == runs + 2
    assert workshop.one(place)["warned"] == []
    missing = workshop.one(place, symbols=["answer", "question"])
    assert missing["value"] is None and "question" in missing["warned"][0]


# --- Several processes, and processes that are killed


@pytest.mark.parametrize("lock", [True, False])
def test_processes_that_start_together_all_succeed(workshop: Workshop, lock: bool) -> None:
    place, runs = workshop.place(), workshop.runs()
    if not lock:  # as on a file system without locks
        (place / "cache" / "native" / ".lock").mkdir(parents=True)
    answers = workshop.run(place, processes=4, environment={"DELAY": "0.5"})
    assert [a["value"] for a in answers] == [RIGHT] * 4 and not any(a["warned"] for a in answers)
    assert workshop.runs() - runs == 1 if lock else workshop.runs() - runs <= 4
    assert any("waiting" in line for a in answers for line in a["logged"]) == lock
    assert len(libraries(place)) == 1 and not unfinished(place) and not list((place / "tmp").iterdir())


def start(workshop: Workshop, place: Path, **environment: str) -> subprocess.Popen:
    """A process of its own that builds, for one that is killed."""
    code = (  # where the tests run in the background of a shell an interrupt is ignored, and processes inherit that
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys, pathlib; from compressx.native import build as compiled;"
        "print(compiled.load(compiled.Library(pathlib.Path(sys.argv[1]), {}, ('-shared', '-fPIC'))).answer())"
    )
    environment = {"COMPRESSX_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp")} | environment
    return subprocess.Popen([sys.executable, "-c", code, workshop.source], env=os.environ | environment)


def wait_for(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_a_killed_build_leaves_is_removed_by_the_next(workshop: Workshop) -> None:
    place = workshop.place()
    process = start(workshop, place, CXX=str(workshop.compiler), DELAY="2")
    wait_for(lambda: list(place.rglob(f"{cache.UNFINISHED}*/library")))
    process.kill()
    process.wait()
    assert unfinished(place) and not libraries(place)
    answer = workshop.one(place)  # while the compiler of the killed process goes on
    assert answer["value"] == RIGHT and not answer["warned"]
    time.sleep(2.5)
    assert not unfinished(place) and len(libraries(place)) == 1 and workshop.one(place)["value"] == RIGHT


def test_an_interrupt_ends_the_compiler_and_leaves_nothing(workshop: Workshop) -> None:
    place = workshop.place()
    slow = script(workshop, "slow", f"echo $$ > {place}/pid.new && mv {place}/pid.new {place}/pid; sleep 300 & wait")
    process = start(workshop, place, CXX=slow)
    wait_for((place / "pid").exists)
    time.sleep(2)  # the process waits for its compiler by now
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0 and time.monotonic() - began < 30
    group = int((place / "pid").read_text())
    wait_for(lambda: not _alive(group))
    assert not unfinished(place) and not libraries(place)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# --- Sealed files, and the rule for the folder


@given(st.binary(max_size=200), st.text(max_size=20), st.text(max_size=30))
def test_a_seal_holds_for_its_bytes_and_its_name(body: bytes, name: str, maker: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(body)
        cache.seal(path, "file", maker)
        found = cache.read_seal(path)
        assert found is not None and found.maker == maker and path.read_bytes().startswith(body)
        path.rename(path.with_name("other"))
        with pytest.raises(cache.DamagedError, match="damaged"):
            cache.read_seal(path.with_name("other"))
        assert cache.read_seal(path) is None
        cache.seal(path.with_name("other"), name, maker)  # a seal over a seal
        assert stat.S_IMODE(path.with_name("other").stat().st_mode) & 0o022 == 0


@pytest.mark.parametrize("data", ODD)
def test_what_was_never_sealed_is_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(cache.DamagedError, match="damaged"):
        cache.read_seal(tmp_path / "file")


@pytest.mark.parametrize(
    ("own", "common", "right"),
    [
        ("/a", "/b", "/a"),
        ("", "/b", "/b/compressx"),
        (None, "/b", "/b/compressx"),
        (None, "", "/home/me/.cache/compressx"),
        ("~/x", None, "/home/me/x"),
        (None, "~/x", "/home/me/x/compressx"),
    ],
)
def test_one_rule_says_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, own: str | None, common: str | None, right: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("COMPRESSX_CACHE", own), ("XDG_CACHE_HOME", common)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(right) and cache.cache_folder("native") == Path(right) / "native"
    assert cache_dir() == Path(right) / "data" and tuning._plans().parent == Path(right) / "tuning"


def test_without_a_home_no_folder_named_tilde_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESSX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user has no entry
    with pytest.raises(FileNotFoundError, match=r"\$COMPRESSX_CACHE"):
        cache.cache_folder()
    assert compiled._folders() == [Path(tempfile.gettempdir()) / f"compressx-{os.geteuid()}"]


# --- The doctor, and the kernels themselves


def test_the_doctor_builds_ahead_and_names_what_fails(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(workshop.compiler))
    shared = ("-shared", "-fPIC")
    made = [compiled.Library(workshop.source, {}, flags) for flags in (shared, (*shared, "-g"))]
    monkeypatch.setattr(doctor, "LIBRARIES", made)
    assert doctor.compiler().ok is False and "does not run" in doctor.compiler().found  # it has no version
    before = doctor.kernels(build=False)
    assert not before.ok and "0 of 2" in before.found and "--build (about 10 s)" in before.fix
    assert not (tmp_path / "cache").exists()
    built = doctor.kernels(build=True)
    native = tmp_path / "cache" / "native"
    assert built.ok and built.found == f"2 of 2 are built; in {native}" and not built.fix
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.kernels(build=True) == built and doctor.kernels(build=False) == built._replace(needed=False)
    damaged = min(native.glob("*.so"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    for build in (False, True):
        found = doctor.kernels(build)
        assert not found.ok and "1 of 2" in found.found and str(damaged) in found.found and found.fix
    assert "no-such-compiler" in found.found and not doctor.compiler().ok
    monkeypatch.setenv("CXX", f"env {GXX}")
    assert doctor.compiler().ok and doctor.compiler().found.startswith(f"env {GXX}: ")
    mended = doctor.kernels(build=True)
    assert mended.found.startswith(f"2 of 2 are built; in {native}; {damaged}: ") and doctor.kernels(True) == built
    monkeypatch.setenv("COMPRESSX_NATIVE", "off")
    assert not doctor.kernels(build=True).ok and "off" in doctor.kernels(build=True).found
    assert (cli.main(["doctor"]), cli.main(["doctor", "--build"])) == (0, 1)  # what was asked for was not done
    monkeypatch.delenv("COMPRESSX_NATIVE")
    assert cli.main(["doctor", "--build"]) == 0


@pytest.mark.slow
def test_the_kernels_themselves_are_mended(tmp_path: Path) -> None:
    """Four compilations of all kernels' sources at most: some minutes on a loaded machine."""
    network = (
        "import jax, jax.numpy as jnp, flax.linen as nn, compressx as cx\n"
        "class M(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train=False): return nn.Conv(8, (3, 3))(x)\n"
        "x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3)); m = M(); v = m.init(jax.random.key(0), x)\n"
        "f = cx.compile(m, v); print(f.path, bool(jnp.allclose(f(x), m.apply(v, x), atol=1e-5)))\n"
    )
    environment = os.environ | {"COMPRESSX_CACHE": str(tmp_path), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}

    def run(*command: str, **more: str) -> subprocess.CompletedProcess:
        command = (sys.executable, *command)
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=1500)

    assert "4 of 4 are built" in run("-m", "compressx", "doctor", "--build").stdout
    lean = run("-c", network, CXX="", PATH="/nowhere")
    assert lean.stdout.startswith("native/") and lean.stdout.endswith("True\n") and "compressx" not in lean.stderr
    found = list((tmp_path / "native").glob("*.so"))
    assert len(found) == 4
    for path in found:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    lean = run("-c", network, CXX="", PATH="/nowhere")
    assert lean.stdout == "xla True\n" and "no C++ compiler" in lean.stderr and "pattern_conv" in lean.stderr
    mended = run("-c", network)
    assert mended.stdout.startswith("native/") and mended.stdout.endswith("True\n") and "built anew" in mended.stderr
