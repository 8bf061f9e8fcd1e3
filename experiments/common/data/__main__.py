"""Says of each data set whether it is here, and how to get it: `python -m experiments.common.data [--data_dir=DIR]`."""

import argparse
import os
from pathlib import Path

from compressx.doctor import Check
from experiments.common import data


def data_set(name: str, data_dir: str | None) -> Check:
    """A data set, by the same search as training's; nothing is downloaded."""
    label, source = f"data {name}", data.DATASETS[name]
    found: list[Path] = []
    try:
        for split in source.splits:
            found += data.find_files(source, split, data_dir, download=False)
    except data.DataNotFoundError as error:
        url = all(f.url for files in source.splits.values() for f in files)
        how = "downloaded on first use" if url else f"{source.obtain}; then set --data_dir or $COMPRESSX_DATA"
        missing = str(error).split(". ")[0]
        return Check(label, False, False, missing, how if "not found" in missing else str(error))
    where = str(Path(os.path.commonpath(found)) if len(found) > 1 else found[0]) if found else "embedded"
    stand_in = " (a stand-in)" if source.info.stand_in else ""
    return Check(label, True, False, where + stand_in)


def main() -> None:
    """Prints a line for each data set."""
    parser = argparse.ArgumentParser(prog="python -m experiments.common.data", description=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", help="look for data here first, then in $COMPRESSX_DATA")
    given = parser.parse_args().data_dir
    for check in (data_set(name, given) for name in data.DATASETS):
        print(f"{'ok' if check.ok else 'absent':<9}{check.name:<26}{check.found}")
        if check.fix:
            print(f"{'':<9}{'':<26}-> {check.fix}")


if __name__ == "__main__":
    main()
