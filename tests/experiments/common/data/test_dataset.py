"""`Dataset` holds more than images."""

import numpy as np
import pytest

from experiments.common.data.dataset import Dataset, Info, from_arrays

INFO = Info(name="x", source="", licence="", classes=2, shape=(4,))


def test_inputs_and_labels_may_be_dicts() -> None:
    ds = from_arrays(
        {
            "inputs/frames": np.zeros((5, 7, 3), np.float32),
            "inputs/length": np.arange(5),
            "labels/boxes": np.ones((5, 2, 4), np.float32),
            "labels/count": np.arange(5),
        },
        INFO,
    )
    assert len(ds) == 5 and set(ds.inputs) == {"frames", "length"} and set(ds.labels) == {"boxes", "count"}
    part = ds.take(np.array([4, 1]))
    assert part.inputs["length"].tolist() == part.labels["count"].tolist() == [4, 1]
    assert len(ds.take(slice(3))) == 3 and part.info is INFO


def test_take_rows_of_arrays() -> None:
    ds = Dataset(np.arange(8).reshape(4, 2), np.arange(4), INFO)
    assert ds.take(ds.labels > 1).inputs.tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": np.zeros(3), "labels": np.zeros(4)}, r"same number of rows, got {'inputs': 3, 'labels': 4}"),
        ({"inputs": np.zeros(3)}, "same number of rows"),
        ({"inputs": np.zeros(3), "label": np.zeros(3)}, "'label' is under neither"),
    ],
)
def test_what_does_not_fit_is_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_arrays(arrays, INFO)
