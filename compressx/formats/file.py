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

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx._harden import agree, parts, prove
from compressx._harden import structures as choose
from compressx.constraints import from_spec, on_leaf
from compressx.formats import container, packing
from compressx.formats.base import DTYPES, MAX_BYTES, CompressedFileError, Packed, extent, fail, native, nbytes
from compressx.formats.file_rules import bound_rules, claim, pattern_of, read_path
from compressx.formats.trees import MAX_LEAVES, MAX_NAME, in_the_form_of, nest
from compressx.rules import Bound, Rules, pairs, resolve
from compressx.tree import Key, keys, path_name


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
) -> Sizes:
    """Packs every leaf and writes the file in one step; what was there before survives any failure.

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
    _check_model(model)
    parts_of = {}
    for b in bound:
        parts_of[b.name], given[b.name] = _native(f"{b.name}: its structure", given[b.name])
    if bound:
        prove(params, rules, given, chosen=held is None)
    fixed = _layout(layout, names)
    arrays: dict[str, np.ndarray] = {}
    entries, described = [], []
    # formats for a structure are written for Flax's layout: a leaf with axes of its own takes one of the others
    alone = {p: on_leaf(b.constraint, given[b.name], i) for b in bound if b.axes is None for i, p in enumerate(b.paths)}
    packed_bytes = 0
    for key, name, leaf in zip(keyed, names, leaves, strict=True):
        try:
            packed = packing.pack(leaf, *alone.get(name, (None, None)), fixed.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        packed_bytes += nbytes(packed)
        called = {array: f"{name}:{array}" for array in packed.arrays}
        arrays |= {called[array]: a for array, a in packed.arrays.items()}
        entries.append(
            {
                "path": list(key),
                "shape": list(packed.shape),
                "dtype": packed.dtype,
                "format": {"name": packed.format, "version": 1},
                "meta": packed.meta,
                "arrays": called,
            }
        )
    for number, b in enumerate(bound):
        try:
            from_spec(b.constraint.spec)
        except ValueError as error:
            raise ValueError(f"{b.name}: {b.constraint} could not be read back: {error}") from None
        open_parts = parts_of[b.name]
        if open_parts and b.constraint.joint and list(b.indices) != sorted(b.indices, key=keyed.__getitem__):
            raise ValueError(
                f"{b.name}: the leaves of a joint constraint with a structure must come in the order of their names, "
                f"in which they are read back; they come as {', '.join(b.paths)}"
            )
        held_names = [f"rule {number}:{i}" for i in range(len(open_parts))]
        arrays |= dict(zip(held_names, open_parts, strict=True))
        described.append(
            {
                "paths": [list(keyed[i]) for i in b.indices],
                "axes": list(b.axes.words) if b.axes else None,
                "spec": dict(b.constraint.spec),
                "structure": held_names,
            }
        )
    content = {"model": dict(model) if model else None, "extra": extra, "leaves": entries, "rules": described}
    target = Path(path)
    stored = container.write(target, content, arrays, coding)
    return Sizes(sum(x.nbytes for x in leaves), packed_bytes, stored, target.stat().st_size)


def load_model(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES, *, like: Any = None) -> SavedModel:
    """Reads a saved model, believing nothing of it: whoever wrote the file, it takes bounded memory and time.

    At no time does reading take more than four times `max_bytes`, and 512 MiB: what does not fit is refused before it
    is made. It ends within 2 s, 10 s for every 100 MB of the file, and 10 s for every 100 MB of `max_bytes`.

    Args:
      path: a file that `save_model` wrote, or anything else.
      max_bytes: neither the file, nor its arrays, nor the dense weights may take more together, nor may unpacking a
        leaf take more than twice as much on the way; raise it for giants, lower it for files from others.
      like: a tree of your own (an NNX state, an Equinox module, parameters, or their shapes), in whose form the params
        come back, matched by path; its leaves that are no arrays (functions, keys of random numbers) stay.

    Returns:
      What the file holds; `compile`, `check` and `retrain` take it.

    Raises:
      CompressedFileError: the file is damaged, truncated, foreign, too large or inconsistent; the text begins with the
        file and the entry.
      OSError: the file cannot be opened or read.
      ValueError: max_bytes is no positive integer; a path, shape or dtype of `like` is not that of the file.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> hard = compressx.harden(params, rules, fresh=True)
      >>> sizes = compressx.save_model("compressed.safetensors", hard, rules)
      >>> saved = compressx.load_model("compressed.safetensors", like=params)
      >>> print(saved.params["dense"]["kernel"])
      [[ 0. -5.]
       [ 4.  0.]]
      >>> compressx.check(saved, saved.rules)
    """
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    target = Path(path)
    try:
        version, content, arrays, (stored, size) = container.read(target, max_bytes)
        packed, params = _leaves(content.get("leaves"), version, arrays, max_bytes)
        bound, structures = bound_rules(_list(content.get("rules"), "rules"), version, params, arrays, max_bytes)
        if arrays:
            fail(sorted(arrays)[0], "belongs to no leaf and no rule")
        model = content.get("model")
        try:
            _check_model(model)
        except ValueError as error:
            fail("model", str(error))
    except CompressedFileError as error:
        raise CompressedFileError(f"{target}: {error}") from None
    dense = sum(x.nbytes for x in jax.tree.leaves(params))
    sizes = Sizes(dense, sum(map(nbytes, packed.values())), stored, size)
    rules = [(pattern_of(b), b.constraint.slice or b.constraint, *([str(b.axes)] if b.axes else [])) for b in bound]
    if like is not None:
        params, bound = in_the_form_of(like, params, rules, bound, target)
    return SavedModel(params, rules, structures, model, content.get("extra"), packed, sizes, bound)


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


def _check_model(model: Any) -> None:
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


def _list(value: Any, entry: str, limit: int = MAX_LEAVES) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        fail(entry, f"is not a list of at most {limit}")
    return value


def _leaves(
    listed: Any, version: int, arrays: dict[str, np.ndarray], max_bytes: int
) -> tuple[dict[str, Packed], dict[Key, Any]]:
    packed: dict[str, Packed] = {}
    keyed: list[tuple[Key, ...]] = []
    dense: list[np.ndarray] = []
    left = max_bytes
    for number, about in enumerate(_list(listed, "leaves")):
        entry = f"leaves[{number}]"
        if not isinstance(about, dict):
            fail(entry, "has no path")
        keyed.append(read_path(about.get("path"), version, entry))
        name = path_name(keyed[-1])
        entry = name[:MAX_NAME]
        held, meta, format = about.get("arrays"), about.get("meta"), about.get("format")
        if version > 1:
            if not isinstance(format, dict) or format.keys() != {"name", "version"}:
                fail(entry, "its format is not a name with a version")
            if type(format["version"]) is not int or format["version"] != 1:
                fail(entry, f"version {str(format['version'])[:40]} of its format is unknown to this release")
            format = format["name"]
        if not isinstance(held, dict) or not isinstance(meta, dict) or not isinstance(format, str):
            fail(entry, "its format, meta or arrays are missing")
        if not isinstance(about.get("dtype"), str) or about["dtype"] not in DTYPES:
            fail(entry, f"dtype {str(about.get('dtype'))[:40]!r} is not one of {', '.join(DTYPES)}")
        shape = container.check_shape(entry, about.get("shape"), DTYPES[about["dtype"]].itemsize, left)
        taken = {key: claim(arrays, called, entry) for key, called in held.items()}
        item = Packed(format, shape, about["dtype"], taken, meta)
        try:
            w = packing.unpack(item, left, 2 * max_bytes)
        except CompressedFileError as error:
            fail(entry, str(error))
        left -= extent(item) * w.dtype.itemsize
        if name in packed:
            fail(entry, "occurs twice")
        packed[name] = item
        dense.append(w)
    try:
        return packed, nest(keyed, dense)
    except ValueError as error:
        fail("leaves", str(error))
