"""README's whole program, run as it stands there, and what it prints; README's length and its inner links."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def _said(text: str) -> tuple[str, list[float]]:
    """A text with its numbers taken out, and the numbers."""
    return NUMBER.sub("#", text), [float(n.replace(",", "")) for n in NUMBER.findall(text)]


def test_the_program_prints_what_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.partition("## A whole program\n")[2].partition("\n## ")[0]
    program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    shown = re.findall(r"```text\n(.*?)```", section, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    words, numbers = _said(out.getvalue())
    shown_words, shown_numbers = _said(shown)
    assert words == shown_words
    # Accuracies follow the processor's rounding; counts of weights do not.
    assert numbers == pytest.approx(shown_numbers, abs=3)
    assert numbers[-2:] == shown_numbers[-2:]
    dense, one_shot, compressed = numbers[:3]
    assert compressed > one_shot + 5 and compressed > dense - 3, "the program no longer shows its point"
    assert (tmp_path / "compressed.safetensors").is_file()


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def _pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _anchor(heading: str) -> str:
    """A heading's anchor, as forges make it."""
    text = re.sub(r"[`*]", "", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", _pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_inner_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        if anchor and there.suffix == ".md":
            headings = [_anchor(h) for h in re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)]
            assert anchor in headings, f"{target}: no such heading"
