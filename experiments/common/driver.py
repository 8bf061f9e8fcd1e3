"""What all drivers share: flags, the work directory and its config, and errors in one line."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from compressx._harden import ConstraintViolation
from compressx.formats import CompressedFileError
from compressx.native.memory import keep_memory
from experiments.common.data import DataFileError, DataNotFoundError, Info
from experiments.common.models.convert import CheckpointError as ModelFileError
from experiments.common.report import environment
from experiments.common.report.metrics import MetricsError
from experiments.common.report.summary import SummaryError, read_summary
from experiments.common.training import CheckpointError, ConfigError, Diverged, Interrupted, mesh

# What a user, a file or a full disk can cause: one line, exit code 1. Anything else keeps its traceback.
USER_ERRORS = (
    *(ConfigError, Diverged, CheckpointError, ConstraintViolation, ModelFileError, CompressedFileError),
    *(DataNotFoundError, DataFileError, MetricsError, SummaryError, OSError),
)


@dataclass(frozen=True)
class Options:
    """The flags beside the config.

    Attributes:
      workdir: where the run lives.
      data_dir: folder of data sets, or None to search `$COMPRESSX_DATA`.
      mesh: the devices, as `data=2` or `data=4,model=2`; "" for one.
      split: for evaluation, the split to evaluate on.
      command: the command line, to be recorded.
    """

    workdir: Path
    data_dir: str | None = None
    mesh: str = ""
    split: str = "test"
    command: str = ""


Function = Callable[[Any, Options], Any]


def main(module: str, run: Function, evaluate: Function, read: Callable[[Any], Any]) -> None:
    """Runs a driver from the command line.

    Args:
      module: for example `experiments.cnn`.
      run: `run(config, options)` for `--mode=run`.
      evaluate: likewise for `--mode=eval`.
      read: turns the ConfigDict into the driver's frozen config, or raises `ConfigError`.
    """
    config = config_flags.DEFINE_config_file("config", None, "the experiment: configs/<driver>.py:<variant>")
    flags.DEFINE_string("workdir", None, "folder of the run; the same command again resumes it")
    flags.DEFINE_enum(
        "mode", "run", ["run", "eval"], "run the experiment, or evaluate a finished one's compressed model"
    )
    flags.DEFINE_string("data_dir", None, "folder of data sets (default: $COMPRESSX_DATA)")
    flags.DEFINE_string("split", "test", "split that --mode=eval evaluates on")
    flags.DEFINE_string("mesh", "", "devices: data=2, or data=4,model=2 (default: one)")
    flags.DEFINE_string("coordinator", "", "HOST:PORT of the first process of a run over several")
    flags.DEFINE_integer("num_processes", 1, "processes of the run")
    flags.DEFINE_integer("process_id", 0, "number of this process, from 0")
    flags.mark_flags_as_required(["config", "workdir"])

    def start(argv: list[str]) -> None:
        f = flags.FLAGS
        logging.set_verbosity(logging.WARNING)  # orbax logs a dozen lines a save
        keep_memory()
        try:
            if len(argv) > 1:
                raise ConfigError(f"argument {argv[1]!r} is not a flag; flags start with --")
            try:
                mesh.start_processes(f.coordinator, f.num_processes, f.process_id)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            options = Options(Path(f.workdir), f.data_dir, f.mesh, f.split, environment.command(module))
            {"run": run, "eval": evaluate}[f.mode](read(config.value), options)
        except Interrupted as stopped:
            print(f"{stopped}. The same command resumes from there.", file=sys.stderr)
            sys.exit(130)
        except KeyboardInterrupt:
            print("stopped. The same command resumes from the last checkpoint.", file=sys.stderr)
            sys.exit(130)
        except USER_ERRORS as error:
            _stop(error)

    app.run(start, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's own parsing, with every fault of a flag or of the config as one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError, OSError) as error:
        lines = [
            line.strip() for line in str(error).replace("\\n", "\n").replace("\\'", "'").splitlines() if line.strip()
        ]
        if any(line.startswith("Traceback") for line in lines):
            text = lines[-1].partition(": ")[2] or lines[-1]  # what the config file itself raised
        else:
            text = " ".join(lines).strip("'")
        if not isinstance(error, flags.Error) and "configuration is not" not in text.lower():
            given = [a for a in argv if a.startswith("--config.")]
            text = f"{' '.join(given)}: the config has no such setting ({text})"
        _stop(ConfigError(text))
    raise AssertionError  # _stop does not return


def _stop(error: BaseException) -> None:
    print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    sys.exit(1)


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the work directory this config's, or checks that it is.

    Raises:
      ConfigError: it holds a run of another config; names the keys that differ.
    """
    check_claim(workdir, config)
    path = workdir / "config.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(config, indent=2) + "\n")


def check_claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the keys that differ, where the work directory holds a run of another config."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); use another --workdir") from None
    a, b = flatten(old), flatten(json.loads(json.dumps(config)))
    changed = [
        f"{k} ({a.get(k, 'absent')!r} there, {b.get(k, 'absent')!r} now)"
        for k in sorted(a | b)
        if a.get(k, ...) != b.get(k, ...)
    ]
    if changed:
        what = "; ".join(changed)
        raise ConfigError(f"{workdir} holds a run with another config; use another --workdir, or undo: {what}")


def finished(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that has finished, which is then left as it is; None where there is something to do.

    Raises:
      ConfigError: the work directory holds a run of another config.
    """
    check_claim(workdir, config)
    if not (workdir / "summary.json").exists():
        return None
    print(f"{workdir} is finished and left as it is; its report is {workdir / 'report.html'}")
    return read_summary(workdir / "summary.json")


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def dataset(info: Info, train: int | None, test: int) -> dict[str, Any]:
    """What a summary says of a data set; `train` is None where nothing was trained."""
    return {"name": info.name, "source": info.source, "train": train, "test": test, "stand_in": info.stand_in}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf of nested dicts and lists."""
    if isinstance(tree, Mapping):
        pairs = [(f"{prefix}.{k}" if prefix else str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list | tuple):
        pairs = [(f"{prefix}[{i}]", v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    out: dict[str, Any] = {} if pairs else {prefix: tree}
    for name, value in pairs:
        out |= flatten(value, name)
    return out
