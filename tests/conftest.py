"""Settings that every test runs under: two devices, strict numerics, nothing drawn at random in CI.

The environment is changed before jax is imported, and processes that tests start inherit it.

    COMPRESSX_TEST_PLATFORM   where jax runs ('cpu' unless set; 'cuda' or 'tpu' to test a device)
    COMPRESSX_DATA            folder of data sets; tests that need it skip with a reason where it is absent
    COMPRESSX_TEST_CACHE      folder of compiled programs, '.pytest_cache/xla' unless set; empty: keep none
    COMPRESSX_TEST_OPTIMIZE   1: programs are compiled as for users, as `make test-all` does; else quickly
"""

import hashlib
import importlib.util
import itertools
import mmap
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import numpy as np
import pytest

_ROOT = Path(__file__).resolve().parent.parent


def _machine() -> str:
    """Names what a compiled program depends on: the instruction set and jaxlib's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    facts = f"{platform.machine()} {features} {version('jaxlib')}"
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _known(flag: str) -> bool:
    """Says whether the installed jaxlib has an XLA flag of that name: XLA ends the process at one that it has not.

    No list of flags can be asked for before XLA has read them. But a flag is registered under its name, which therefore
    stands in jaxlib's library as a string of its own, between two zero bytes; that of a removed flag does not.
    """
    package = importlib.util.find_spec("jaxlib")
    assert package is not None and package.submodule_search_locations, "jaxlib is not installed"
    for library in Path(package.submodule_search_locations[0]).glob("libjax*.so"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text.find(b"\0" + flag.encode() + b"\0") >= 0:
                return True
    return False


def _set_environment() -> None:
    wanted = {"xla_force_host_platform_device_count": "2"}
    if os.environ.get("COMPRESSX_TEST_OPTIMIZE") != "1":
        # Compiling is most of the suite's time, and over half of it is making code fast that runs once. XLA's own
        # rewriting is the same; how loops are fused and LLVM's optimization are not.
        quick = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}
        wanted |= {name: value for name, value in quick.items() if _known(name)}
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += [f"--{name}={value}" for name, value in wanted.items() if not any(name in flag for flag in flags)]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_PLATFORMS"] = os.environ.get("COMPRESSX_TEST_PLATFORM", "cpu")
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Drivers are run from a checkout and are not installed: processes that tests start find them by this.
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # A cached program gives the same bits as a fresh one.
    cache = os.environ.get("COMPRESSX_TEST_CACHE", str(_ROOT / ".pytest_cache" / "xla"))
    if cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache).resolve() / _machine())
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


_set_environment()

import jax  # noqa: E402  (reads the environment when imported)
from jax._src import dtypes as _jax_dtypes  # noqa: E402  (see _spare_third_parties)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_JAX_FOLDER = str(Path(jax.__file__).parent)


def _called_by_third_party(frame: FrameType | None) -> bool:
    while frame is not None:
        file = frame.f_code.co_filename
        if "site-packages" in file:
            if not file.startswith(_JAX_FOLDER):
                return True
        elif file.startswith(str(_ROOT)):
            return False
        frame = frame.f_back
    return False


def _spare_third_parties() -> None:
    """Holds this project's code, and no other, to strict dtype promotion.

    optax multiplies int32 counters by Python floats (Adam's bias correction, cosine schedules, MultiSteps), and so does
    flax's avg_pool: strict promotion refuses that, and jax can only be strict everywhere or nowhere. So where a
    promotion is refused, the innermost caller outside jax decides: code of this project fails, any other passes.
    """
    strict = getattr(_jax_dtypes, "lattice_result_type", None)
    if strict is None:
        raise ImportError(
            f"jax {jax.__version__} has no jax._src.dtypes.lattice_result_type any more, by which the suite spares "
            "third parties strict promotion; find in jax/_src/dtypes.py what refuses a promotion now, and wrap that"
        )

    def lattice_result_type(*args: Any) -> Any:
        try:
            return strict(*args)
        except jax.dtypes.TypePromotionError:
            if not _called_by_third_party(sys._getframe(1)):
                raise
            with jax.numpy_dtype_promotion("standard"):
                return strict(*args)

    _jax_dtypes.lattice_result_type = lattice_result_type


_spare_third_parties()

# A deadline would fail on the first, compiling example. CI draws the same examples every time.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=12,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", hypothesis.settings.get_profile("default"), max_examples=400)
hypothesis.settings.load_profile("default")

_NO_DATA = "needs data: set COMPRESSX_DATA to the folder that docs/data.md describes"


def _data_folder() -> Path | None:
    folder = os.environ.get("COMPRESSX_DATA")
    return Path(folder) if folder and Path(folder).is_dir() else None


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names bytes by their number: gzip writes the time into them, and two workers must agree on every test's name."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `data` where there are none."""
    if _data_folder() is None:
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason=_NO_DATA))


_LOOK_EVERY, _CLEAR_EVERY = 20, 100
_MANY_MAPS = 7000  # some 2000 programs, which hold about 3 GB
_tests_done = itertools.count(1)


def _many_programs(done: int) -> bool:
    try:
        with open("/proc/self/maps", "rb") as maps:
            return maps.read().count(b"\n") > _MANY_MAPS
    except OSError:  # no Linux: by the number of tests
        return done % _CLEAR_EVERY == 0


def pytest_runtest_teardown() -> None:
    """Drops compiled programs where they have become many: each holds memory maps, and a process may have 65530.

    Not more often: dropping them takes a second or two, and the common ones have to be read from the cache again.
    """
    done = next(_tests_done)
    if done % _LOOK_EVERY == 0 and _many_programs(done):
        jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Gives the folder in `$COMPRESSX_DATA`; skips the test where there is none."""
    folder = _data_folder()
    if folder is None:
        pytest.skip(_NO_DATA)
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """Gives NumPy's generator with a fixed seed, the same in every test."""
    return np.random.default_rng(0)
