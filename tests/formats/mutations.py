"""Packed weights damaged at random, as the fuzz tests of the formats share them."""

import numpy as np
from hypothesis import strategies as st

from compressx.formats import Packed

VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-1, 1 << 40)
    | st.integers(1, 64)
    | st.text(max_size=3)
    | st.lists(st.integers(-1, 1 << 40))
)


def mutated(data: st.DataObject, packed: Packed) -> Packed:
    """One to three mutations: a byte of an array, its end, a missing array, the shape, or an entry of the header."""
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(packed.arrays)))
        a = packed.arrays[name].copy()
        what = data.draw(st.sampled_from(["bytes", "cut", "shape", "meta", "drop"]))
        if what == "bytes" and a.nbytes:
            raw = a.reshape(-1).view(np.uint8)
            raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
        elif what == "cut" and a.ndim:
            a = a[: data.draw(st.integers(0, len(a)))]
        elif what == "shape":
            packed = packed._replace(shape=tuple(data.draw(st.lists(st.integers(0, 1 << 40), max_size=5))))
        elif what == "meta" and packed.meta:
            field = data.draw(st.sampled_from(sorted(packed.meta)))
            packed = packed._replace(meta={**packed.meta, field: data.draw(VALUES)})
        packed = packed._replace(arrays={**packed.arrays, name: a})
        if what == "drop" and len(packed.arrays) > 1:
            packed = packed._replace(arrays={k: v for k, v in packed.arrays.items() if k != name})
    return packed
