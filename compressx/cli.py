"""The `compressx` command: look into saved models, check and compare them, and see whether this machine is ready.

    compressx inspect FILE    what is kept of every layer, and its bytes
    compressx verify FILE     every constraint, checked on the stored weights; --rules RULES for those of another file
    compressx diff A B        what differs between two files
    compressx compress IN OUT --rules RULES
                              weights of any safetensors file, projected onto sets, packed and saved; no model code
    compressx export FILE OUT --to onnx --shape 32x32x3 --model package.module:Class [--options JSON] [--compact]
                              the network for other runtimes; --compact for the small one
    compressx reconstruct FILE OUT --rules RULES --examples FOLDER --model package.module:Class [--options JSON]
                              a trained network into the sets of RULES, without training, on a few hundred inputs
    compressx doctor          versions, devices, compiler; and how to get what is missing; --build compiles ahead

Exit codes: 0 all is well; 1 a finding (a violated constraint, a difference, something missing); 2 an error (bad usage,
a file that cannot be read). `--json` prints one JSON object instead of tables.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

import compressx
from compressx import formats
from compressx.constraints import violations
from compressx.formats import CompressedFileError, OpenModel
from compressx.formats.base import pieces, same
from compressx.formats.container import CODINGS, to_json
from compressx.formats.file_rules import check_cost
from compressx.rules import Bound, resolve
from compressx.tree import in_their_precision

OK, FINDING, ERROR = 0, 1, 2


class Answer(NamedTuple):
    """What a command found: exit code, the JSON object, and the lines of text that say the same."""

    code: int
    data: dict[str, Any]
    lines: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        answer: Answer = arguments.run(arguments)
    except (CompressedFileError, _Refused) as error:
        return _error(str(error))
    except OSError as error:
        return _error(f"{error.filename or 'a file'}: {error.strerror or error}")
    try:
        print(json.dumps(answer.data, indent=2, allow_nan=False) if arguments.json else "\n".join(answer.lines))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open("/dev/null", "w")
    return answer.code


class _Refused(Exception):
    """What a command cannot do, with the reason."""


def _error(message: str) -> int:
    print(f"compressx: error: {_clean(' '.join(message.split()))}", file=sys.stderr)
    return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compressx", description=__doc__, formatter_class=_Raw)
    parser.add_argument("--version", action="version", version=f"compressx {compressx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, *files: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        for file in files:
            sub.add_argument(file, help="a file that formats.save_model wrote")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        if files:
            limit = "bytes that a leaf, or all weights where they are needed together, may take (default: 4 GiB, and "
            limit += "for larger files 16 times their size, as far as that is a quarter of the memory)"
            sub.add_argument("--max-bytes", type=_positive, default=None, metavar="N", help=limit)
        sub.set_defaults(run=run)
        return sub

    command("inspect", _inspect, "what is kept of every layer, and its bytes", "FILE")
    about = "check every constraint on the stored weights; exit code 1 if one is violated"
    verify = command("verify", _verify, about, "FILE")
    rules = "check these rules, which write_rules or a person wrote, in place of those that the file holds"
    verify.add_argument("--rules", metavar="RULES", help=rules)
    command("diff", _diff, "compare two files; exit code 1 if they differ", "A", "B")
    about = "project the weights of a file onto sets, once, and save them packed; an interrupted run is resumed"
    compress = command("compress", _compress, about)
    compress.add_argument("IN", help="a safetensors file, the index of a sharded one, or a folder that holds one")
    compress.add_argument("OUT", help="the file to write")
    compress.add_argument("--rules", required=True, metavar="RULES", help="what write_rules or a person wrote")
    compress.add_argument("--coding", choices=CODINGS, default="none", help="entropy coding of what is packed")
    shards = "write several files with so many bytes of arrays each, and an index"
    compress.add_argument("--shard-bytes", type=_positive, default=None, metavar="N", help=shards)
    export = command("export", _export, "write the network for other runtimes, any batch size", "FILE")
    export.add_argument("OUT", help="the file to write")
    export.add_argument("--to", required=True, choices=("onnx", "stablehlo"), help="what is written")
    shape = "shape of one input without the batch axis, such as 32x32x3"
    export.add_argument("--shape", required=True, type=_extents, metavar="HxWxC", help=shape)
    model = "class of the network, or a function that makes it; imported, so name only code that you trust"
    export.add_argument("--model", required=True, metavar="package.module:Class", help=model)
    options = "its arguments as a JSON object, such as '{\"classes\": 10}'"
    export.add_argument("--options", type=_options, default={}, metavar="JSON", help=options)
    export.add_argument("--compact", action="store_true", help="leave out the channels that pruning made useless")
    about = "bring a trained network into sets without training, on a few hundred of its inputs"
    reconstruct = command("reconstruct", _reconstruct, about, "FILE")
    reconstruct.add_argument("OUT", help="the file to write")
    reconstruct.add_argument("--rules", required=True, metavar="RULES", help="what write_rules or a person wrote")
    folder = "folder of .npy files of inputs as the network takes them, an example an entry of axis 0"
    reconstruct.add_argument("--examples", required=True, metavar="FOLDER", help=folder)
    reconstruct.add_argument("--model", required=True, metavar="package.module:Class", help=model)
    reconstruct.add_argument("--options", type=_options, default={}, metavar="JSON", help=options)
    reconstruct.add_argument(
        "--count", type=_positive, default=512, metavar="N", help="examples at most (default: 512)"
    )
    reconstruct.add_argument("--batch", type=_positive, default=64, metavar="N", help="examples a batch (default: 64)")
    doctor = command("doctor", _doctor, "versions, devices, compiler; and how to get what is missing")
    doctor.add_argument("--build", action="store_true", help="compile the kernels that are not built yet")
    return parser


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _options(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def _extents(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split("x"))


# --- inspect


def _constraints(model: OpenModel) -> dict[str, str]:
    """Path -> the constraint on it, as text."""
    return {p: text for b in model.bound for text in [str(b.constraint)] for p in b.paths}


class Layer(NamedTuple):
    """A row of `inspect`: kept are the non-zeros, rate is weights / kept (None where nothing is kept)."""

    path: str
    shape: list[int]
    dtype: str
    constraint: str | None
    format: str
    kept: int
    weights: int
    rate: float | None
    bytes_dense: int
    bytes_packed: int


def _inspect(arguments: argparse.Namespace) -> Answer:
    with formats.open_model(arguments.FILE, arguments.max_bytes) as model:
        held, sizes, layers, bar = _constraints(model), model.sizes, [], _Bar("inspect", model)
        for path in sorted(model):
            w = model[path]
            kept, size = int(np.count_nonzero(w)), model.nbytes(path)
            facts = (held.get(path), model.format(path), kept, w.size, _ratio(w.size, kept), w.nbytes, size)
            layers.append(Layer(path, list(w.shape), w.dtype.name, *facts))
            bar.add(w.size)
    constrained = [x for x in layers if x.constraint is not None]
    n, kept = sum(x.weights for x in layers), sum(x.kept for x in layers)
    rate = _ratio(sum(x.weights for x in constrained), sum(x.kept for x in constrained))
    total = {
        "weights": n,
        "kept": kept,
        "rate_constrained": rate,
        "rate_all": _ratio(n, kept),
        "bytes_dense": sizes.dense,
        "bytes_packed": sizes.packed,
        "rate_bytes": _ratio(sizes.dense, sizes.packed),
        "bytes_stored": sizes.stored,
        "bytes_file": sizes.file,
    }
    data = {"file": arguments.FILE, "model": model.model, "extra": model.extra, "total": total}
    data["layers"] = [x._asdict() for x in layers]

    def row(
        path: str, shape: str, format: str, kept: int, n: int, dense: int, packed: int, constraint: str
    ) -> list[str]:
        rates = _times(_ratio(n, kept)), _times(_ratio(dense, packed))
        return [path, shape, format, str(kept), str(n), rates[0], str(dense), str(packed), rates[1], constraint]

    head = ["path", "shape", "format", "kept", "of", "rate", "dense B", "packed B", "rate", "constraint"]
    rows = [
        row(x.path, _shape(x.shape), x.format, x.kept, x.weights, x.bytes_dense, x.bytes_packed, x.constraint or "-")
        for x in layers
    ]
    rows.append(row("total", "", "", kept, n, sizes.dense, sizes.packed, ""))
    name = model.model["name"] if model.model else "not named"
    lines = [f"{arguments.FILE}: model {name}", "", *_table(head, rows, flush_right=range(3, 9)), ""]
    lines += [f"constrained weights {_times(rate)}, all weights {_times(_ratio(n, kept))}"]
    lines += [f"arrays as stored {sizes.stored} B, whole file {sizes.file} B"]
    return Answer(OK, data, list(map(_clean, lines)))


# --- verify


def _verify(arguments: argparse.Namespace) -> Answer:
    with formats.open_model(arguments.FILE, arguments.max_bytes) as model:
        bound = model.bound if arguments.rules is None else _bound(model, arguments)
        counts = _violations(model, bound, arguments)
    checked: list[dict[str, Any]] = [
        {"paths": list(b.paths), "constraint": str(b.constraint), "violations": counts[b.name]} for b in bound
    ]
    bad = [x for x in checked if x["violations"]]
    lines = [
        f"{'VIOLATED' if x['violations'] else 'ok':<9}{', '.join(x['paths'])}: {x['constraint']}"
        + (f": {x['violations']} entries outside" if x["violations"] else "")
        for x in checked
    ]
    lines.append(f"{arguments.FILE}: {len(checked)} constraints checked, {len(bad)} violated")
    data = {"file": arguments.FILE, "rules": arguments.rules, "constraints": checked, "violated": len(bad)}
    return Answer(FINDING if bad else OK, data, list(map(_clean, lines)))


def _bound(model: OpenModel, arguments: argparse.Namespace) -> tuple[Bound, ...]:
    """The rules of another file on the leaves of a model."""
    rules = formats.read_rules(arguments.rules).rules
    try:
        bound = resolve(rules, model.shapes)
        check_cost(bound, model.shapes, model.max_bytes)
    except ValueError as error:
        raise _Refused(f"{arguments.rules}: {error}") from None
    return bound


def _violations(model: OpenModel, bound: Sequence[Bound], arguments: argparse.Namespace) -> dict[str, int]:
    """`harden.outside`, one program for all rules that are alike, whose memory is bounded before it runs.

    The leaves of a rule are read, checked and dropped before those of the next. Under the rules of another file the
    structure (signs, library, scale) of the sets that the model has too is its own; for other sets one is chosen, so
    that the weights lie in them wherever such a choice is found.
    """
    held = {
        (b.paths, part.joint, to_json(part.spec)): structure
        for b in model.bound
        for part, structure in b.constraint.each(model.structures[b.name])
    }
    programs: dict[Any, Any] = {}
    counts = {}
    bar = _Bar("verify", model)
    for b in bound:
        w = model.take(b)
        structures = model.structures[b.name] if bound is model.bound else _structures(b, w, held)
        given = (w, structures)
        kind = (json.dumps(b.constraint.spec, sort_keys=True), *((x.shape, x.dtype) for x in jax.tree.leaves(given[0])))
        with in_their_precision(given):
            if kind not in programs:
                programs[kind] = program = jax.jit(partial(violations, b.constraint)).lower(*given).compile()
                about, most = program.memory_analysis(), 4 * model.max_bytes
                if about is not None and about.temp_size_in_bytes > most:
                    needed = f"checking it takes {about.temp_size_in_bytes} bytes, more than {most}"
                    raise _Refused(f"{arguments.FILE}: {b.name}: {needed}")
            counts[b.name] = int(programs[kind](*given))
        bar.add(sum(x.size for x in jax.tree.leaves(w)))
    return counts


def _structures(b: Bound, w: Any, held: Mapping[Any, Any]) -> tuple[Any, ...]:
    with in_their_precision(w):
        chosen = zip(b.constraint.sets, b.choose(w), strict=True)
    return tuple(held.get((b.paths, part.joint, to_json(part.spec)), s) for part, s in chosen)


# --- diff


def _diff(arguments: argparse.Namespace) -> Answer:
    with (
        formats.open_model(arguments.A, arguments.max_bytes) as a,
        formats.open_model(arguments.B, arguments.max_bytes) as b,
    ):
        return _differences(a, b, arguments)


def _differences(a: OpenModel, b: OpenModel, arguments: argparse.Namespace) -> Answer:
    """What differs, of one pair of leaves after the other."""
    ca, cb = _constraints(a), _constraints(b)
    removed, added = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    changed, bar = [], _Bar("diff", a)
    for path in sorted(a.keys() & b.keys()):
        w = a[path]
        changed.append(_compare(path, w, b[path], ca.get(path), cb.get(path)))
        bar.add(w.size)
    changed = [c for c in changed if not c["same"]]
    data: dict[str, Any] = {"a": arguments.A, "b": arguments.B, "removed": removed, "added": added, "changed": changed}
    lines = [f"- {p} {_shape(a.shape(p))}, only in {arguments.A}" for p in removed]
    lines += [f"+ {p} {_shape(b.shape(p))}, only in {arguments.B}" for p in added]
    for c in changed:
        facts = [f"{key} {c[key][0]} -> {c[key][1]}" for key in ("shape", "dtype", "constraint", "kept") if c[key]]
        if c["max_abs_diff"] is not None:
            facts.append(f"max abs difference {c['max_abs_diff']:.4g}")
        if c["mask_overlap"] is not None:
            facts.append(f"mask overlap {c['mask_overlap']:.4f}")
        lines.append(f"~ {c['path']}: {', '.join(facts) or 'bits differ (NaN, or a zero of the other sign)'}")
    for key, left, right in (("model", a.model, b.model), ("extra", a.extra, b.extra)):
        data[key] = None if left == right else [left, right]
        if left != right:
            lines.append(f"~ {key}: {json.dumps(left)} -> {json.dumps(right)}")
    alike = not lines
    common = len(a.keys() & b.keys())
    lines.append(
        f"the same: {common} leaves, bit for bit"
        if alike
        else f"{len(removed)} leaves removed, {len(added)} added, {len(changed)} of {common} changed"
    )
    return Answer(OK if alike else FINDING, data, list(map(_clean, lines)))


def _compare(path: str, a: np.ndarray, b: np.ndarray, ca: str | None, cb: str | None) -> dict[str, Any]:
    """How two leaves of the same path differ; mask overlap is |A and B| / |A or B| over their non-zeros."""
    out: dict[str, Any] = {
        "path": path,
        "shape": [list(a.shape), list(b.shape)] if a.shape != b.shape else None,
        "dtype": [a.dtype.name, b.dtype.name] if a.dtype != b.dtype else None,
        "constraint": [ca, cb] if ca != cb else None,
        "kept": None,
        "max_abs_diff": None,
        "mask_overlap": None,
    }
    bits = same(a, b)
    out["same"] = bits and ca == cb
    if bits or a.shape != b.shape:
        return out
    ma, mb = a != 0, b != 0
    if (counts := [int(np.count_nonzero(m)) for m in (ma, mb)])[0] != counts[1]:
        out["kept"] = counts
    either = int(np.count_nonzero(ma | mb))
    out["mask_overlap"] = int(np.count_nonzero(ma & mb)) / either if either else 1.0
    with np.errstate(invalid="ignore"):
        parts = ((a.reshape(-1)[p].astype(np.float64), b.reshape(-1)[p].astype(np.float64)) for p in pieces(a.size))
        apart = float(np.max([np.max(np.abs(x - y)) for x, y in parts], initial=0.0))
    out["max_abs_diff"] = apart if np.isfinite(apart) else None
    return out


# --- compress


def _compress(arguments: argparse.Namespace) -> Answer:
    from compressx.formats import one_shot  # projects, which no other command does

    rules = formats.read_rules(arguments.rules).rules
    bar = _Bar("compress")
    try:
        done = one_shot.compress(
            arguments.IN,
            arguments.OUT,
            rules,
            coding=arguments.coding,
            shard_bytes=arguments.shard_bytes,
            progress=bar.reach,
        )
    except ValueError as error:
        raise _Refused(f"{arguments.IN}: {error}") from None
    sizes = done.sizes
    data = {"in": arguments.IN, "out": arguments.OUT, "rules": arguments.rules, "weights": done.weights}
    data |= {"kept": done.kept, "constrained": done.constrained, "kept_constrained": done.kept_constrained}
    data |= {"bytes_dense": sizes.dense, "bytes_packed": sizes.packed, "bytes_stored": sizes.stored}
    data |= {"bytes_file": sizes.file, "resumed": done.resumed, "seconds": done.seconds}
    kept = f"kept {done.kept_constrained} of {done.constrained} constrained weights"
    lines = [f"{arguments.OUT}: {kept}, {done.kept} of all {done.weights}"]
    lines.append(f"{sizes.dense} B before, {sizes.file} B after, {_times(_ratio(sizes.dense, sizes.file))}")
    lines.append(f"{done.seconds:.1f} s" + (f", {done.resumed} parts of an earlier run" if done.resumed else ""))
    return Answer(OK, data, list(map(_clean, lines)))


# --- export


def _export(arguments: argparse.Namespace) -> Answer:
    from compressx import compaction, export  # what no other command needs

    saved = formats.load_model(arguments.FILE, arguments.max_bytes)
    variables, shape = jax.tree.map(jnp.asarray, saved.params), arguments.shape
    try:
        module: Any = _network(arguments.model)(**arguments.options)
        if arguments.compact:
            small = compaction.compact(module, variables, jnp.zeros((1, *shape)))
            module, variables = small.apply, small.variables
        made = (export.onnx if arguments.to == "onnx" else export.stablehlo)(module, variables, shape)
    except (ValueError, TypeError, ImportError, FlaxError) as error:  # no such network, or one that does not fit
        raise _Refused(f"{arguments.FILE}: cannot be exported for inputs of {_shape(shape)}: {error}") from None
    Path(arguments.OUT).write_bytes(made)
    number = sum(x.size for x in jax.tree.leaves(variables))
    data = {"file": arguments.FILE, "out": arguments.OUT, "to": arguments.to, "shape": list(shape)}
    data |= {"compact": arguments.compact, "weights": number, "bytes": len(made)}
    inputs = f"inputs [batch, {', '.join(map(str, shape))}]"
    lines = [f"{arguments.OUT}: {arguments.to}, {number} weights, {len(made)} B, {inputs}"]
    return Answer(OK, data, list(map(_clean, lines)))


def _network(name: str) -> Any:
    """The class or function that `package.module:name` names; the current folder is searched first."""
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise ValueError(f"--model={name!r} must be package.module:Class")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"--model={name!r} cannot be imported: {error}") from None
    except AttributeError:
        raise ValueError(f"--model={name!r}: the module {module} has no {attribute}") from None
    finally:
        sys.path.remove(os.getcwd())


# --- reconstruct


def _reconstruct(arguments: argparse.Namespace) -> Answer:
    from compressx.reconstruction import command  # what no other command needs

    saved, rules = formats.load_model(arguments.FILE, arguments.max_bytes), formats.read_rules(arguments.rules).rules
    try:
        module = _network(arguments.model)(**arguments.options)
        batches = command.examples(arguments.examples, arguments.count, arguments.batch)
        data, lines = command.run(saved, module, rules, batches, arguments.OUT)
    except (ValueError, TypeError, ImportError, FlaxError) as error:  # no such network, or one that does not fit
        raise _Refused(f"{arguments.FILE}: cannot be reconstructed: {error}") from None
    return Answer(OK, {"file": arguments.FILE, **data}, list(map(_clean, lines)))


# --- doctor


def _doctor(arguments: argparse.Namespace) -> Answer:
    from compressx import doctor  # looks at compilers and data, which no other command needs

    checks = doctor.examine(arguments.build)
    missing = [c for c in checks if not c.ok and c.needed]
    lines = []
    for c in checks:
        lines.append(f"{'ok' if c.ok else 'MISSING' if c.needed else 'absent':<9}{c.name:<26}{c.found}")
        if c.fix:
            lines.append(f"{'':<9}{'':<26}-> {c.fix}")
    lines.append("everything needed is here" if not missing else f"{len(missing)} needed things are missing")
    return Answer(FINDING if missing else OK, {"checks": [c._asdict() for c in checks], "missing": len(missing)}, lines)


# --- text


class _Bar:
    """A line on the terminal that says how far a command is, and weights a second, once it has taken ten seconds."""

    def __init__(self, label: str, model: OpenModel | None = None) -> None:
        self._label, self._start, self._done, self._drawn = label, time.monotonic(), 0, 0.0
        self._total = 0 if model is None else sum(x.size for x in jax.tree.leaves(model.shapes))

    def add(self, weights: int) -> None:
        """So many more weights are done."""
        self.reach(self._done + weights, self._total)

    def reach(self, done: int, total: int) -> None:
        """So many weights are done, of all."""
        self._done, self._total = done, total
        now = time.monotonic()
        seconds = now - self._start
        last = done >= total
        if not sys.stderr.isatty() or seconds < 10 or (now - self._drawn < 0.5 and not (last and self._drawn)):
            return
        self._drawn = now
        filled = 30 * done // max(total, 1)
        text = f"{self._label} [{'#' * filled:<30}] {done / max(total, 1):4.0%}  {done / seconds:.3g} weights/s"
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)


def _ratio(whole: int, part: int) -> float | None:
    return whole / part if part else None


def _times(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f}x"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _clean(text: str) -> str:
    """What a file says must not drive the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _table(head: list[str], rows: list[list[str]], flush_right: range) -> list[str]:
    """Aligned columns under a rule; the last row is a total."""
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: list[str]) -> str:
        aligned = (
            c.rjust(n) if i in flush_right else c.ljust(n) for i, (c, n) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * n for n in widths)
    return [line(head), rule, *map(line, rows[:-1]), rule, line(rows[-1])]


if __name__ == "__main__":
    sys.exit(main())
