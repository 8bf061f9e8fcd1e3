"""Saved models: every leaf packed, the rules and structures it satisfies, the model's name; one file, safe to open.

The content of the header (see `container`):

    model   {"class" or "name", "options"} or null        extra   any JSON, as given to `save_model`
    leaves  [{"path": [keys], "shape", "dtype", "format": {"name", "version"}, "meta",
              "arrays": {array: name in the file}}]
    rules   [{"paths": [[keys]], "axes", "spec", "structure": [names in the file]}], one per constrained leaf or joint
            set

The arrays of "structure" are the leaves of the tuple of structures over the sets; "axes" is null, or the words of the
rule. Files of version 1 (release 0.1) have a path as one string, joined by slashes, and a format as its name; they are
read as well.

Nothing in a file is executed: constraints come back through `constraints.from_spec`, patterns are escaped paths, and
the pytree of a structure is the one that the constraint itself makes.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx._harden import agree, parts, prove
from compressx._harden import structures as choose
from compressx.constraints import from_spec, on_leaf
from compressx.formats import container, packing
from compressx.formats.base import Packed, native, nbytes
from compressx.formats.tensors import Spool
from compressx.formats.trees import MAX_NAME, nest
from compressx.rules import Bound, Rules, pairs, resolve
from compressx.tree import Key, in_their_precision, keys, path_name

_IN_MEMORY = 1 << 28  # bytes of packed leaves from which on they wait on the disk


class Sizes(NamedTuple):
    """Bytes of a saved model.

    Attributes:
      dense: of the leaves as they are in memory.
      packed: of the leaves in their formats, indices included.
      stored: of all arrays in the file, structures too, after entropy coding.
      file: of the whole file.

    Example:
      >>> sizes = compressx.save_model("model.safetensors", {"kernel": np.eye(64, dtype=np.float32)}, [])
      >>> sizes.dense, sizes.packed < sizes.dense, sizes.file > sizes.packed
      (16384, True, True)
    """

    dense: int
    packed: int
    stored: int
    file: int


class SavedModel(NamedTuple):
    """What a file holds.

    Attributes:
      params: nested dictionaries of NumPy arrays, a level for each key of a path; keys are strings, or integers where
        the tree that was saved had lists or integer keys.
      rules: (pattern, constraint), or with axes, that bind exactly the leaves that were bound.
      structures: the structure of the sets of each constraint, by name, as in a `Hardened`.
      model: as given to `save_model`: {"class" or "name", "options"} or None.
      extra: as given to `save_model`.
      packed: path -> the leaf as packed.
      sizes: bytes.
      bound: the rules, each with its leaves, as `rules.resolve` binds them.

    Example:
      >>> _ = compressx.save_model("model.safetensors", {"kernel": np.eye(64, dtype=np.float32)}, [])
      >>> saved = compressx.load_model("model.safetensors")
      >>> saved.params["kernel"].shape, list(saved.packed)
      ((64, 64), ['kernel'])
    """

    params: Any
    rules: list[tuple[Any, ...]]
    structures: dict[str, tuple[Any, ...]]
    model: dict[str, Any] | None
    extra: Any
    packed: dict[str, Packed]
    sizes: Sizes
    bound: tuple[Bound, ...]


def save_model(
    path: str | os.PathLike[str],
    params: Any,
    rules: Rules = (),
    structures: Mapping[str, Any] | None = None,
    *,
    model: Mapping[str, Any] | None = None,
    extra: Any = None,
    layout: Sequence[tuple[str, str]] = (),
    coding: str = "none",
    shard_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sizes:
    """Packs every leaf and writes the file in one step; what was there before survives any failure.

    Two leaves are packed together where there are two cores. Packed leaves beyond some hundred MiB wait in a nameless
    file beside the one that is written, so that little of the model is in memory a second time.

    Args:
      path: the file, usually `compressed.safetensors`; its folder must exist.
      params: what `harden` or `retract` returned, or any pytree of concrete arrays; give all of a model's variables
        (`{"params": ..., "batch_stats": ...}`) to keep them all. Empty containers are not kept, and functions among
        the leaves (of an Equinox module) are not either: `load_model(path, like=module)` takes them from there.
      rules: pairs (pattern, constraint); None as a constraint leaves a leaf free.
      structures: that of the constraints, beside plain parameters; None: chosen for them.
      model: `{"class": "package.module:Class", "options": {...}}`, or a "name" of the caller's own instead of "class",
        so that the network can be built again. Loading imports nothing.
      extra: JSON-able facts to keep (accuracy, data set, seed).
      layout: pairs (pattern, format) that fix the format of leaves; all others take the smallest.
      coding: "zlib" or "lzma" to entropy-code the arrays of the file, where that saves bytes.
      shard_bytes: None for one file. Otherwise what packs to more is written as several files of so many bytes of
        arrays each, `model-00001-of-00002.safetensors` and so on, and `model.safetensors.index.json`; `load_model`
        takes the path that was given here, or the index, or the folder.
      progress: called with the weights packed so far and those of the whole model, after every leaf.

    Returns:
      The bytes before and after.

    Raises:
      ConstraintViolation: weights that do not lie in their sets with that structure, to the bit.
      ValueError: a name, format, structure or header that could not be read back.
      OSError: the file cannot be written.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> hard = compressx.harden(params, rules, fresh=True)
      >>> sizes = compressx.save_model("compressed.safetensors", hard, rules, extra={"seed": 0})
      >>> sizes.dense, sizes.packed
      (16, 9)
    """
    params, held = parts(params, structures)
    params = jax.tree.map(lambda x: None if callable(x) and not hasattr(x, "dtype") else x, params)
    rules, keyed = pairs(rules), keys(params)
    names = list(map(path_name, keyed))
    nest(keyed)
    leaves, params = _native(names, params)
    bound = resolve(rules, params) if rules else ()
    given = held if held is not None else choose(params, rules) if rules else {}
    given = agree(_renamed(given, bound), bound, leaves, "what is given as structures")
    check_model(model)
    parts_of = {}
    for b in bound:
        parts_of[b.name], given[b.name] = _native(f"{b.name}: its structure", given[b.name])
    if bound:
        prove(params, rules, given, chosen=held is None)
    fixed = _layout(layout, names)
    target = Path(path)
    # formats for a structure are written for Flax's layout: a leaf with axes of its own takes one of the others
    alone = {p: on_leaf(b.constraint, given[b.name], i) for b in bound if b.axes is None for i, p in enumerate(b.paths)}
    tasks = [(name, x, *alone.get(name, (None, None)), fixed.get(name)) for name, x in zip(names, leaves, strict=True)]
    with contextlib.closing(Spool(target.parent)) as spool:
        packed = _pack_all(tasks, spool, progress)
        arrays: dict[str, np.ndarray] = {}
        entries, described = [], []
        for key, name, p in zip(keyed, names, packed, strict=True):
            entry, held_arrays = leaf_entry(key, name, p)
            entries.append(entry)
            arrays |= held_arrays
        for number, b in enumerate(bound):
            entry, held_arrays = _rule_entry(number, b, parts_of[b.name], keyed)
            described.append(entry)
            arrays |= held_arrays
        content = {"model": dict(model) if model else None, "extra": extra, "leaves": entries, "rules": described}
        stored, size = container.write(target, content, arrays, coding, shard_bytes)
    return Sizes(sum(x.nbytes for x in leaves), sum(map(nbytes, packed)), stored, size)


def _pack_all(
    tasks: Sequence[tuple[str, np.ndarray, Any, Any, str | None]],
    spool: Spool,
    progress: Callable[[int, int], None] | None,
) -> list[Packed]:
    """All leaves packed, in their order, two of them at a time; the large ones on the disk."""
    total, done, held = sum(t[1].size for t in tasks), 0, 0
    lock = threading.Lock()

    def one(task: tuple[str, np.ndarray, Any, Any, str | None]) -> Packed:
        nonlocal done, held
        name, leaf, constraint, structure, format = task
        try:
            # a context of the caller's own, such as `jax.enable_x64`, does not reach this thread
            with in_their_precision(() if constraint is None else (leaf, structure)):
                packed = packing.pack(leaf, constraint, structure, format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        with lock:
            own = {key: a for key, a in packed.arrays.items() if not np.may_share_memory(a, leaf)}
            held += sum(a.nbytes for a in own.values())
            if held > _IN_MEMORY:
                packed = packed._replace(arrays=packed.arrays | {key: spool.keep(a) for key, a in own.items()})
            done += leaf.size
            if progress is not None:
                progress(done, total)
        return packed

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(one, task) for task in tasks]
        try:
            return [w.result() for w in waiting]
        except BaseException:
            for w in waiting:
                w.cancel()
            raise


def leaf_entry(key: Sequence[Key], name: str, packed: Packed) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the content of a header says of a packed leaf, and its arrays by their names in the file."""
    called = {array: f"{name}:{array}" for array in packed.arrays}
    entry = {
        "path": list(key),
        "shape": list(packed.shape),
        "dtype": packed.dtype,
        "format": {"name": packed.format, "version": 1},
        "meta": packed.meta,
        "arrays": called,
    }
    return entry, {called[array]: a for array, a in packed.arrays.items()}


def _rule_entry(
    number: int, b: Bound, structure: Sequence[np.ndarray], keyed: Sequence[tuple[Key, ...]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the content of a header says of a rule, and the arrays of its structure by their names in the file."""
    try:
        from_spec(b.constraint.spec)
    except ValueError as error:
        raise ValueError(f"{b.name}: {b.constraint} could not be read back: {error}") from None
    if structure and b.constraint.joint and list(b.indices) != sorted(b.indices, key=keyed.__getitem__):
        raise ValueError(
            f"{b.name}: the leaves of a joint constraint with a structure must come in the order of their names, "
            f"in which they are read back; they come as {', '.join(b.paths)}"
        )
    names = [f"rule {number}:{i}" for i in range(len(structure))]
    entry = {
        "paths": [list(keyed[i]) for i in b.indices],
        "axes": list(b.axes.words) if b.axes else None,
        "spec": dict(b.constraint.spec),
        "structure": names,
    }
    return entry, dict(zip(names, structure, strict=True))


def _native(names: Sequence[str] | str, tree: Any) -> tuple[list[np.ndarray], Any]:
    """The leaves as NumPy arrays in this machine's byte order, and the tree with these in place of foreign ones.

    Raises:
      ValueError: a leaf is no array of numbers; the text begins with its name, or with the one name of all.
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = []
    for i, leaf in enumerate(leaves):
        try:
            arrays.append(native(jax.device_get(leaf) if isinstance(leaf, jax.Array) else leaf))
        except ValueError as error:
            raise ValueError(f"{names if isinstance(names, str) else names[i]}: {error}") from None
    held = [a if isinstance(x, np.ndarray) else x for a, x in zip(arrays, leaves, strict=True)]
    return arrays, jax.tree.unflatten(treedef, held)


def _layout(layout: Sequence[tuple[str, str]], names: Sequence[str]) -> dict[str, str]:
    fixed: dict[str, str] = {}
    for pattern, format in layout:
        mine = [n for n in names if n not in fixed and re.fullmatch(pattern, n)]
        if not mine:
            raise ValueError(f"layout: {pattern!r} matches no leaf that is left; the paths are: {', '.join(names)}")
        fixed |= dict.fromkeys(mine, format)
    return fixed


def check_model(model: Any) -> None:
    """Raises ValueError unless it is None, or a class or a name with options."""
    if model is None:
        return
    named = [model[k] for k in ("class", "name") if k in model] if isinstance(model, Mapping) else []
    if len(named) != 1 or not isinstance(named[0], str) or len(named[0]) > MAX_NAME:
        raise ValueError(f"{str(model)[:120]} has not one 'class' (package.module:Class) or 'name'")
    if not isinstance(model.get("options", {}), Mapping) or set(model) - {"class", "name", "options"}:
        raise ValueError(f"{str(model)[:120]} has other entries than a class or name and a dictionary of options")


def _renamed(structures: Mapping[str, Any], bound: Sequence[Bound]) -> dict[str, Any]:
    """Structures of params alone by the names that they have among all variables, where no name is their own."""
    names = {b.name for b in bound}
    if names == set(structures) or names != {f"params/{name}" for name in structures}:
        return dict(structures)
    return {f"params/{name}": s for name, s in structures.items()}
