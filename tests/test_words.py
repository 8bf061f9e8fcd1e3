"""The field's words: a list of phrases that the project once used for terms of the field stands nowhere in its text.

Read are documents, and the comments, docstrings and messages of the code; names in code and what stands in backticks
are quotations. `SPARED` lists what is meant literally.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compressx", "experiments", "configs", "tests", "docs", "benchmarks", ".ci")
SUFFIXES = (".py", ".md", ".rst", ".toml", ".cc", ".h")

# What not to write, and what to write.
WORDS = {
    r"\bat once\b|\brivals?\b": "one-shot (baseline); together; immediately",
    r"\b(leaves?|left|leaving) (open|(some|no|any)thing open)\b": "the structure of the set",
    r"\bthe pieces? (it|they) landed in\b|\bconvex pieces?\b": "active set, fixed support",
    r"\bplaces\b": "indices, positions; folders",
    r"\b(ADMM's|[Tt]he|its|decoupled|first|FedProx's) pulls?\b|\bADMM pulls\b|\bpulled\b": "proximal centre",
    r"\bparts of (the|a) phase\b": "fractions of the phase",
    r"\b(gone|goes|go|went|going) on (with|where|from)\b": "resumed; continues",
    r"\b(is|are|was|were|be) told\b(?! apart)": "run specification; reported",
    r"\bluck\b|\bby chance\b": "the same seed; at random",
    r"\bdealt\b": "randomly permuted; distributed",
    r"\b(in|all|several) lots\b": "batches",
    r"\bsqueez(ed|ing)\b": "compacted, compaction",
    r"\btaught by\b": "distilled from",
    r"\brectifiers?\b": "ReLU",
    r"\b(takes?|took) no (leaf|leaves)\b|\bholds? on\b": "matches no leaf; applies to",
    r"\bfewer constrained weights\b": "compression ratio (of the pruned layers)",
    r"\b(words|phones) wrong\b": "word error rate, phone error rate",
    r"\bbusy (core|machine)|\bquiet machine|\bprograms? that (was|were) not kept\b": "loaded; idle; throwaway script",
    r"\b(is|are|was|were) (wanted|had)\b|\b(not|be) had\b": "is required; could not be obtained",
    r"\b(comes?|came) to (on|to)\b|\bcame to\b|\b(stands?|stood) at\b": "evaluates; reaches, is",
}

# File and the phrase that is meant literally there: (part of a path, phrase).
SPARED = (("tests/test_words.py", ""),)


def _files() -> list[Path]:
    found = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SUFFIXES]
    found = [p for p in found if "docs/results/" not in p.as_posix() and "golden/figures" not in p.as_posix()]
    return [*found, *sorted(ROOT.glob("*.md"))]


def _prose(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that people read as text, each with its number, without what stands in backticks."""
    text = path.read_text()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kept = [
            (t.start[0] + k, line)
            for t in tokens
            if t.type == tokenize.COMMENT or (t.type == tokenize.STRING and re.search(r"\s", t.string))
            for k, line in enumerate(re.sub(r"\{[^{}]*\}", "{}", t.string).splitlines())
        ]
    elif path.suffix in (".cc", ".h"):
        kept = [(n, line.partition("//")[2]) for n, line in enumerate(text.splitlines(), 1)]
    else:
        kept = list(enumerate(text.splitlines(), 1))
    return [(n, re.sub(r"`[^`]*`", "``", line)) for n, line in kept]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[tuple[int, str]]]:
    """The prose of the files in which any phrase stands at all."""
    some = re.compile("|".join(WORDS), re.IGNORECASE)
    return {str(p.relative_to(ROOT)): _prose(p) for p in _files() if some.search(p.read_text())}


@pytest.mark.parametrize("phrase", WORDS)
def test_the_fields_words_are_used(phrase: str, texts: dict[str, list[tuple[int, str]]]) -> None:
    found = [
        f"{name}:{number}: {match.group()!r}"
        for name, lines in texts.items()
        for number, line in lines
        for match in re.finditer(phrase, line, re.IGNORECASE)
        if not any(part in name and word in match.group() for part, word in SPARED)
    ]
    assert not found, f"write {WORDS[phrase]!r} instead:\n" + "\n".join(found)


def test_phrases_are_found_in_prose_and_not_in_names(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text('"""All at once, and `at once`."""\nplaces = 1  # the places\nx = f"{places} are"\ny = "places"\n')
    hits = [(n, m.group()) for n, line in _prose(path) for m in re.finditer(r"at once|places", line)]
    assert hits == [(1, "at once"), (2, "places")]


def test_lines_of_prose_are_short() -> None:
    # A line of words is as wide as can be read. Tables, code and what cannot be parted are spared.
    long, code = [], None
    for path in sorted(p for p in _files() if p.suffix == ".md"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fence = re.match(r"\s*(`{3,}|~{3,}|:{3,}|<details>|</details>)", line)
            if fence:
                code = None if code else fence.group()
            elif not (code or line.startswith("    ") or line.lstrip().startswith(("|", "#", "!"))):
                if len(line) > 100 and " " in line[:100].strip():
                    long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not long

