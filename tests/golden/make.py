"""Golden figures: what the library computes for fixed inputs, remade and compared with what is stored beside this file.

    python -m tests.golden.make                        # remakes every figure, prints which differ, writes nothing
    python -m tests.golden.make 'sets/unify*'          # likewise for those of that name
    python -m tests.golden.make --only 'sets/unify*'   # writes those of that name that differ
    python -m tests.golden.make --list

README.md says which figures are held to what, and when one may be written anew.
"""

import argparse
import fnmatch
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tests.golden import adapter, cases
from tests.golden.figures import (
    FOLDER,
    Figure,
    driver_figure,
    file_figure,
    network_figure,
    save_file,
    set_figure,
    stored_file,
)

GROUPS: dict[str, tuple[Mapping[str, Any], Callable[[str], Figure]]] = {
    "sets": (cases.SETS, set_figure),
    "files": (cases.FILES, file_figure),
    "networks": (cases.NETWORKS, network_figure),
    "drivers": (cases.DRIVERS, driver_figure),
}


def names() -> list[str]:
    """All figures, as `group/name`."""
    return [f"{group}/{name}" for group, (table, _) in GROUPS.items() for name in table]


def stored(group: str) -> dict[str, Figure]:
    """The stored figures of a group by name."""
    path = FOLDER / f"{group}.json"
    figures: dict[str, Figure] = json.loads(path.read_text()) if path.exists() else {}
    return figures


def make(name: str) -> Figure:
    """The figure of `group/name` as the library makes it now, in the form in which figures are stored."""
    group, _, case = name.partition("/")
    figure: Figure = json.loads(json.dumps(GROUPS[group][1](case), allow_nan=False))
    return figure


def differences(name: str) -> list[str]:
    """Where the figure of `group/name` is not what is stored, a line each; none where nothing has changed."""
    group, _, case = name.partition("/")
    old = stored(group).get(case)
    return [f"{name}: there is no such figure"] if old is None else list(compare(name, old, make(name)))


def compare(at: str, old: Any, new: Any) -> Iterator[str]:
    """The leaves at which two figures differ, each as a line `path: old -> new`."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        if type(old) is not type(new) or old != new:
            yield f"{at}: {_brief(old)} -> {_brief(new)}"
    elif "within" in old and "within" in new:
        a, b = (np.asarray(x["value"], np.float64) for x in (old, new))
        if a.shape != b.shape:
            yield f"{at}: shape {list(a.shape)} -> {list(b.shape)}"
        elif not np.all(np.abs(a - b) <= old["within"]):  # a NaN is never near
            worst = float(np.max(np.abs(a - b)))
            where = f" (the largest of {a.size} differences)" if a.size > 1 else f" ({_brief(float(a))} -> {float(b)})"
            yield f"{at}: differs by {worst:.3g}, more than {old['within']:.3g}{where}"
    else:
        for key in [*old, *(k for k in new if k not in old)]:
            if key not in old or key not in new:
                yield f"{at}/{key}: {'new' if key in new else 'gone'}"
            else:
                yield from compare(f"{at}/{key}", old[key], new[key])


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:20]}..."


def write(group: str, figures: Mapping[str, Figure]) -> None:
    """Stores the figures of a group, in the order of the cases; those of cases that are gone go too."""
    kept = {name: figures[name] for name in GROUPS[group][0] if name in figures}
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1, allow_nan=False)
    (FOLDER / f"{group}.json").write_text(_joined(text) + "\n")


def _joined(text: str) -> str:
    """JSON with the innermost lists on one line each."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 where figures differ and were not written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", nargs="?", default="*", help="compare these figures alone: a name, or with * and ?")
    parser.add_argument("--only", metavar="NAME", help="write these figures anew, where they differ")
    parser.add_argument("--list", action="store_true", help="print the names of all figures")
    chosen = parser.parse_args(argv)
    if chosen.list:
        print("\n".join(names()))
        return 0
    wanted = [n for n in names() if fnmatch.fnmatchcase(n, chosen.only or chosen.name)]
    if not wanted:
        parser.error(f"no figure has the name {chosen.only or chosen.name!r}; --list prints them all")
    print(", ".join(f"{k} {v}" for k, v in adapter.about().items()), f"on {platform.processor() or platform.machine()}")
    changed = 0
    for name in wanted:
        group, _, case = name.partition("/")
        if chosen.only and group == "files" and not stored_file(case).exists():
            stored_file(case).parent.mkdir(parents=True, exist_ok=True)
            save_file(case, stored_file(case))
        old, new = stored(group).get(case), make(name)
        found = [f"{name}: new"] if old is None else list(compare(name, old, new))
        changed += bool(found)
        print("\n".join(found) or f"{name}: as it was", flush=True)
        if found and chosen.only:
            write(group, stored(group) | {case: new})
    print(f"{changed} of {len(wanted)} figures {'written' if chosen.only else 'differ'}")
    if changed and chosen.only:
        print("Say in changes.md what changed each of them.")
    return int(bool(changed) and not chosen.only)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
