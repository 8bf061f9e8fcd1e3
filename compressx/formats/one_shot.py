"""From file to file: the weights of any safetensors file projected onto sets once, packed and saved; no model code.

Rules are taken one after the other, each with its leaves, and what a rule gave is kept as a saved model of its own in
`OUT.partial/` until all are done. An interrupted run is resumed by the same command: a part is used again where the
leaves, the rule and the release that made it are the same, by a checksum over all of them. In the end the parts are
written together, straight from the disk, and removed.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx._harden import harden
from compressx.formats import container
from compressx.formats.base import CompressedFileError
from compressx.formats.file import Sizes, save_model
from compressx.formats.loading import OpenModel, rules_of
from compressx.formats.shards import open_tensors
from compressx.formats.strict_json import to_json
from compressx.formats.tensors import TensorFile, raw
from compressx.formats.trees import nest
from compressx.rules import Bound, Rules, resolve
from compressx.tree import Key, in_their_precision, keys, path_name


class Compressed(NamedTuple):
    """What `compress` did.

    Attributes:
      sizes: bytes, as `save_model` counts them.
      weights, kept: of all leaves, and those that are not zero.
      constrained, kept_constrained: of the leaves under a rule.
      resumed: parts that an earlier run had finished.
      seconds: elapsed, of this run.
    """

    sizes: Sizes
    weights: int
    kept: int
    constrained: int
    kept_constrained: int
    resumed: int
    seconds: float


class Weights(Mapping[str, np.ndarray]):
    """The arrays of a safetensors file, or of sharded ones, by path; views of the files. A `/` in a name is a level.

    Attributes:
      shapes: nested dictionaries of `jax.ShapeDtypeStruct`.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, the index or the folder; raises as `open_tensors` does."""
        self._file = open_tensors(path, mapped=True)
        self._name = {path_name(tuple(name.split("/"))): name for name in self._file.entries}
        keyed = [tuple(name.split("/")) for name in self._file.entries]
        self.shapes = nest(keyed, [jax.ShapeDtypeStruct(e.shape, e.dtype) for e in self._file.entries.values()])

    def __getitem__(self, path: str) -> np.ndarray:
        return self._file.array(self._name[path])

    def __iter__(self) -> Iterator[str]:
        return map(path_name, keys(self.shapes))

    def __len__(self) -> int:
        return len(self._name)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()


def weights_of(path: Path) -> Weights | OpenModel:
    """The leaves of a file, whether they lie in it as they are or as `save_model` packed them."""
    file = open_tensors(path)
    packed = "compressx" in file.metadata
    file.close()
    return OpenModel(path) if packed else Weights(path)


def compress(
    source: str | Path,
    target: str | Path,
    rules: Rules,
    *,
    coding: str = "none",
    shard_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Compressed:
    """Projects the leaves of a file onto their sets, once, and saves them packed; resumes where it was interrupted.

    Args:
      source: a safetensors file, the index of a sharded one, or a folder that holds one.
      target: the file to write; its folder must exist.
      rules: pairs (pattern, constraint), or with axes: those of a PyTorch network lie `[out, in]`, which the rule must
        say where a set asks.
      coding, shard_bytes: as `save_model` takes them.
      progress: called with the weights done so far and all of them.

    Returns:
      What was kept, bytes and seconds.

    Raises:
      CompressedFileError: the source is damaged or inconsistent; the text begins with its name.
      ConstraintViolation: a projected leaf does not lie in its sets.
      ValueError: a rule matches no leaf, or its set does not fit it; a leaf holds NaN or infinity.
      OSError: a file cannot be read or written; what is finished stays in `TARGET.partial`.

    Example:
      >>> import safetensors.numpy
      >>> w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
      >>> safetensors.numpy.save_file({"layer.weight": w}, "dense.safetensors")
      >>> from compressx.formats import one_shot
      >>> done = one_shot.compress("dense.safetensors", "small.safetensors", [(".*weight", compressx.n_of_m(2, 4))])
      >>> done.kept, done.weights
      (2048, 4096)
    """
    start = time.monotonic()
    target = Path(target)
    try:
        leaves = weights_of(Path(source))
    except CompressedFileError as error:
        raise CompressedFileError(f"{source}: {error}") from None
    try:
        return _all(leaves, target, rules, coding, shard_bytes, progress, start)
    finally:
        leaves.close()


class _Part(NamedTuple):
    """Leaves that are projected together, under a rule or under none."""

    paths: tuple[str, ...]
    bound: Bound | None


def _all(
    leaves: Weights | OpenModel,
    target: Path,
    rules: Rules,
    coding: str,
    shard_bytes: int | None,
    progress: Callable[[int, int], None] | None,
    start: float,
) -> Compressed:
    bound = resolve(rules, leaves.shapes)
    under = {p for b in bound for p in b.paths}
    parts = [*(_Part(b.paths, b) for b in bound), *(_Part((p,), None) for p in leaves if p not in under)]
    keyed = dict(zip(leaves, keys(leaves.shapes), strict=True))
    total, done, resumed = sum(x.size for x in jax.tree.leaves(leaves.shapes)), 0, 0
    folder = target.with_name(target.name + ".partial")
    folder.mkdir(exist_ok=True)
    entries: dict[str, Any] = {}
    listed: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    kept = {True: 0, False: 0}
    weights = {True: 0, False: 0}
    for number, part in enumerate(parts):
        file = folder / f"{number:05}.safetensors"
        mark = _mark(leaves, part)
        content = _finished(file, mark)
        if content is None:
            _make(file, mark, leaves, part, keyed)
            content = _finished(file, mark)
            assert content is not None  # it was written just now
        else:
            resumed += 1
        about, held = content
        for entry in about["leaves"]:
            entries[path_name(entry["path"])] = entry
        for rule in about["rules"]:
            names = {name: name.replace("rule 0:", f"rule {number}:", 1) for name in rule["structure"]}
            listed.append(rule | {"structure": list(names.values())})
            held = {names.get(name, name): a for name, a in held.items()}
        arrays |= held
        kept[part.bound is not None] += about["extra"]["kept"]
        size = about["extra"]["weights"]
        weights[part.bound is not None] += size
        done += size
        if progress is not None:
            progress(done, total)
    merged = {"model": None, "extra": None, "leaves": [entries[p] for p in leaves], "rules": listed}
    stored, size = container.write(target, merged, arrays, coding, shard_bytes)
    packed = sum(arrays[name].nbytes for e in entries.values() for name in e["arrays"].values())
    shutil.rmtree(folder)
    dense = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaves.shapes))
    sizes = Sizes(dense, packed, stored, size)
    seconds = time.monotonic() - start
    return Compressed(sizes, total, sum(kept.values()), weights[True], kept[True], resumed, seconds)


def _mark(leaves: Weights | OpenModel, part: _Part) -> str:
    """A checksum over what makes a part: the leaves' bits, the rule, the release."""
    rule = None
    if part.bound is not None:
        rule = [dict(part.bound.constraint.spec), str(part.bound.axes or "")]
    digest = hashlib.sha256(to_json([version("compressx"), rule]).encode())
    for path in part.paths:
        w = leaves[path]
        digest.update(to_json([path, w.dtype.name, list(w.shape)]).encode())
        digest.update(raw(np.ascontiguousarray(w)).data)
    return digest.hexdigest()


def _finished(file: Path, mark: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """The content and arrays of a part that is there, whole and of the same mark; its arrays stay on the disk."""
    try:
        part = TensorFile(file, mapped=True)
    except (OSError, CompressedFileError):
        return None
    try:
        header, stored = container.checked(part)
        _, content, _ = container.parsed_header(header, stored.keys())
    except CompressedFileError:
        return None
    finally:
        part.close()
    extra = content.get("extra")
    return (content, stored) if isinstance(extra, dict) and extra.get("mark") == mark else None


def _make(
    file: Path, mark: str, leaves: Weights | OpenModel, part: _Part, keyed: Mapping[str, tuple[Key, ...]]
) -> None:
    """Projects the leaves of a part and saves them."""
    held = [leaves[p] for p in part.paths]
    tree: Any = nest([keyed[p] for p in part.paths], held)
    extra = {"mark": mark, "weights": sum(x.size for x in held)}
    if part.bound is None:
        save_model(file, tree, extra=extra | {"kept": _kept(held)})
        return
    rules = rules_of([part.bound])
    with in_their_precision(tree):
        hard = harden(jax.tree.map(jnp.asarray, tree), rules, fresh=True)
        kept = _kept([np.asarray(x) for x in jax.tree.leaves(hard.params)])
        save_model(file, hard, rules, extra=extra | {"kept": kept})


def _kept(held: list[np.ndarray]) -> int:
    return sum(int(np.count_nonzero(x)) for x in held)
