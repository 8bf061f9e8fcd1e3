"""Tables: figures come from the summaries, blocks are replaced and nothing else, a second run changes nothing."""

import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.report import markdown, tables
from experiments.common.report.declared import TableError, read_tables
from experiments.common.report.summary import SummaryError, own_summary, write_summary

DECLARED = """
[[table]]
name = "main"
driver = "cnn"
variant = "net_*"
columns = ["variant", "seeds", "compressed", "rate", { title = "area", key = "cnn.area", format = "number" }, "goal"]
[[table.goal]]
where = { variant = "net_85x" }
conditions = [{ key = "metric.compressed", at_least = 0.992 }, { key = "rate.constrained_weights", at_least = 85 }]
[[table.goal]]
where = { variant = "net_246x" }
conditions = [{ key = "metric.compressed", at_least = 0.99 }]
[[table.goal]]
where = { variant = "net_300x" }
conditions = [{ key = "metric.compressed", at_least = 0.99 }, { key = "latency_ms.compressed", at_most = 2 }]
[[table]]
name = "all"
columns = ["driver", "variant", "dataset", "violations", "paper"]
"""
GOAL = '[[table.goal]]\nwhere.variant = "x"\n'
README = """# Title

Text before.
<!-- results:main -->
old text
<!-- /results -->
Text after.

```
<!-- results:no_such_table -->
```
"""
ACCURACY = {"net_85x": (0.9921, 0.9925, 0.9917), "net_246x": (0.989, 0.9899, 0.99)}


@pytest.fixture
def root(tmp_path, sample):
    results = tmp_path / "docs" / "results"
    for variant, values in ACCURACY.items():
        for seed, value in enumerate(values):
            summary = sample.summary(
                variant=variant, seed=seed, metric__compressed=value, dataset__stand_in=False,
                rate__constrained_weights=85.5,
                cnn={"area": 1.5, "run": {"command": "run | me", "date": f"2026-01-0{seed + 1}T"}},
            )  # fmt: skip
            write_summary(results / variant / str(seed) / "summary.json", summary)
    write_summary(results / "other" / "summary.json", sample.summary(driver="speech", speech={}, violations=2))
    (results / "tables.toml").write_text(DECLARED)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def test_figures_are_mean_and_sample_deviation_and_goals_are_judged(root):
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 3
    for row, (variant, values) in zip(rows, ACCURACY.items(), strict=False):
        mean, deviation = 100 * statistics.fmean(values), 100 * statistics.stdev(values)
        assert row.startswith(f"| `{variant}` | 3 | {mean:.2f} ± {deviation:.2f} % | 85.5× | 1.5 | ")
    assert rows[0].endswith("≥ 99.20 % at ≥ 85×: met |")
    assert rows[1].endswith("≥ 99.00 %: **missed** |")
    assert rows[2] == "| `net_300x` | – | – | – | – | ≥ 99.00 % at ≤ 2.000 ms: not measured |"
    assert "- `net_85x`, seeds 0, 1, 2; `run \\| me`; 2026-01-01 to 2026-01-03" in text
    assert "sample standard deviation" in text and "old text" not in text
    assert text.startswith("# Title\n\nText before.\n<!-- results:main -->\n|")
    assert text.endswith("<!-- /results -->\nText after.\n\n```\n<!-- results:no_such_table -->\n```\n")


def test_check_and_idempotence(root, capsys):
    before = (root / "README.md").read_bytes()
    assert tables.main(["--root", str(root), "--check"]) == 1
    assert (root / "README.md").read_bytes() == before
    assert "not up to date" in capsys.readouterr().out
    assert tables.main(["--root", str(root)]) == 0
    once = (root / "README.md").read_bytes()
    assert once != before
    assert tables.main(["--root", str(root), "--check"]) == 0
    assert tables.main(["--root", str(root)]) == 0
    assert (root / "README.md").read_bytes() == once
    path = root / "docs/results/net_85x/0/summary.json"
    path.write_text(path.read_text().replace("0.9921", "0.5921"))
    assert tables.main(["--root", str(root), "--check"]) == 1


def test_a_stand_in_is_called_one_and_violations_add_up(root):
    (root / "README.md").write_text("<!-- results:all -->\n<!-- /results -->\n")
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert "| speech | `mnist_lenet5_unstructured` | digits, stand-in | 2 | 85.0× |" in text
    assert "| cnn | `net_246x` | digits | 0 | 85.0× |" in text
    assert text.index("net_85x") < text.index("net_246x") < text.index("speech")  # 85 before 246: numbers as numbers


def test_a_table_may_show_only_runs_that_have_a_figure(root, sample):
    has = sample.summary(driver="speech", speech={"rate": 1}, variant="b")
    write_summary(root / "docs/results/has/summary.json", has)
    declared = root / "docs/results/tables.toml"
    declared.write_text(declared.read_text().replace('name = "all"', 'name = "all"\nhaving = "speech.rate"'))
    (root / "README.md").write_text("<!-- results:all -->\n<!-- /results -->\n")
    assert tables.main(["--root", str(root)]) == 0
    rows = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| speech", "`b`"]]


def test_data_sets_are_never_averaged_together(root, sample):
    summary = sample.summary(variant="net_85x", seed=0, dataset__stand_in=True, metric__compressed=0.5)
    write_summary(root / "docs/results/net_85x/stand_in/summary.json", summary)
    tables.main(["--root", str(root)])
    text = (root / "README.md").read_text()
    assert "| `net_85x` (digits) | 3 | 99.21" in text
    assert "| `net_85x` (digits, stand-in) | 1 | 50.00 % |" in text


def test_a_seed_twice_is_an_error_unless_a_key_tells_the_rows_apart(root, sample, capsys):
    extra = sample.summary(variant="net_85x", seed=1, dataset__stand_in=False, cnn={"area": 9})
    write_summary(root / "docs/results/net_85x/again/summary.json", extra)
    before = (root / "README.md").read_bytes()
    assert tables.main(["--root", str(root)]) == 2
    assert "both seed 1" in capsys.readouterr().err
    assert (root / "README.md").read_bytes() == before
    declared = root / "docs/results/tables.toml"
    declared.write_text(
        DECLARED.replace('variant = "net_*"', 'variant = "net_*"\ngroup_by = ["cnn.area"]').split(
            '[[table]]\nname = "all'
        )[0]
    )
    assert tables.main(["--root", str(root)]) == 0
    assert "| 9 |" in (root / "README.md").read_text()


def test_a_benchmark_shows_its_median_and_quartiles(root):
    block = {"ours_ms": {"median": 10.0, "low": 9.5, "high": 11.25}, "ratio": {"median": 0.9, "low": 0.8, "high": 1.1}}
    write_summary(root / "docs/results/speed/a/summary.json", own_summary("speed", "lenet5", block))
    (root / "docs/results/tables.toml").write_text(
        """
        [[table]]
        name = "main"
        driver = "speed"
        columns = ["variant", { title = "ours", key = "speed.ours_ms", format = "milliseconds" }, "dense", "goal"]
        [[table.goal]]
        where = { variant = "lenet5" }
        conditions = [{ key = "speed.ratio.median", at_most = 1 }]
        """
    )
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert "| `lenet5` | 10.00 ms \\[9.500 ms, 11.25 ms\\] | – | ≤ 1: met |" in text
    assert "standard deviation" not in text


def test_null_in_some_seeds_is_said(root):
    path = root / "docs/results/net_85x/0/summary.json"
    path.write_text(path.read_text().replace('"compressed": 0.9921', '"compressed": null'))
    tables.main(["--root", str(root)])
    text = (root / "README.md").read_text()
    assert "(2 of 3)" in text
    assert "at ≥ 85×: not measured" in text


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- results:nope -->\n<!-- /results -->\n", "line 1: no table is named 'nope'"),
        ("<!-- results:main -->\n", "line 1: results:main is not closed"),
        ("\n<!-- /results -->\n", "line 2: a block is closed"),
        ("<!-- results:main -->\n<!-- results:all -->\n<!-- /results -->\n", "line 2: results:main of line 1"),
    ],
)
def test_bad_markers_are_named_and_nothing_is_written(root, capsys, document, message):
    (root / "README.md").write_text(document)
    assert tables.main(["--root", str(root)]) == 2
    assert message in capsys.readouterr().err
    assert (root / "README.md").read_text() == document


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[table]", "tables.toml"),
        ("[[tables]]\n", "'tables' is unknown"),
        ('[[table]]\nname = "a"\ncolumns = ["seeds"]\nfoo = 1\n', "'foo' is unknown"),
        ('[[table]]\ncolumns = ["seeds"]\n', "name is None"),
        ('[[table]]\nname = "a"\n', "columns is None"),
        ('[[table]]\nname = "a"\ncolumns = ["speed"]\n', "no column is named 'speed'"),
        ('[[table]]\nname = "a"\ncolumns = [{ title = "x" }]\n', "needs a title and a dotted key"),
        ('[[table]]\nname = "a"\ncolumns = [{ title = "x", key = "y", format = "z" }]\n', "format 'z' is unknown"),
        ('[[table]]\nname = "a"\ndriver = 3\ncolumns = ["seeds"]\n', "driver is 3"),
        ('[[table]]\nname = "a"\ngroup_by = "x"\ncolumns = ["seeds"]\n', "group_by is 'x'"),
        ('[[table]]\nname = "a"\ncolumns = ["seeds"]\n[[table.goal]]\nwhere = {}\n', "where is {}"),
        ('[[table]]\nname = "a"\ncolumns = ["seeds"]\n' + GOAL + "conditions = []\n", r"conditions is \[\]"),
        (
            '[[table]]\nname = "a"\ncolumns = ["seeds"]\n' + GOAL + 'conditions = [{ key = "y" }]\n',
            "a key and one number",
        ),
        ('[[table]]\nname = "a"\ncolumns = ["seeds"]\n[[table]]\nname = "a"\ncolumns = ["seeds"]\n', "two tables"),
    ],
)
def test_bad_declarations_are_named(tmp_path, text, message):
    path = tmp_path / "tables.toml"
    path.write_text(text)
    with pytest.raises(TableError, match=message):
        read_tables(path)


def test_a_damaged_summary_stops_everything(root, capsys):
    (root / "docs/results/net_85x/0/summary.json").write_text("{}")
    with pytest.raises(SummaryError, match="net_85x/0/summary.json"):
        tables.update(root)
    assert tables.main(["--root", str(root)]) == 2
    assert tables.main(["--root", str(root / "nowhere")]) == 2


def test_the_projects_own_tables_and_documents_are_up_to_date():
    root = Path(__file__).parents[4]
    assert [table.name for table in read_tables(root / tables.DECLARATIONS)]
    if not (root / "README.md").exists():
        pytest.skip("no README.md beside the package")
    assert not tables.update(root, check=True)


@given(st.text(max_size=60))
def test_any_text_is_one_cell(value):
    for cell in (markdown.text(value), markdown.code(value)):
        assert "\n" not in cell
        assert cell.count("|") == cell.count("\\|")
    assert "<" not in markdown.text(value)
    out, used = markdown.replace_blocks("<!-- results:a -->\n<!-- /results -->\n", {"a": markdown.text(value)}, "d")
    assert used == {"a"} and markdown.replace_blocks(out, {"a": "x"}, "d")[0].count("\n") == 3


def test_every_entry_of_a_list_is_a_row_and_a_list_of_numbers_its_seeds(root, sample):
    entries = [
        {"point": "9x", "accuracy": [0.90, 0.92]},
        {"point": "3x", "accuracy": [0.95]},
        {"point": None, "accuracy": [0.96, 0.96]},
    ]
    write_summary(root / "docs/results/sweep.d/summary.json", sample.summary(driver="sweep", sweep={"rows": entries}))
    declared = """
[[table]]
name = "main"
driver = "sweep"
rows = "sweep.rows"
columns = [{ title = "point", key = "row.point" }, { title = "accuracy", key = "row.accuracy", format = "percent" }]
"""
    (root / "docs/results/tables.toml").write_text(declared)
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "%" in line]
    assert rows == ["| 9x | 91.00 ± 1.41 % |", "| 3x | 95.00 % |", "| – | 96.00 % |"]
    assert text.count("no command recorded") == 1 and "seed 0" not in text  # where it comes from is said once


def test_entries_of_other_names_are_other_rows(root, sample):
    for seed, points in enumerate((("3x", "9x"), ("9x", "3x"))):
        rows = [{"point": p, "accuracy": [0.5 + seed / 10]} for p in points]
        summary = sample.summary(driver="sweep", seed=seed, sweep={"rows": rows})
        write_summary(root / f"docs/results/sweep.{seed}/summary.json", summary)
    (root / "docs/results/tables.toml").write_text(
        '[[table]]\nname = "main"\ndriver = "sweep"\nrows = "sweep.rows"\n'
        'columns = [{ title = "p", key = "row.point" }, { title = "a", key = "row.accuracy", format = "percent" }]\n'
    )
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert "±" not in text and sum("%" in line for line in text.splitlines()) == 4


MERGED = (
    '[[table]]\nname = "main"\ndriver = "net"\nrows = "net.rows"\ngroup_by = ["row.rate", "row.kind"]\n'
    'columns = ["seeds", { title = "r", key = "row.rate", format = "rate" }, '
    '{ title = "k", key = "row.kind", format = "text" }, '
    '{ title = "a", key = "row.accuracy", format = "percent" }]\n'
)


def _net(root, sample, variant, seed, rows):
    entries = [{"kind": kind, "rate": rate, "accuracy": a} for kind, rate, a in rows]
    summary = sample.summary(driver="net", variant=variant, seed=seed, net={"rows": entries})
    write_summary(root / f"docs/results/{variant}.{seed}/summary.json", summary)


def test_entries_that_agree_in_their_keys_are_one_row_of_all_variants(root, sample):
    _net(root, sample, "sweep", 0, [("both", 8.0, 0.5), ("one", 8.0, 0.25), ("both", 16.0, 0.75)])
    _net(root, sample, "seeds", 1, [("one", 8.0, 0.25), ("both", 8.0, 0.7)])
    _net(root, sample, "seeds", 2, [("one", 8.0, 0.25), ("both", 8.0, 0.9)])
    (root / "docs/results/tables.toml").write_text(MERGED)
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "%" in line]
    wanted = ["3 | 8.00× | both | 70.00 ± 20.00 %", "3 | 8.00× | one | 25.00 %", "1 | 16.0× | both | 75.00 %"]
    assert rows == [f"| {row} |" for row in wanted]
    assert text.count("`sweep`, seed 0") == text.count("`seeds`, seeds 1, 2") == 1
    _net(root, sample, "other", 2, [("one", 8.0, 0.5)])
    assert tables.main(["--root", str(root)]) == 2  # seed 2 twice in a row


def test_keys_of_entries_need_entries(root, capsys):
    (root / "docs/results/tables.toml").write_text(MERGED.replace('rows = "net.rows"\n', ""))
    assert tables.main(["--root", str(root)]) == 2
    assert "there are no rows" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["metric.dense", "metric", "no.such"])
def test_rows_that_are_none_are_refused(root, rows, capsys):
    (root / "docs/results/tables.toml").write_text(
        f'[[table]]\nname = "main"\nrows = "{rows}"\ncolumns = ["variant"]\n'
    )
    assert tables.main(["--root", str(root)]) == 2
    assert f"{rows} in " in capsys.readouterr().err


def test_a_table_of_chosen_runs_calls_them_by_name(root, capsys):
    named = '[table.rows_named]\n"cnn/net_8*" = "the eighties"\n"speech/*" = "speech | other"\n'
    declared = '[[table]]\nname = "main"\ncolumns = ["system", "variant", "seeds"]\n' + named
    (root / "docs/results/tables.toml").write_text(declared)
    assert tables.main(["--root", str(root)]) == 0
    lines = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
    assert len(lines) == 2 and lines[0].startswith("| the eighties | `net_85x`") and "speech \\| other" in lines[1]
    (root / "docs/results/tables.toml").write_text(declared.replace('"the eighties"', "8"))
    assert tables.main(["--root", str(root)]) == 2
    assert "DRIVER/VARIANT" in capsys.readouterr().err
