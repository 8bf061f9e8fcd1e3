"""Documents, readers, encoding, knowledge: leaks above all, then bad files, then closed forms."""

import json
import lzma
import random

import numpy as np
import pytest

from experiments.common.data import DataFileError
from experiments.entity_linking.linking import (
    corpus,
    encode,
    files,
    knowledge,
    mention_types,
    metrics,
    page,
    readers,
    vectors,
    world,
)
from experiments.entity_linking.linking.corpus import Candidate, Document, Mention

SIZES = world.Sizes(topics=4, names=10, sharing=3, documents=(8, 3, 3), mentions=(2, 6))
WORLD = world.generate(SIZES, 1)
TRAIN = WORLD.documents["train"]
KNOWN = knowledge.from_links(WORLD.types, WORLD.links, TRAIN, dim=5, most_inlinks=4, texts=WORLD.texts)


def _mention(text, priors, gold=None, **more):
    return Mention(text, tuple(Candidate(t, p) for t, p in priors.items()), gold, **more)


# -- leaks -------------------------------------------------------------------------------------------------------------


def _encode(documents, **more):
    return encode.encode(documents, KNOWN, slots=7, candidates=2, context=4, **more)


def test_the_order_of_candidates_in_a_file_changes_no_array() -> None:
    rng = random.Random(0)

    def shuffled(m):
        listed = list(m.candidates)
        rng.shuffle(listed)
        return m._replace(candidates=tuple(listed))

    documents = WORLD.documents["test"]
    moved = [corpus.map_mentions(d, shuffled) for d in documents]
    assert moved != documents
    for order in corpus.ORDERS:
        a, b = _encode(documents, order=order), _encode(moved, order=order)
        assert a.places == b.places
        assert all((a.arrays[k] == b.arrays[k]).all() for k in a.arrays)
    assert metrics.prior_only(documents) == metrics.prior_only(moved)


def test_blanked_gold_changes_no_array_but_gold() -> None:
    documents = WORLD.documents["test"]
    a, b = _encode(documents), _encode(corpus.without_gold(documents))
    assert all((a.arrays[k] == b.arrays[k]).all() for k in a.arrays if k not in ("gold", "scored"))
    assert (b.arrays["gold"] == -1).all()
    assert not b.arrays["scored"].any()
    assert a.arrays["scored"].any()


def test_counted_priors_and_types_of_a_training_document_do_not_know_its_own_gold() -> None:
    training, others = WORLD.documents["train"], WORLD.documents["test"]

    def swapped(m):
        return m._replace(gold=m.candidates[-1].title)

    lied = [corpus.map_mentions(training[0], swapped), *training[1:]]
    assert lied[0] != training[0]
    honest, dishonest = (corpus.with_counts(t, t) for t in (training, lied))
    assert [m.candidates for m in honest[0].mentions] == [m.candidates for m in dishonest[0].mentions]
    assert honest[1:] != dishonest[1:]
    for a, b in zip(*(mention_types.with_types(t, others, WORLD.types)[0] for t in (training, lied)), strict=True):
        if a.name == training[0].name:
            assert [m.type for m in a.mentions] == [m.type for m in b.mentions]
    blind = corpus.without_gold(others)
    assert [m.candidates for d in corpus.with_counts(others, training) for m in d.mentions] == [
        m.candidates for d in corpus.with_counts(blind, training) for m in d.mentions
    ]
    a, b = (mention_types.with_types(training, o, WORLD.types)[1] for o in (others, blind))
    assert [m.type for d in a for m in d.mentions] == [m.type for d in b for m in d.mentions]


# -- documents ---------------------------------------------------------------------------------------------------------


def test_counts_mix_with_priors() -> None:
    first = Document("a", (_mention("x", {"A": 0.5, "B": 0.5}, "B"),) * 2)
    second = Document("b", (_mention("X", {"A": 0.9, "B": 0.1}, "A"),))
    found = {d.name: dict(d.mentions[0].candidates) for d in corpus.with_counts([first, second], [first, second], 2.0)}
    assert found["b"] == pytest.approx({"B": (2 + 0.2) / 4, "A": 1.8 / 4})
    assert found["a"] == pytest.approx({"A": (1 + 1) / 3, "B": 1 / 3})


def test_short_names_of_persons_take_the_candidates_of_long_ones() -> None:
    long, other = _mention("Ian Lang", {"Ian_Lang": 0.8, "Iain_Lang": 0.2}), _mention("Jo Lang", {"Jo_Lang": 1.0})
    short, apart = _mention("Lang", {"Fritz_Lang": 1.0}), _mention("Langley", {"Langley": 1.0})
    document = Document("d", (long, short, other, apart, _mention("an", {})))
    found = corpus.coreference(document, {"Ian_Lang", "Jo_Lang", "Langley"}.__contains__)
    assert dict(found.mentions[1].candidates) == pytest.approx({"Jo_Lang": 0.5, "Ian_Lang": 0.4, "Iain_Lang": 0.1})
    assert [found.mentions[i] for i in (0, 2, 3, 4)] == [document.mentions[i] for i in (0, 2, 3, 4)]


def test_orders() -> None:
    sizes = (3, 1, 2, 1)
    mentions = [_mention(str(i), {f"{i}{k}": 0.1 for k in range(n)}) for i, n in enumerate(sizes)]
    document = Document("d", (*mentions, _mention("nil", {}, link=False)))
    assert corpus.ordered(document, "offset") == [0, 1, 2, 3]
    assert corpus.ordered(document, "size") == [1, 3, 2, 0]
    many = {tuple(corpus.ordered(document, "random", seed)) for seed in range(20)}
    assert len(many) > 5
    assert all(sorted(o) == [0, 1, 2, 3] for o in many)
    with pytest.raises(ValueError, match="order='learned'"):
        corpus.ordered(document, "learned")


def test_neighbouring_mentions_serve_as_context() -> None:
    mentions = [_mention(t, {}) for t in ("New York", "the Nets", "Kidd 23", "Boston Celtics")]
    found = corpus.with_neighbours(Document("d", tuple(mentions)), 3).mentions
    assert found[2].left == ("new", "york", "nets")
    assert found[2].right == ("boston", "celtics")
    assert found[0].right == ("nets", "kidd", "boston")


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_pruning_is_half_by_prior_and_half_by_context() -> None:
    titles = KNOWN.titles[1:7]
    priors = dict(zip(titles, (0.3, 0.25, 0.2, 0.15, 0.06, 0.04), strict=True))
    word = KNOWN.words[3]
    fit = KNOWN.entities[[KNOWN.number[t] for t in titles]] @ KNOWN.word_vectors[3]
    best = [titles[i] for i in np.argsort(-fit, kind="stable")[:2]]
    kept = [c.title for c in encode.prune(_mention("x", priors, left=(word,)), KNOWN, 4)]
    assert set(titles[:2]) | set(best) <= set(kept)
    assert len(kept) == 4
    assert kept == sorted(kept, key=lambda t: -priors[t])
    assert [c.title for c in encode.prune(_mention("x", priors), KNOWN, 4)] == list(titles[:4])


def test_every_mention_has_one_slot_and_long_documents_are_cut() -> None:
    documents = WORLD.documents["train"]
    found = encode.encode(documents, KNOWN, slots=4, candidates=3)
    numbers = found.arrays["place"][found.arrays["place"] >= 0]
    assert sorted(numbers) == list(range(len(found.places)))
    assert len(found.places) == sum(len(d.mentions) for d in documents)
    for r, row in enumerate(found.arrays["place"]):
        for t in range(1, 4):
            if row[t] >= 0 and found.arrays["document"][r, t] == found.arrays["document"][r, t - 1]:
                a, b = found.places[row[t - 1]], found.places[row[t]]
                assert (a.document, a.mention + 1) == (b.document, b.mention)
    longest = max(len(d.mentions) for d in documents)
    assert longest > 4


def test_unknown_entities_empty_lists_and_absent_gold_are_defined() -> None:
    title = KNOWN.titles[1]
    document = Document(
        "d",
        (
            _mention("unknown", {"No_such_entity": 0.7, title: 0.3}, "No_such_entity"),
            _mention("empty", {}, title),
            _mention("absent", {title: 1.0}, "Elsewhere"),
            _mention("nil", {title: 1.0}, None),
            _mention("left out", {title: 1.0}, None, link=False),
        ),
    )
    found = _encode([document])
    a = {k: x[0] for k, x in found.arrays.items()}
    assert a["candidates"][:4].tolist() == [[0, 1], [0, 0], [1, 0], [1, 0]]
    assert a["mask"][:5].sum(-1).tolist() == [2, 0, 1, 1, 0]
    assert a["gold"][:4].tolist() == [0, -1, -1, -1]
    assert a["scored"][:5].tolist() == [True, True, True, False, False]
    assert a["log_prior"][1].tolist() == pytest.approx([np.log(1e-8)] * 2)
    choice = np.full(found.arrays["gold"].shape, -1, np.int32)
    choice[0, [0, 2, 3]] = 0
    titles = metrics.titles([document], found, choice)
    assert titles == [["No_such_entity", None, title, title, None]]
    assert metrics.score([document], titles) == metrics.Score(right=1, predicted=3, gold=3)
    kinds = metrics.errors([document], found, titles)
    assert {k: n for k, n in kinds.items() if n} == {"no_candidates": 1, "not_listed": 1, "nil_linked": 1}
    assert len(_encode([document], answerable=True).places) == 1


# -- measures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "predicted", "precision", "recall", "f1"),
    [
        (("A", "B"), ("A", "B"), 1, 1, 1),
        (("A", "B"), ("A", None), 1, 0.5, 2 / 3),
        ((None, "B"), ("C", "B"), 0.5, 1, 2 / 3),
        ((None, None), (None, None), 0, 0, 0),
        (("A", "B", None), ("B", "B", None), 0.5, 0.5, 0.5),
    ],
)
def test_micro_scores_by_hand(gold, predicted, precision, recall, f1) -> None:
    document = Document("d", tuple(_mention("x", {"A": 0.5, "B": 0.3, "C": 0.2}, g) for g in gold))
    found = metrics.score([document], [list(predicted)])
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))


def test_kinds_of_errors() -> None:
    three = {"A": 0.5, "B": 0.3, "C": 0.2}
    document = Document("d", tuple(_mention("x", three, g) for g in ("A", "B", "B")))
    found = _encode([document])
    kinds = metrics.errors([document], found, [["B", "A", "C"]])
    kept = {c.title for c in found.places[0].candidates}
    want = {"left_the_prior": 1, "kept_to_the_prior": 1, "another": 1} if "B" in kept else None
    assert {k: n for k, n in kinds.items() if n} == want


def test_the_page_says_what_was_wrong_and_escapes_every_text() -> None:
    document = Document("<d>", (_mention("<b>x", {"A_<i>": 1.0}, "B"), _mention("y", {"B": 1.0}, "B")))
    found = _encode([document])
    text = page.documents_html([document], found, [["A_<i>", "B"]], page.Context({1: [("A_<i>", 0.75)]}))
    assert "<b>" not in text
    assert "<i>" not in text
    assert "wrong, gold is B" in text
    assert "context A &lt;i&gt; 0.75" in text
    assert "1 of 2 right" in text


# -- knowledge ---------------------------------------------------------------------------------------------------------


def test_ppmi_of_a_table_by_hand() -> None:
    counts = np.array([[2.0, 0, 1], [0, 3, 1], [1, 0, 0]])
    columns = counts.sum(0) ** 0.75
    columns /= columns.sum()
    want = np.zeros((3, 3))
    for i, j in zip(*np.nonzero(counts), strict=True):
        want[i, j] = max(0.0, np.log(counts[i, j] / counts[i].sum() / columns[j]))
    import scipy.sparse as sp

    np.testing.assert_allclose(vectors.ppmi(sp.csr_matrix(counts)).toarray(), want, rtol=1e-6)


def test_factors_span_what_a_full_decomposition_does() -> None:
    import scipy.sparse as sp

    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((30, 6)) * [9, 7, 5, 3, 0.1, 0.1]) @ rng.standard_normal((6, 25))
    found = vectors.factorise(sp.csr_matrix(matrix), 4)
    u, s, _ = np.linalg.svd(matrix)
    want = u[:, :4] * np.sqrt(s[:4])
    np.testing.assert_allclose(found @ found.T, want @ want.T, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="dim=26"):
        vectors.factorise(sp.csr_matrix(matrix), 26)


def test_words_are_the_mean_of_what_they_name() -> None:
    table = vectors.unit(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))
    found = vectors.of_words(4, [(1, 2, 2.0), (1, 3, 1.0), (2, 1, 5.0)], table)
    want = 2 * table[2] + table[3]
    np.testing.assert_allclose(found[1], want / np.linalg.norm(want), rtol=1e-6)
    np.testing.assert_allclose(found[2], table[1], rtol=1e-6)
    assert (found[[0, 3]] == np.float32(vectors.UNKNOWN)).all()


def test_types_of_mentions_are_the_most_probable_by_naive_bayes() -> None:
    documents, types = WORLD.documents["train"][:6], WORLD.types
    learn = [(m, types[m.gold]) for d in documents[:5] for m in d.mentions if m.gold in types]
    vocabulary = {mark for m, _ in learn for mark in mention_types._marks(m)}
    of = {kind: [mark for m, k in learn if k == kind for mark in mention_types._marks(m)] for _, kind in learn}

    def log_probability(m, kind):
        seen = [of[kind].count(mark) for mark in mention_types._marks(m) if mark in vocabulary]
        given = [(n + 1) / (len(of[kind]) + len(vocabulary)) for n in seen]
        return np.log(sum(k == kind for _, k in learn) / len(learn)) + np.log(given).sum()

    _, (typed,) = mention_types.with_types(documents[:5], documents[5:], types)
    assert [m.type for m in typed.mentions] == [
        max(sorted(of), key=lambda kind, m=m: log_probability(m, kind)) for m in typed.mentions
    ]


def test_inlink_words_name_the_pages_that_link() -> None:
    types = dict.fromkeys(("Red_fox", "Red_wolf", "Den"), "UNK")
    links = [("Red_fox", "Den"), ("Red_wolf", "Den"), ("Den", "Red_fox"), ("Elsewhere", "Den"), ("Den", "Den")]
    known = knowledge.from_links(types, links, [], dim=2, most_inlinks=2)
    words = {t: [known.words[w] for w in known.inlinks[known.number[t]] if w] for t in types}
    assert words == {"Den": ["red", "fox"], "Red_fox": ["den"], "Red_wolf": []}
    np.testing.assert_allclose(np.linalg.norm(known.entities[1:], axis=1), 1, rtol=1e-5)
    assert known.digest != knowledge.from_links(types | {"New": "UNK"}, links, [], dim=2, most_inlinks=2).digest


def test_the_world_is_its_seed() -> None:
    assert world.generate(SIZES, 1) == WORLD
    assert world.generate(SIZES, 2) != WORLD
    for documents in WORLD.documents.values():
        for m in (m for d in documents for m in d.mentions):
            assert m.gold in {c.title for c in m.candidates}
            assert sum(c.prior for c in m.candidates) == pytest.approx(1)
    with pytest.raises(ValueError, match="sharing=9"):
        world.generate(world.Sizes(topics=4, sharing=9))


# -- files -------------------------------------------------------------------------------------------------------------


def _aida(tmp_path, *lines):
    path = tmp_path / "docs.jsonl.xz"
    path.write_bytes(lzma.compress("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines).encode()))
    return path


GOOD = {
    "doc": 947,
    "mentions": [
        {"text": "Syria", "gold": "Syria", "c": [[7, "Syria_(x)", 1, 0, "UKN"], [5, "Syria", 7, 2, "GPE"]]},
        {"text": "Bob", "gold": None, "c": []},
    ],
    "links": {"5": [7, 99], "98": [5]},
}


def test_aida_is_read_by_split_with_candidates_sorted(tmp_path) -> None:
    found = readers.aida_ppr(_aida(tmp_path, GOOD, GOOD | {"doc": 1}, GOOD | {"doc": 1163}))
    assert [len(found[s].documents) for s in ("train", "dev", "test")] == [1, 1, 1]
    first, second = found["dev"].documents[0].mentions
    assert first.candidates == (Candidate("Syria", 0.8), Candidate("Syria_(x)", 0.2))
    assert (first.gold, first.link, second.gold, second.link) == ("Syria", True, None, False)
    assert found["dev"].links == {("Syria", "Syria_(x)")}
    assert found["dev"].types == {"Syria": "GPE", "Syria_(x)": "UNK"}


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", GOOD | {"doc": "x"}, {"doc": 1}, GOOD | {"mentions": [{"text": "a", "gold": None, "c": [[1, "a"]]}]}],
)
def test_damaged_aida_lines_are_named(tmp_path, line) -> None:
    with pytest.raises(DataFileError, match=r"docs\.jsonl\.xz: line 2 is no"):
        readers.aida_ppr(_aida(tmp_path, GOOD, line))


def test_a_truncated_archive_is_named(tmp_path) -> None:
    path = _aida(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataFileError, match=r"docs\.jsonl\.xz: cannot be read"):
        readers.aida_ppr(path)


def _csv(tmp_path, *rows):
    path = tmp_path / "set.csv"
    path.write_text("\n".join("\t".join(r) for r in rows) + "\n")
    return path


ROW = ["7 CUP", "7 CUP", "Japan", "in the lucky", "beat 2 Syria", "CANDIDATES"]


def test_deep_ed_rows(tmp_path) -> None:
    path = _csv(
        tmp_path,
        [*ROW, "3,0.2,Japan, team", "5,0.7,Japan", "GT:", "2,5,0.7,Japan"],
        [*ROW, "5,0.7,Japan", "GT:", "-1,9,New York"],
        ["8 X", "8 X", "it", "EMPTYCTXT", "EMPTYCTXT", "CANDIDATES", "EMPTYCAND", "GT:", "-1,9,Elsewhere"],
    )
    first, second = readers.deep_ed(path)
    assert [m.gold for m in first.mentions] == ["Japan", "New_York"]
    assert first.mentions[0].candidates == (Candidate("Japan", 0.7), Candidate("Japan,_team", 0.2))
    assert (first.mentions[0].left, first.mentions[0].right) == (("lucky",), ("beat", "syria"))
    assert second.mentions[0] == Mention("it", (), "Elsewhere")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([*ROW, "GT:", "-1,9,A"], "line 1: is no mention"),
        ([*ROW, "5,x,Japan", "GT:", "-1,9,A"], "line 1: candidate '5,x,Japan'"),
        ([*ROW, "5,1.5,Japan", "GT:", "-1,9,A"], r"p in \[0, 1\]"),
        ([*ROW, "5,0.5,Japan", "GT:", "1,9,A"], "gold '1,9,A' is neither"),
        (["a", "b"], "line 1: is no mention"),
    ],
)
def test_damaged_deep_ed_rows_are_named(tmp_path, row, words) -> None:
    with pytest.raises(DataFileError, match=words):
        readers.deep_ed(_csv(tmp_path, row))


def test_candidates_by_name_come_from_known_mentions_or_titles() -> None:
    known = [Document("k", (_mention("Steve", {"Steve_Jobs": 0.6, "Steve_Ballmer": 0.4}),))]
    mentions = (
        _mention("steve", {}, "Steve_Ballmer"),
        _mention("Apple", {}, "Apple_(company)"),
        _mention("Nobody", {}, "Nobody"),
        _mention("today", {}, None, link=False),
    )
    titles = ("Steve_Jobs", "Steve_Ballmer", "Apple", "Apple_(company)")
    (found,) = readers.candidates_by_name([Document("d", mentions)], known, titles)
    assert [dict(m.candidates) for m in found.mentions] == [
        {"Steve_Jobs": 0.6, "Steve_Ballmer": 0.4},
        {"Apple": 0.5, "Apple_(company)": 0.5},
        {},
        {},
    ]
    assert [(m.gold, m.link) for m in found.mentions] == [
        ("Steve_Ballmer", True),
        ("Apple_(company)", True),
        (None, False),
        (None, False),
    ]


def _deep_ed_layout(folder):
    rows = [[*ROW, "3,0.2,Japan, team", "5,0.7,Japan", "GT:", "2,5,0.7,Japan"]]
    (folder / "deep_ed/test_train_data").mkdir(parents=True)
    (folder / "deep_ed/embeddings").mkdir()
    for name in ("train", "dev", "test"):
        path = folder / "deep_ed/test_train_data" / files.DEEP_ED[name]
        path.write_text("\n".join("\t".join(r) for r in rows))
    titles = ("Other", "Japan,_team", "Japan")
    (folder / "deep_ed/embeddings/dict.entity").write_text("".join(f"en.wikipedia.org/wiki/{t}\t7\n" for t in titles))
    (folder / "deep_ed/embeddings/dict.word").write_text("lucky\t1\nsyria\t2\nnever\t3\ncup\t4\n")
    for name, n in (("entity", 3), ("word", 4)):
        np.save(folder / f"deep_ed/embeddings/{name}_embeddings.npy", np.eye(n, 4, dtype=np.float32) + 1)
    (folder / "deep_ed/inlinks.json").write_text(json.dumps({"Japan": ["cup", "cup", "nothing", "syria"]}))
    (folder / "deep_ed/entity_types.json").write_text(json.dumps({"Japan": "GPE"}))
    (folder / "deep_ed/descriptions.json").write_text(json.dumps({"Japan": "The lucky one"}))
    return folder


def test_the_full_layout_is_read(tmp_path) -> None:
    found = files.deep_ed(str(_deep_ed_layout(tmp_path)), most_inlinks=3)
    known = found.knowledge
    assert known.titles == ("", "Japan,_team", "Japan")
    assert known.words == ("", "lucky", "syria", "cup")
    np.testing.assert_allclose(known.entities[1], np.array([1, 2, 1, 1]) / np.sqrt(7), rtol=1e-6)
    assert known.inlinks.tolist() == [[0, 0, 0], [0, 0, 0], [3, 2, 0]]
    assert known.types.tolist() == [0, 0, corpus.TYPES.index("GPE")]
    assert known.descriptions[2, :2].tolist() == [1, 0]
    assert not found.stand_in


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("embeddings/entity_embeddings.npy", b"junk", "entity_embeddings.npy: is no array"),
        ("embeddings/dict.entity", b"one\n", "for the 1 names"),
        ("inlinks.json", b"[]", "inlinks.json: must be one object"),
        ("entity_types.json", b'{"Japan": "CITY"}', "type 'CITY' is none of UNK"),
        ("descriptions.json", b"{", "descriptions.json: is not JSON"),
    ],
)
def test_a_damaged_layout_is_named(tmp_path, name, content, words) -> None:
    folder = _deep_ed_layout(tmp_path)
    (folder / "deep_ed" / name).write_bytes(content)
    with pytest.raises(DataFileError, match=words):
        files.deep_ed(str(folder))


def test_a_knowledge_base_comes_back_from_its_cache_and_a_damaged_copy_is_made_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return KNOWN

    for _ in range(2):
        found = files._cached(("x",), make)
        assert found.titles == KNOWN.titles
        assert found.entities.tobytes() == KNOWN.entities.tobytes()
        assert found.digest == KNOWN.digest
    assert len(made) == 1
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    assert files._cached(("x",), make).titles == KNOWN.titles
    assert len(made) == 2


# -- real files --------------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_emerson(data_dir) -> None:
    documents, told = readers.emerson(data_dir / "entity_linking/emerson")
    assert len(documents) == 30
    assert set(told) == {"Q48226", "Q215952", "Q312545"}
    first = documents[0].mentions[0]
    assert first.gold == "Q312545"
    assert {"tennis", "players"} <= set(first.right)
    assert sum(d.mentions[0].gold is not None for d in documents) >= 28


@pytest.mark.data
@pytest.mark.parametrize(("name", "texts", "labels"), [("kore50", 50, 144), ("oke2015", 101, 664)])
def test_elevant(data_dir, name, texts, labels) -> None:
    documents = readers.elevant(data_dir / "entity_linking/elevant" / files.ELEVANT[name])
    assert len(documents) == texts
    assert 0.5 * labels <= sum(m.link for d in documents for m in d.mentions) <= labels
    assert documents[0].mentions[0].text in documents[0].mentions[0].text


@pytest.mark.data
@pytest.mark.slow
def test_the_aida_stand_in_is_what_its_description_says(data_dir) -> None:
    parts = readers.aida_ppr(data_dir / files.AIDA)
    assert {s: len(p.documents) for s, p in parts.items()} == {"train": 946, "dev": 216, "test": 171}
    counts = {s: sum(m.link for d in p.documents for m in d.mentions) for s, p in parts.items()}
    assert counts == {"train": 18540, "dev": 4791, "test": 2936}
    found = {s: metrics.score(p.documents, metrics.prior_only(p.documents)).f1 for s, p in parts.items()}
    assert found == pytest.approx({"train": 0.8505, "dev": 0.8144, "test": 0.8266}, abs=2e-3)
