"""Saved models read back: whole, or leaf by leaf from a file that stays on the disk; whatever is in the file.

Everything is checked before it costs anything, in the same way for both: `load_model` holds all leaves in the end,
`open_model` none.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compressx.formats import container, packing
from compressx.formats.base import DTYPES, MAX_BYTES, CompressedFileError, Packed, extent, fail, nbytes
from compressx.formats.file import SavedModel, Sizes, check_model
from compressx.formats.file_rules import bound_rules, claim, pattern_of, read_path
from compressx.formats.shards import find, listed, open_tensors
from compressx.formats.tensors import check_shape
from compressx.formats.trees import MAX_LEAVES, MAX_NAME, in_the_form_of, nest
from compressx.rules import Bound
from compressx.tree import Key, path_name, paths


def load_model(path: str | os.PathLike[str], max_bytes: int | None = None, *, like: Any = None) -> SavedModel:
    """Reads a saved model, believing nothing of it: whoever wrote the file, it takes bounded memory and time.

    At no time does reading take more than four times `max_bytes`, and 512 MiB: what does not fit is refused before it
    is made. It ends within 2 s, 10 s for every 100 MB of the file, and 10 s for every 100 MB of `max_bytes`.

    Args:
      path: a file that `save_model` wrote, the index of a sharded one, a folder that holds one, or anything else.
      max_bytes: neither the file, nor its arrays, nor the dense weights may take more together, nor may unpacking a
        leaf take more than twice as much on the way; lower it for files from others. None: 4 GiB, and for a larger file
        16 times its size, as far as that is a quarter of this machine's memory.
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
    target = Path(path)
    try:
        max_bytes = limit(target, max_bytes)
        version, content, arrays, (stored, size) = container.read(target, max_bytes)
        packed, params = _leaves(content.get("leaves"), version, arrays, max_bytes)
        bound, structures = bound_rules(_list(content.get("rules"), "rules"), version, params, arrays, max_bytes)
        if arrays:
            fail(sorted(arrays)[0], "belongs to no leaf and no rule")
        model = content.get("model")
        try:
            check_model(model)
        except ValueError as error:
            fail("model", str(error))
    except CompressedFileError as error:
        raise CompressedFileError(f"{target}: {error}") from None
    dense = sum(x.nbytes for x in jax.tree.leaves(params))
    sizes = Sizes(dense, sum(map(nbytes, packed.values())), stored, size)
    rules = rules_of(bound)
    if like is not None:
        params, bound = in_the_form_of(like, params, rules, bound, target)
    return SavedModel(params, rules, structures, model, content.get("extra"), packed, sizes, bound)


class OpenModel(Mapping[str, np.ndarray]):
    """A saved model that stays on the disk: path -> the leaf, which is unpacked when it is asked for and not kept.

    Attributes:
      shapes: nested dictionaries as `SavedModel.params` has them, of `jax.ShapeDtypeStruct`.
      rules, structures, model, extra, sizes, bound: as in `SavedModel`.
      max_bytes: what one leaf, its arrays, or all structures may take.

    Example:
      >>> _ = compressx.save_model("model.safetensors", {"kernel": np.eye(64, dtype=np.float32)}, [])
      >>> with compressx.formats.open_model("model.safetensors") as model:
      ...     print(list(model), model["kernel"].shape, model.packed("kernel").format)
      ['kernel'] (64, 64) coo-delta
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        """See `open_model`."""
        self._target = Path(path)
        try:
            self.max_bytes = limit(self._target, max_bytes)
            self._file = open_tensors(self._target, mapped=True)
            try:
                self._read()
            except BaseException:
                self.close()
                raise
        except CompressedFileError as error:
            raise CompressedFileError(f"{self._target}: {error}") from None

    def _read(self) -> None:
        header, self._stored = container.checked(self._file)
        version, content, self._described = container.parsed_header(header, self._stored.keys())
        described = dict(self._described)
        self._leaves: dict[str, tuple[Packed, dict[str, str]]] = {}
        keyed: list[tuple[Key, ...]] = []
        like: list[jax.ShapeDtypeStruct] = []
        for number, about in enumerate(_list(content.get("leaves"), "leaves")):
            key, item, held = read_leaf(about, number, version, self.max_bytes)
            name = path_name(key)
            for called in held.values():
                if not isinstance(called, str) or described.pop(called, None) is None:
                    fail(name[:MAX_NAME], f"its array {str(called)[:80]!r} is not in the file, or is used twice")
            if name in self._leaves:
                fail(name[:MAX_NAME], "occurs twice")
            self._leaves[name] = item, held
            keyed.append(key)
            like.append(jax.ShapeDtypeStruct(item.shape, DTYPES[item.dtype]))
        try:
            self.shapes = nest(keyed, like)
        except ValueError as error:
            fail("leaves", str(error))
        arrays, left = {}, self.max_bytes
        for name in described:
            arrays[name], left = self._array(name, left)
        listed_rules = _list(content.get("rules"), "rules")
        self.bound, self.structures = bound_rules(listed_rules, version, self.shapes, arrays, self.max_bytes)
        if arrays:
            fail(sorted(arrays)[0], "belongs to no leaf and no rule")
        self.model, self.extra = content.get("model"), content.get("extra")
        try:
            check_model(self.model)
        except ValueError as error:
            fail("model", str(error))
        self.rules = rules_of(self.bound)
        dense = sum(math.prod(x.shape) * x.dtype.itemsize for x in like)
        stored = sum(a.nbytes for a in self._stored.values())
        self.sizes = Sizes(dense, sum(map(self.nbytes, self._leaves)), stored, self._file.size)

    def _array(self, name: str, most: int) -> tuple[np.ndarray, int]:
        """An array as it was before it was stored, and what is left of a limit."""
        dtype, shape, coding = container.described_as(name, self._described[name], most)
        return container.decode(name, self._stored[name], dtype, shape, coding), (
            most - math.prod(shape) * dtype.itemsize
        )

    def nbytes(self, path: str) -> int:
        """Bytes of a leaf as packed, as `formats.nbytes` counts them, without reading it."""
        total = 0
        for called in self._leaves[path][1].values():
            dtype, shape, _ = container.described_as(called, self._described[called], self.max_bytes)
            total += math.prod(shape) * dtype.itemsize
        return total

    def format(self, path: str) -> str:
        """The name of the format of a leaf."""
        return self._leaves[path][0].format

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of a leaf."""
        return self._leaves[path][0].shape

    def packed(self, path: str) -> Packed:
        """A leaf as packed; its arrays are views of the file where they are not entropy-coded.

        Raises:
          CompressedFileError: an array is not what the header says, or takes more than `max_bytes`.
        """
        item, held = self._leaves[path]
        arrays, left = {}, self.max_bytes
        try:
            for key, called in held.items():
                arrays[key], left = self._array(called, left)
        except CompressedFileError as error:
            raise CompressedFileError(f"{self._target}: {error}") from None
        return item._replace(arrays=arrays)

    def __getitem__(self, path: str) -> np.ndarray:
        """A leaf, unpacked.

        Raises:
          KeyError: there is no such leaf.
          CompressedFileError: its arrays are inconsistent.
        """
        item = self.packed(path)
        try:
            return packing.unpack(item, self.max_bytes)
        except CompressedFileError as error:
            raise CompressedFileError(f"{self._target}: {path}: {error}") from None

    def take(self, b: Bound) -> Any:
        """The leaves of a rule, unpacked, as `Bound.take` gives them."""
        leaves: list[Any] = [None] * len(self._leaves)
        for path, i in zip(b.paths, b.indices, strict=True):
            leaves[i] = self[path]
        return b.take(leaves)

    def __iter__(self) -> Iterator[str]:
        return iter(paths(self.shapes))

    def __len__(self) -> int:
        return len(self._leaves)

    def close(self) -> None:
        """Closes the file; leaves that were given out stay as they are."""
        self._stored = {}
        self._file.close()

    def __enter__(self) -> "OpenModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(path: str | os.PathLike[str], max_bytes: int | None = None) -> OpenModel:
    """Opens a saved model of any size, whose leaves are read one by one; believes nothing of it, as `load_model` does.

    The checksum is compared once, over the whole file, which is read through a memory map: nobody may change the file
    in place while it is open. (Saving over it is fine: that replaces the file.)

    Args:
      path: as `load_model` takes it.
      max_bytes: what one leaf, its arrays, or all structures may take; None: as in `load_model`.

    Returns:
      path -> leaf, with the rules and structures.

    Raises:
      CompressedFileError: the file is damaged, truncated, foreign or inconsistent, or a leaf takes too much.
      OSError: the file cannot be opened or read.

    Example:
      >>> _ = compressx.save_model("model.safetensors", {"kernel": np.eye(64, dtype=np.float32)}, [])
      >>> with compressx.formats.open_model("model.safetensors") as model:
      ...     print({path: int(np.count_nonzero(leaf)) for path, leaf in model.items()})
      {'kernel': 64}
    """
    return OpenModel(path, max_bytes)


def rules_of(bound: Sequence[Bound]) -> list[tuple[Any, ...]]:
    """Bound rules as rules that bind exactly their leaves."""
    return [(pattern_of(b), b.constraint.slice or b.constraint, *([str(b.axes)] if b.axes else [])) for b in bound]


def _list(value: Any, entry: str, limit: int = MAX_LEAVES) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        fail(entry, f"is not a list of at most {limit}")
    return value


def limit(path: Path, max_bytes: int | None) -> int:
    """`max_bytes` as it was given, or what a file of that size may take on this machine.

    Raises:
      ValueError: it is no positive integer.
    """
    if max_bytes is None:
        found, sharded = find(path)
        files = [found.parent / name for name in listed(found)] if sharded else [found]
        size = sum(f.stat().st_size for f in files if f.exists() or not sharded)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return max(MAX_BYTES, min(16 * size, memory // 4))
    if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    return max_bytes


def read_leaf(about: Any, number: int, version: int, most: int) -> tuple[tuple[Key, ...], Packed, dict[str, Any]]:
    """The path of a leaf, the leaf as packed but without arrays, and what its arrays are called in the file."""
    entry = f"leaves[{number}]"
    if not isinstance(about, dict):
        fail(entry, "has no path")
    key = read_path(about.get("path"), version, entry)
    entry = path_name(key)[:MAX_NAME]
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
    shape = check_shape(entry, about.get("shape"), DTYPES[about["dtype"]].itemsize, most)
    return key, Packed(format, shape, about["dtype"], {}, meta), held


def _leaves(
    about: Any, version: int, arrays: dict[str, np.ndarray], max_bytes: int
) -> tuple[dict[str, Packed], dict[Key, Any]]:
    packed: dict[str, Packed] = {}
    keyed: list[tuple[Key, ...]] = []
    dense: list[np.ndarray] = []
    left = max_bytes
    for number, one in enumerate(_list(about, "leaves")):
        key, item, held = read_leaf(one, number, version, left)
        name = path_name(key)
        entry = name[:MAX_NAME]
        item = item._replace(arrays={k: claim(arrays, called, entry) for k, called in held.items()})
        try:
            w = packing.unpack(item, left, 2 * max_bytes)
        except CompressedFileError as error:
            fail(entry, str(error))
        left -= extent(item) * w.dtype.itemsize
        if name in packed:
            fail(entry, "occurs twice")
        keyed.append(key)
        packed[name] = item
        dense.append(w)
    try:
        return packed, nest(keyed, dense)
    except ValueError as error:
        fail("leaves", str(error))
