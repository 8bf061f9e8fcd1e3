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
from jax.extend.core import ClosedJaxpr, Jaxpr

from compressx import formats
from compressx.constraints import Constraint, from_spec, on_leaf
from compressx.formats import container
from compressx.formats.base import DTYPES, MAX_BYTES, CompressedFileError, Packed, fail
from compressx.harden import prove
from compressx.harden import structures as initial_structures
from compressx.rules import Rules, paths, resolve

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
    """

    params: Any
    rules: list[tuple[str, Constraint]]
    structures: dict[str, Any]
    model: dict[str, Any] | None
    extra: Any
    packed: dict[str, Packed]
    sizes: Sizes


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
    leaves = [np.asarray(x) for x in jax.device_get(jax.tree.leaves(params))]
    _nest(names)
    bound = resolve(rules, params) if rules else ()
    given = dict(structures) if structures is not None else initial_structures(params, rules) if rules else {}
    if given.keys() != {b.name for b in bound}:
        odd = sorted(given.keys() ^ {b.name for b in bound})[0]
        raise ValueError(f"structures and rules disagree on {odd!r}; take them from harden.structures")
    if bound:
        prove(jax.tree.unflatten(jax.tree.structure(params), leaves), rules, given, chosen=structures is None)
    fixed = _layout(layout, names)
    arrays: dict[str, np.ndarray] = {}
    entries, described = [], []
    alone = {p: on_leaf(b.constraint, given[b.name], i) for b in bound for i, p in enumerate(b.paths)}
    packed_bytes = 0
    for name, leaf in zip(names, leaves, strict=True):
        try:
            packed = formats.pack(leaf, *alone.get(name, (None, None)), fixed.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        packed_bytes += formats.nbytes(packed)
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
        parts = [np.asarray(x) for x in jax.device_get(jax.tree.leaves(given[b.name]))]
        if parts and b.constraint.joint and list(b.paths) != sorted(b.paths, key=lambda p: p.split("/")):
            raise ValueError(
                f"{b.name}: the leaves of a joint constraint with a structure must come in the order of their names, "
                f"in which they are read back; they come as {', '.join(b.paths)}"
            )
        held_names = [f"rule {number}:{i}" for i in range(len(parts))]
        arrays |= dict(zip(held_names, parts, strict=True))
        described.append({"paths": list(b.paths), "spec": dict(b.constraint.spec), "structure": held_names})
    content = {"model": dict(model) if model else None, "extra": extra, "leaves": entries, "rules": described}
    target = Path(path)
    stored = container.write(target, content, arrays, coding)
    return Sizes(sum(x.nbytes for x in leaves), packed_bytes, stored, target.stat().st_size)


def load_model(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> SavedModel:
    """Reads a saved model, believing nothing of it.

    Args:
      path: a file that `save_model` wrote, or anything else.
      max_bytes: neither the file, nor its arrays, nor the dense weights may take more together; raise it for giants.

    Raises:
      CompressedFileError: the file is damaged, truncated, foreign, too large or inconsistent; the text begins with the
        file and the entry.
      OSError: the file cannot be opened or read.
    """
    target = Path(path)
    try:
        content, arrays, (stored, size) = container.read(target, max_bytes)
        packed, params = _leaves(content.get("leaves"), arrays, max_bytes)
        rules, structures = _rules(content.get("rules"), params, arrays, max_bytes)
        if arrays:
            fail(sorted(arrays)[0], "belongs to no leaf and no rule")
        model = content.get("model")
        if model is not None and not (
            isinstance(model, dict)
            and isinstance(model.get("name"), str)
            and isinstance(model.get("options", {}), dict)
        ):
            fail("model", f"{str(model)[:120]} is not a name with options")
    except CompressedFileError as error:
        raise CompressedFileError(f"{target}: {error}") from None
    dense = sum(x.nbytes for x in jax.tree.leaves(params))
    sizes = Sizes(dense, sum(map(formats.nbytes, packed.values())), stored, size)
    return SavedModel(params, rules, structures, model, content.get("extra"), packed, sizes)


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


def _claim(arrays: dict[str, np.ndarray], name: Any, entry: str) -> np.ndarray:
    """Takes an array out of the file's, so that each is used once."""
    if not isinstance(name, str) or name not in arrays:
        fail(entry, f"its array {str(name)[:80]!r} is not in the file, or is used twice")
    return arrays.pop(name)


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
        taken = {key: _claim(arrays, name, entry) for key, name in held.items()}
        item = Packed(format, shape, about["dtype"], taken, meta)
        try:
            w = formats.unpack(item, left)
        except CompressedFileError as error:
            fail(entry, str(error))
        left -= w.nbytes
        if about["path"] in packed:
            fail(entry, "occurs twice")
        packed[about["path"]] = item
        dense.append(w)
    try:
        return packed, _nest(list(packed), dense)
    except ValueError as error:
        fail("leaves", str(error))


def _rules(
    listed: Any, params: dict[str, Any], arrays: dict[str, np.ndarray], max_bytes: int
) -> tuple[list[tuple[str, Constraint]], dict[str, Any]]:
    known = set(paths(params))
    rules: list[tuple[str, Constraint]] = []
    for number, about in enumerate(_list(listed, "rules")):
        entry = f"rules[{number}]"
        if not isinstance(about, dict) or not isinstance(about.get("spec"), dict):
            fail(entry, "has no constraint")
        mine = _list(about.get("paths"), f"{entry}/paths")
        if not mine or not all(isinstance(p, str) and p in known for p in mine):
            fail(entry, "its paths are not leaves of the file, or another rule holds on them")
        known.difference_update(mine)
        try:
            constraint = from_spec(about["spec"])
        except Exception as error:  # a hostile spec may upset a factory in any way
            fail(mine[0], f"its constraint {str(about['spec'])[:200]} is refused: {error}")
        if not constraint.joint and len(mine) != 1:
            fail(mine[0], f"{constraint} holds on one leaf, the file names {len(mine)}")
        rules.append(("|".join(map(re.escape, mine)), constraint))
    structures = {}
    try:
        bound = resolve(rules, params)
    except Exception as error:
        fail("rules", str(error))
    leaves = jax.tree.leaves(params)
    traced = set()
    for b, about in zip(bound, listed, strict=True):
        w = b.take(leaves)
        kind = (container.to_json(about["spec"]), *((x.shape, x.dtype) for x in jax.tree.leaves(w)))
        if kind not in traced:
            traced.add(kind)
            _check_cost(b.name, b.constraint, w, max_bytes)
        structures[b.name] = _structure(b.name, b.constraint, w, about.get("structure"), arrays)
    return rules, structures


def _check_cost(entry: str, constraint: Constraint, w: Any, max_bytes: int) -> None:
    """A forged block shape or group size must not make the projection build arrays that no memory holds."""

    def largest(jaxpr: Jaxpr) -> int:
        sizes = [0]
        for equation in jaxpr.eqns:
            avals = [v.aval for v in equation.outvars]
            sizes += [a.size * a.dtype.itemsize for a in avals if isinstance(a, jax.core.ShapedArray)]
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, _JAXPRS)):
                if isinstance(inner, _JAXPRS):
                    sizes.append(largest(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner))
        return max(sizes)

    try:
        needed = largest(jax.make_jaxpr(lambda w: constraint.project(w, constraint.init(w)))(w).jaxpr)
    except Exception as error:
        fail(entry, f"{constraint} does not fit: {error}")
    if needed > max_bytes:
        fail(entry, f"projecting onto {constraint} makes an array of {needed} bytes, more than max_bytes={max_bytes}")


_JAXPRS = (ClosedJaxpr, Jaxpr)


def _structure(entry: str, constraint: Constraint, w: Any, names: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The pytree that the constraint makes, filled with the file's arrays."""
    try:
        template, treedef = jax.tree.flatten(jax.eval_shape(constraint.init, w))
    except Exception as error:
        fail(entry, f"{constraint} does not fit: {error}")
    named = _list(names, f"{entry}/structure")
    if len(named) != len(template):
        fail(entry, f"its structure has {len(named)} arrays, {constraint} needs {len(template)}")
    filled = []
    for name, like in zip(named, template, strict=True):
        a = _claim(arrays, name, entry)
        if a.shape != like.shape or a.dtype != like.dtype:
            fail(entry, f"its structure holds {a.dtype} {list(a.shape)}, expected {like.dtype} {list(like.shape)}")
        filled.append(a)
    return jax.tree.unflatten(treedef, filled)
