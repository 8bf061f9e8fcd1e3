"""Entity-linking files, checked: every fault is one `DataFileError` that begins with the file and names the line.

    aida_ppr      documents of AIDA with candidates, types and links, without text (JSON lines, xz)
    deep_ed       the CSV of Ganea and Hofmann that DCA reads: context, candidates, gold
    elevant       texts with gold names (JSON lines); candidates are made by `candidates_by_name`
    emerson       three people of one name (JSON lines and a CSV)
"""

import csv
import io
import json
import lzma
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.data.source import DataFileError
from experiments.entity_linking.linking.corpus import TYPES, Candidate, Document, Mention, canonical, words

LIMIT = 1 << 28  # bytes of one file, unpacked
_NEAR = 50  # words of context on each side


class Linked(NamedTuple):
    """Documents, and what their file says about entities: title -> type, and pairs of titles (from, to)."""

    documents: list[Document]
    types: dict[str, str]
    links: set[tuple[str, str]]


def _text(path: Path) -> str:
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as handle:
                data = handle.read(LIMIT + 1)
        else:
            with path.open("rb") as handle:
                data = handle.read(LIMIT + 1)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise DataFileError(f"{path}: cannot be read ({error})") from error
    if len(data) > LIMIT:
        raise DataFileError(f"{path}: larger than {LIMIT} bytes unpacked")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: is not UTF-8 ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataFileError(f"{path}: line {number} is not JSON ({error})") from error
            if not isinstance(value, dict):
                raise DataFileError(f"{path}: line {number} is no object")
            yield number, value


def aida_ppr(path: Path) -> dict[str, Linked]:
    """The documents of AIDA with PPRforNED's candidates, by split: train (1 to 946), dev (to 1162), test.

    The prior of a candidate is its share of the candidates' in-links, each counted once more. Mentions whose gold is
    not in Wikipedia are not to be linked. Types other than PER, ORG and GPE are UNK.
    """
    splits: dict[str, Linked] = {s: Linked([], {}, set()) for s in ("train", "dev", "test")}
    for number, line in _json_lines(path):
        try:
            name = line["doc"]
            if type(name) is not int:
                raise TypeError(f"doc is {name!r}, no number")
            part = splits["train" if name <= 946 else "dev" if name <= 1162 else "test"]
            titles: dict[int, str] = {}
            mentions = []
            for m in line["mentions"]:
                rows = [(int(i), str(title), int(n), str(kind)) for i, title, n, _, kind in m["c"]]
                whole = sum(max(n, 0) + 1 for _, _, n, _ in rows)
                for i, title, _, kind in rows:
                    titles[i] = title
                    part.types[title] = kind if kind in TYPES else "UNK"
                found = canonical(Candidate(title, (max(n, 0) + 1) / whole) for _, title, n, _ in rows)
                gold = None if m["gold"] is None else str(m["gold"])
                mentions.append(Mention(str(m["text"]), found, gold, link=gold is not None))
            for a, others in line["links"].items():
                source = titles.get(int(a))
                if source is not None:
                    part.links.update((source, titles[b]) for b in map(int, others) if b in titles)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataFileError(f"{path}: line {number} is no document ({type(error).__name__}: {error})") from error
        part.documents.append(Document(str(name), tuple(mentions)))
    return splits


def deep_ed(path: Path, near: int = _NEAR) -> list[Document]:
    """The documents of a CSV of deep-ed, as DCA and mulrel-nel read it. Fields are separated by tabs:

        document  document  mention  left context  right context  CANDIDATES  id,p,title ...  GT:  rank,id,...,title

    with EMPTYCAND for no candidates, EMPTYCTXT for no context and a rank of -1 for a gold that is no candidate. Gold is
    known by its id, not its rank. The order of candidates is not kept. Consecutive lines with one name are a document.
    """
    documents: list[Document] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        fields = line.rstrip("\r").split("\t")
        if len(fields) < 9 or fields[5] != "CANDIDATES" or fields[-2] != "GT:":
            raise DataFileError(f"{where}: is no mention with CANDIDATES as field 6 and GT: as the last but one")
        listed = [] if fields[6] == "EMPTYCAND" else [_candidate(f, where) for f in fields[6:-2]]
        gold = fields[-1].split(",")
        by_id = dict(listed)
        if len(gold) >= 2 and gold[1] in by_id:
            title: str | None = by_id[gold[1]].title
        else:
            title = _title(",".join(gold[2:])) or None
            if gold[0] != "-1" or title is None:
                raise DataFileError(f"{where}: gold {fields[-1]!r:.80} is neither a candidate nor -1,id,title")
        left, right = (() if f == "EMPTYCTXT" else words(f) for f in fields[3:5])
        found = canonical(c for _, c in listed)
        mention = Mention(fields[2], found, title, left=left[-near:], right=right[:near])
        if documents and documents[-1].name == fields[0]:
            documents[-1] = documents[-1]._replace(mentions=(*documents[-1].mentions, mention))
        else:
            documents.append(Document(fields[0], (mention,)))
    if not documents:
        raise DataFileError(f"{path}: holds no mention")
    return documents


def _title(text: str) -> str:
    return text.strip().replace(" ", "_")


def _candidate(field: str, where: str) -> tuple[str, Candidate]:
    number, _, rest = field.partition(",")
    prior, _, title = rest.partition(",")
    try:
        p = float(prior)
    except ValueError:
        p = math.nan
    if not (0 <= p <= 1 + 1e-6) or not title.strip():
        raise DataFileError(f"{where}: candidate {field!r:.80} is not id,p,title with p in [0, 1]")
    return number, Candidate(_title(title), min(p, 1.0))


def elevant(path: Path, near: int = _NEAR) -> list[Document]:
    """Texts with gold names as titles, without candidates; labels of dates, numbers and pronouns are not to be linked.

    Labels outside the annotated span are left out, and so are labels inside others.
    """
    documents = []
    for number, line in _json_lines(path):
        try:
            text, mentions = str(line["text"]), []
            first, last = line.get("evaluation_span") or (0, len(text))
            for label in sorted(line["labels"], key=lambda x: x["span"]):
                start, end = (int(x) for x in label["span"])
                if not 0 <= start < end <= len(text):
                    raise ValueError(f"span {label['span']} is not inside a text of {len(text)}")
                if start < first or end > last or label.get("parent") is not None:
                    continue
                known = str(label["entity_id"]).startswith("Q") and not label.get("coref", False)
                gold = _title(str(label["name"])) if known else None
                left, right = words(text[:start])[-near:], words(text[end:])[:near]
                mentions.append(Mention(text[start:end], (), gold, known, left, right))
        except (KeyError, TypeError, ValueError) as error:
            raise DataFileError(f"{path}: line {number} is no text with labels ({error})") from error
        documents.append(Document(f"{path.name}:{number}", tuple(mentions)))
    return documents


def candidates_by_name(
    documents: Sequence[Document], known: Sequence[Document], titles: Sequence[str], most: int = 50
) -> list[Document]:
    """Documents with candidates for their mentions, found by name; other candidates are dropped.

    A mention's candidates are those of the same mention in `known` documents (averaged), or else the entities with that
    title, whatever stands in its brackets. A gold outside `titles` is out of the knowledge base: not to be linked.
    """
    seen: dict[str, list[tuple[Candidate, ...]]] = defaultdict(list)
    for m in {(m.text.lower(), m.candidates): m for d in known for m in d.mentions}.values():
        seen[m.text.lower()].append(m.candidates)
    called: dict[str, list[str]] = defaultdict(list)
    for title in titles:
        called[title.split("_(")[0].replace("_", " ").lower()].append(title)
    there = set(titles)

    def change(m: Mention) -> Mention:
        name = m.text.lower()
        total: dict[str, float] = defaultdict(float)
        for candidates in seen.get(name, []):
            for c in candidates:
                total[c.title] += c.prior / len(seen[name])
        if not total:
            total |= {t: 1 / len(called[name]) for t in called.get(name, [])}
        found = canonical(Candidate(t, min(p, 1.0)) for t, p in total.items())[:most]
        inside = m.gold is not None and m.gold in there
        return m._replace(candidates=found, link=m.link and inside, gold=m.gold if inside else None)

    return [d._replace(mentions=tuple(map(change, d.mentions))) for d in documents]


def emerson(folder: Path) -> tuple[list[Document], dict[str, str]]:
    """Sentences about three people called Emerson, with equal priors; and the description of each by its id.

    Sentences whose right answer is none of the three are kept with gold None (NIL).
    """
    rows = list(csv.reader(io.StringIO(_text(folder / "entities.csv"))))
    if not rows or any(len(row) != 3 for row in rows):
        raise DataFileError(f"{folder / 'entities.csv'}: every line must be id, name, description")
    told: Mapping[str, str] = {row[0]: f"{row[1]} {row[2]}" for row in rows}
    path, documents = folder / "emerson_annotated_text.jsonl", []
    for number, line in _json_lines(path):
        try:
            text, accepted = str(line["text"]), [a for a in line["accept"] if a in told]
            listed = [Candidate(o["id"], 1 / len(told)) for o in line["options"] if o["id"] in told]
            (span,) = line["spans"]
            left, right = words(text[: span["start"]]), words(text[span["end"] :])
            gold = accepted[0] if accepted else None
            mention = Mention(str(span["text"]), canonical(listed), gold, True, left[-_NEAR:], right[:_NEAR], "PER")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataFileError(f"{path}: line {number} is no annotated sentence ({error})") from error
        documents.append(Document(f"emerson:{number}", (mention,)))
    return documents, dict(told)
