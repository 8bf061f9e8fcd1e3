"""Checkpoints: everything a run needs to resume with the same bits, written atomically, checked when read.

<folder>/steps/<id>/      the last two states of training, with their place in the run (orbax)
<folder>/weights/<phase>/ what each finished phase left, kept: for later phases, other runs and the plots
"""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the folder and what to do."""


def _checksum(tree: Any) -> int | None:
    """CRC-32 of every leaf's bytes in order; None where a leaf lies on other hosts too."""
    crc = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return None
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        crc = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes(), crc)
    return crc


def _template(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Saving is synchronous: `metrics.jsonl` and the checkpoint must agree about the step they stand for, and a full disk
    must be reported at the save that met it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.folder = Path(folder).absolute()
        self._say = say
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=KEEP, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.folder / "steps", options=options)
        return self._manager

    def save(self, number: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes a state and its place in the run; the checkpoint before it is removed only once this one is whole.

        Raises:
          CheckpointError: it could not be written (a full disk, say); the ones before it are untouched.
        """
        meta = {**meta, "crc32": _checksum(state)}
        try:
            manager = self._open()
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            manager.save(number, args=args, force=True)
            manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint at step {meta.get('global_step', number)} could not be written to {self.folder}: "
                f"{_brief(error)}; the one before it is whole: make room, and the same command resumes from it"
            ) from error

    def read_meta(self) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
        """The positions of all checkpoints that can be read, newest first, and a line for every one that cannot."""
        found, faults = [], []
        if not (self.folder / "steps").is_dir():
            return [], []
        for number in sorted(self._open().all_steps(), reverse=True):
            try:
                meta = self._open().restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                if not isinstance(meta, dict):
                    raise ValueError("its place in the run is missing")
                found.append((number, meta))
            except Exception as error:
                faults.append(f"checkpoint {self.folder / 'steps' / str(number)} is damaged: {_brief(error)}")
        return found, faults

    def restore(self, number: int, meta: dict[str, Any], like: Any) -> Any:
        """The state of a checkpoint, in the structure and layout of `like`.

        Raises:
          CheckpointError: it is damaged, or of another run.
        """
        where = self.folder / "steps" / str(number)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_template(like)))
            state = self._open().restore(number, args=args).state
        except Exception as error:
            raise CheckpointError(f"checkpoint {where} is damaged: {_brief(error)}") from error
        _verify(state, meta, where)
        return state

    def drop_newer(self, number: int) -> None:
        """Removes the checkpoints after this one, which are damaged, so that their steps can be written again."""
        newer = [n for n in self._open().all_steps() if n > number]
        for n in newer:
            if jax.process_index() == 0:
                shutil.rmtree(self.folder / "steps" / str(n), ignore_errors=True)
        if newer:
            self._open().reload()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save_weights(self, name: str, tree: Any) -> None:
        """Keeps what a phase left, replacing an earlier copy.

        Raises:
          CheckpointError: it could not be written.
        """
        try:
            meta = ocp.args.JsonSave({"crc32": _checksum(tree)})
            args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=meta)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                writer.save(self.folder / "weights" / name, args=args, force=True)
        except Exception as error:
            raise CheckpointError(
                f"the weights of phase {name} could not be written to {self.folder}: {_brief(error)}; the last "
                "checkpoint is whole: make room and run the same command again to resume from it"
            ) from error

    def has_weights(self, name: str) -> bool:
        """Whether a phase's weights are kept here."""
        return (self.folder / "weights" / name).is_dir()

    def load_weights(self, name: str, like: Any) -> Any:
        """What a phase left, in the structure and layout of `like`.

        Raises:
          CheckpointError: missing, damaged, or of another shape.
        """
        where = self.folder / "weights" / name
        if not where.is_dir():
            raise CheckpointError(f"{where} does not exist; run that phase first")
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_template(like)), meta=ocp.args.JsonRestore())
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                read = reader.restore(where, args=args)
        except Exception as error:
            raise CheckpointError(f"the weights in {where} cannot be read: {_brief(error)}") from error
        _verify(read.state, read.meta, where)
        return read.state

    def close(self) -> None:
        """Releases orbax's threads."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _verify(tree: Any, meta: Any, where: Path) -> None:
    want = meta.get("crc32") if isinstance(meta, dict) else None
    have = _checksum(tree)
    if want is not None and have is not None and want != have:
        raise CheckpointError(f"checkpoint {where} is damaged: its checksum is {have}, and {want} was written")


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
