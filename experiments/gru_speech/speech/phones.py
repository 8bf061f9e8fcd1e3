"""TIMIT's 61 phones, the 48 that are trained and the 39 that are scored.

Source: K.-F. Lee, H.-W. Hon, "Speaker-Independent Phone Recognition Using Hidden Markov Models", 1989.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# phone: what it is trained as (of 48), what that is scored as (of 39); the glottal stop is left out of both
_FOLDING = """
aa aa aa    ae ae ae    ah ah ah    ao ao aa    aw aw aw    ax ax ah    ax-h ax ah  axr er er   ay ay ay
b b b       bcl vcl sil ch ch ch    d d d       dcl vcl sil dh dh dh    dx dx dx    eh eh eh    el el l
em m m      en en n     eng ng ng   epi epi sil er er er    ey ey ey    f f f       g g g       gcl vcl sil
h# sil sil  hh hh hh    hv hh hh    ih ih ih    ix ix ih    iy iy iy    jh jh jh    k k k       kcl cl sil
l l l       m m m       n n n       ng ng ng    nx n n      ow ow ow    oy oy oy    p p p       pau sil sil
pcl cl sil  r r r       s s s       sh sh sh    t t t       tcl cl sil  th th th    uh uh uh    uw uw uw
ux uw uw    v v v       w w w       y y y       z z z       zh zh sh
"""
_WORDS = _FOLDING.split()
TO_48: dict[str, str | None] = {"q": None, **dict(zip(_WORDS[::3], _WORDS[1::3], strict=True))}
TO_39: dict[str, str | None] = {"q": None, **dict(zip(_WORDS[::3], _WORDS[2::3], strict=True))}
PHONES_61 = tuple(sorted(TO_48))
PHONES_48 = tuple(sorted({p for p in TO_48.values() if p}))
PHONES_39 = tuple(sorted({p for p in TO_39.values() if p}))


class Inventory(NamedTuple):
    """What a network is trained on and what its errors are counted on.

    Attributes:
      names: the trained units; a network's output k is names[k].
      scored: the units that errors are counted on.
      fold: position in `scored` of every trained unit; -1 is left out.
      of: label of the corpus -> position in `names`; -1 is left out.
    """

    names: tuple[str, ...]
    scored: tuple[str, ...]
    fold: tuple[int, ...]
    of: dict[str, int]

    def trained(self, labels: Iterable[str]) -> list[int]:
        """Trained units of a sequence of corpus labels, those left out gone."""
        return [k for label in labels if (k := self.of[label]) >= 0]

    def folded(self, units: Sequence[int]) -> list[int]:
        """Scored units of a sequence of trained ones; equal neighbours stay two, as is usual in scoring."""
        return [self.fold[k] for k in units if self.fold[k] >= 0]


def plain(names: Sequence[str]) -> Inventory:
    """Units that are trained and scored as they are."""
    names = tuple(names)
    return Inventory(names, names, tuple(range(len(names))), {n: i for i, n in enumerate(names)})


def timit(trained: int = 48) -> Inventory:
    """TIMIT's phones, scored as 39, trained as 39, 48 or all 61.

    Raises:
      ValueError: another number.
    """
    if trained == 61:
        names, of = PHONES_61, {p: i for i, p in enumerate(PHONES_61)}
        scored: list[str | None] = [TO_39[p] for p in names]
    elif trained in (39, 48):
        names, table = (PHONES_39, TO_39) if trained == 39 else (PHONES_48, TO_48)
        of = {p: names.index(q) if q else -1 for p, q in table.items()}
        scored = [next(TO_39[p] for p, q in table.items() if q == name) for name in names]
    else:
        raise ValueError(f"phones={trained} is impossible; it must be 39, 48 or 61")
    return Inventory(names, PHONES_39, tuple(PHONES_39.index(s) if s else -1 for s in scored), of)
