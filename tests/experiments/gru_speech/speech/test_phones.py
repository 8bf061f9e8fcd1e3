"""The three sets of phones, and how they fold."""

import numpy as np
import pytest

from experiments.gru_speech.speech import phones


def test_the_numbers_of_phones() -> None:
    assert [len(p) for p in (phones.PHONES_61, phones.PHONES_48, phones.PHONES_39)] == [61, 48, 39]


def test_lee_and_hons_groups() -> None:
    groups = {}
    for p, to in phones.TO_39.items():
        groups.setdefault(to, set()).add(p)
    assert groups["sil"] == {"bcl", "dcl", "gcl", "pcl", "tcl", "kcl", "h#", "pau", "epi"}
    assert groups[None] == {"q"}
    assert (groups["ah"], groups["aa"], groups["sh"]) == ({"ah", "ax", "ax-h"}, {"aa", "ao"}, {"sh", "zh"})
    assert (groups["n"], groups["l"], groups["er"]) == ({"n", "en", "nx"}, {"l", "el"}, {"er", "axr"})
    assert sum(map(len, groups.values())) == 61


@pytest.mark.parametrize("trained", [39, 48, 61])
def test_folding_by_way_of_the_trained_ones_is_folding_at_once(trained) -> None:
    inventory = phones.timit(trained)
    assert len(inventory.names) == trained
    for phone, want in phones.TO_39.items():
        have = inventory.folded(inventory.trained([phone]))
        assert [inventory.scored[k] for k in have] == ([want] if want else [])


def test_equal_neighbours_stay_two() -> None:
    inventory = phones.timit(48)
    heard = inventory.folded(inventory.trained(["bcl", "b", "q", "pau", "h#"]))
    assert [inventory.scored[k] for k in heard] == ["sil", "b", "sil", "sil"]


def test_another_number_is_refused() -> None:
    with pytest.raises(ValueError, match="phones=40"):
        phones.timit(40)
    assert np.all(np.array(phones.plain(["a", "b"]).fold) == [0, 1])
