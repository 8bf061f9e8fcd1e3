"""Saved models: every leaf packed, the rules and structures it satisfies, the model's name; one file, safe to open.

The content of the header (see `container`):

    model   {"name", "options"} or null        extra   any JSON, as given to `save_model`
    leaves  [{"path", "shape", "dtype", "format", "meta", "arrays": {array: name in the file}}]
    rules   [{"paths", "spec", "structure": [names in the file]}], one per constrained leaf or joint set

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

from compressx._harden import prove
from compressx._harden import structures as initial_structures
from compressx.constraints import Constraint, from_spec, on_leaf
from compressx.formats import container, packing
from compressx.formats.base import DTYPES, MAX_BYTES, CompressedFileError, Packed, extent, fail, native, nbytes
from compressx.formats.file_rules import claim, pattern_of, read_rules
from compressx.rules import Bound, Rules, resolve
from compressx.tree import paths

MAX_LEAVES = 8192
MAX_DEPTH = 64
MAX_NAME = 1024


class Sizes(NamedTuple):
    """Bytes of a saved model: its leaves dense, packed (indices included), all arrays as stored, and the whole file.

    `packed` counts the leaves only; `stored` counts structures too, after entropy coding.
    """

    dense: int
    packed: int
    stored: int
    file: int


class SavedModel(NamedTuple):
    """What a file holds.

    Attributes:
      params: nested dictionaries of NumPy arrays, a level for each part of a path.
      rules: pairs (pattern, constraint) that bind exactly the leaves that were bound.
      structures: what each constraint leaves open, by name, as `harden.check` takes it.
      model: {"name", "options"} or None.
      extra: as given to `save_model`.
      packed: path -> the leaf as packed.
      sizes: bytes.
      bound: the rules, each with its leaves, as `rules.resolve` binds them.
    """

    params: Any
    rules: list[tuple[str, Constraint]]
    structures: dict[str, Any]
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
      params: any pytree of concrete arrays; give all of a model's variables (`{"params": ..., "batch_stats": ...}`) to
        keep them all. Empty containers are not kept.
      rules: pairs (pattern, constraint); None as a constraint leaves a leaf free.
      structures: what the constraints leave open, as `harden.structures` returned it before hardening; None: chosen for
        params.
      model: `{"name": ..., "options": {...}}`, so that the network can be built again.
      extra: JSON-able facts to keep (accuracy, data set, seed).
      layout: pairs (pattern, format) that fix the format of leaves; all others take the smallest.
      coding: "zlib" or "lzma" to entropy-code the arrays of the file, where that saves bytes.

    Returns:
      The bytes before and after.

    Raises:
      ConstraintViolation: weights that do not lie in their sets with that structure, to the bit.
      ValueError: a name, format, structure or header that could not be read back.
      OSError: the file cannot be written.
    """
    names = paths(params)
    _nest(names)
    leaves, params = _native(names, params)
    bound = resolve(rules, params) if rules else ()
    given = dict(structures) if structures is not None else initial_structures(params, rules) if rules else {}
    if given.keys() != {b.name for b in bound}:
        odd = sorted(given.keys() ^ {b.name for b in bound})[0]
        raise ValueError(f"structures and rules disagree on {odd!r}; take them from harden.structures")
    parts_of = {}
    for b in bound:
        parts_of[b.name], given[b.name] = _native(f"{b.name}: its structure", given[b.name])
    if bound:
        prove(params, rules, given, chosen=structures is None)
    fixed = _layout(layout, names)
    arrays: dict[str, np.ndarray] = {}
    entries, described = [], []
    alone = {p: on_leaf(b.constraint, given[b.name], i) for b in bound for i, p in enumerate(b.paths)}
    packed_bytes = 0
    for name, leaf in zip(names, leaves, strict=True):
        try:
            packed = packing.pack(leaf, *alone.get(name, (None, None)), fixed.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        packed_bytes += nbytes(packed)
        held = {key: f"{name}:{key}" for key in packed.arrays}
        arrays |= {held[key]: a for key, a in packed.arrays.items()}
        entries.append(
            {
                "path": name,
                "shape": list(packed.shape),
                "dtype": packed.dtype,
                "format": packed.format,
                "meta": packed.meta,
                "arrays": held,
            }
        )
    for number, b in enumerate(bound):
        try:
            from_spec(b.constraint.spec)
        except ValueError as error:
            raise ValueError(f"{b.name}: {b.constraint} could not be read back: {error}") from None
        parts = parts_of[b.name]
        if parts and b.constraint.joint and list(b.paths) != sorted(b.paths, key=lambda p: p.split("/")):
            raise ValueError(
                f"{b.name}: the leaves of a joint constraint with a structure must come in the order of their names, "
                f"in which they are read back; they come as {', '.join(b.paths)}"
            )
        held_names = [f"rule {number}:{i}" for i in range(len(parts))]
        arrays |= dict(zip(held_names, parts, strict=True))
        described.append({"paths": list(b.paths), "spec": dict(b.constraint.spec), "structure": held_names})
    content = {"model": _model(dict(model) if model else None), "extra": extra, "leaves": entries, "rules": described}
    target = Path(path)
    stored = container.write(target, content, arrays, coding)
    return Sizes(sum(x.nbytes for x in leaves), packed_bytes, stored, target.stat().st_size)


def load_model(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> SavedModel:
    """Reads a saved model, believing nothing of it: whoever wrote the file, it takes bounded memory and time.

    At no time does reading take more than four times `max_bytes`, and 512 MiB: what does not fit is refused before it
    is made. It ends within 2 s, 10 s for every 100 MB of the file, and 10 s for every 100 MB of `max_bytes`.

    Args:
      path: a file that `save_model` wrote, or anything else.
      max_bytes: neither the file, nor its arrays, nor the dense weights may take more together, nor may unpacking a
        leaf take more than twice as much on the way; raise it for giants, lower it for files from others.

    Raises:
      CompressedFileError: the file is damaged, truncated, foreign, too large or inconsistent; the text begins with the
        file and the entry.
      OSError: the file cannot be opened or read.
      ValueError: max_bytes is no positive integer.
    """
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    target = Path(path)
    try:
        content, arrays, (stored, size) = container.read(target, max_bytes)
        packed, params = _leaves(content.get("leaves"), arrays, max_bytes)
        bound, structures = read_rules(_list(content.get("rules"), "rules"), params, arrays, max_bytes)
        if arrays:
            fail(sorted(arrays)[0], "belongs to no leaf and no rule")
        model = _model(content.get("model"))
    except CompressedFileError as error:
        raise CompressedFileError(f"{target}: {error}") from None
    dense = sum(x.nbytes for x in jax.tree.leaves(params))
    sizes = Sizes(dense, sum(map(nbytes, packed.values())), stored, size)
    rules = [(pattern_of(b), b.constraint) for b in bound]
    return SavedModel(params, rules, structures, model, content.get("extra"), packed, sizes, bound)


def _model(model: Any) -> dict[str, Any] | None:
    """A model's name and options, checked; None."""
    named = isinstance(model, dict) and isinstance(model.get("name"), str) and len(model["name"]) <= MAX_NAME
    if model is not None and not (named and isinstance(model.get("options", {}), dict)):
        fail("model", f"{str(model)[:120]} is not a name of at most {MAX_NAME} characters with options")
    return model


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


def _nest(names: Sequence[str], leaves: Sequence[Any] | None = None) -> dict[str, Any]:
    """Nested dictionaries, a level for each part of a path; refuses what would not come back as it was."""
    tree: dict[str, Any] = {}
    if len(names) > MAX_LEAVES:
        raise ValueError(f"{len(names)} leaves, more than {MAX_LEAVES}")
    for i, name in enumerate(names):
        parts = name.split("/")
        if not name or len(name) > MAX_NAME or len(parts) > MAX_DEPTH or not name.isprintable():
            raise ValueError(f"the path {name[:80]!r} is empty, not printable, too long or too deep")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"the path {name!r} runs through another leaf")
        if parts[-1] in node:
            raise ValueError(f"the path {name!r} names two leaves, or a leaf and a branch")
        node[parts[-1]] = leaves[i] if leaves is not None else None
    return tree


def _list(value: Any, entry: str, limit: int = MAX_LEAVES) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        fail(entry, f"is not a list of at most {limit}")
    return value


def _leaves(listed: Any, arrays: dict[str, np.ndarray], max_bytes: int) -> tuple[dict[str, Packed], dict[str, Any]]:
    packed: dict[str, Packed] = {}
    dense: list[np.ndarray] = []
    left = max_bytes
    for number, about in enumerate(_list(listed, "leaves")):
        entry = f"leaves[{number}]"
        if not isinstance(about, dict) or not isinstance(about.get("path"), str):
            fail(entry, "has no path")
        entry = about["path"][:MAX_NAME]
        held, meta, format = about.get("arrays"), about.get("meta"), about.get("format")
        if not isinstance(held, dict) or not isinstance(meta, dict) or not isinstance(format, str):
            fail(entry, "its format, meta or arrays are missing")
        if not isinstance(about.get("dtype"), str) or about["dtype"] not in DTYPES:
            fail(entry, f"dtype {str(about.get('dtype'))[:40]!r} is not one of {', '.join(DTYPES)}")
        shape = container.check_shape(entry, about.get("shape"), DTYPES[about["dtype"]].itemsize, left)
        taken = {key: claim(arrays, name, entry) for key, name in held.items()}
        item = Packed(format, shape, about["dtype"], taken, meta)
        try:
            w = packing.unpack(item, left, 2 * max_bytes)
        except CompressedFileError as error:
            fail(entry, str(error))
        left -= extent(item) * w.dtype.itemsize
        if about["path"] in packed:
            fail(entry, "occurs twice")
        packed[about["path"]] = item
        dense.append(w)
    try:
        return packed, _nest(list(packed), dense)
    except ValueError as error:
        fail("leaves", str(error))
