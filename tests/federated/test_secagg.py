"""Masking gives the sum, also without those who dropped out, and an upload alone says nothing."""

import numpy as np
import pytest

from compressx.federated import secagg
from compressx.federated.trusted.refused import Refused


def run(vectors: dict[int, np.ndarray], stay: list[int], threshold: int):
    members = {k: secagg.Member(k, threshold) for k in vectors}
    advertised = {k: m.advertise() for k, m in members.items()}
    shares = {k: m.share(advertised) for k, m in members.items()}
    uploads = {k: members[k].masked(vectors[k], {j: shares[j][k] for j in members if j != k}) for k in stay}
    revealed = {k: members[k].reveal(stay) for k in stay}
    moved_up = sum(len(a) for a in advertised.values()) + sum(len(s) for x in shares.values() for s in x.values())
    moved_up += sum(map(len, uploads.values())) + sum(len(s) for x in revealed.values() for s in x.values())
    return secagg.unmask(uploads, advertised, revealed, threshold), uploads, moved_up, members


@pytest.mark.parametrize("stay", [[0, 1, 2, 3], [0, 2, 3], [1, 3]])
def test_the_sum_of_those_who_stayed(rng, stay: list[int]) -> None:
    vectors = {k: rng.integers(0, 2**32, 300, dtype=np.uint32) for k in range(4)}
    total, uploads, moved, _ = run(vectors, stay, threshold=2)
    expected = np.zeros(300, np.uint32)
    for k in stay:
        expected = expected + vectors[k]
    np.testing.assert_array_equal(total, expected)
    assert moved == secagg.round_bytes(4, len(stay), 300)[1]
    for k in stay:  # an upload is far from the vector in nearly every entry
        assert np.mean(np.frombuffer(uploads[k], "<u4") == vectors[k]) < 0.05


def test_the_mean_of_real_updates(rng) -> None:
    updates = {k: rng.standard_normal(500).astype(np.float32) for k in range(3)}
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    fields = {k: secagg.to_field(updates[k], weights[k]) for k in updates}
    total, _, _, _ = run(fields, [0, 2], threshold=2)
    expected = (0.5 * updates[0] + 0.2 * updates[2]) / 0.7
    np.testing.assert_allclose(secagg.from_field(total, 0.7), expected, atol=1e-6)


def test_shamir(rng) -> None:
    secret = rng.bytes(32)
    shares = secagg.split_secret(secret, [0, 3, 5, 9], 3)
    for chosen in ([0, 3, 5], [9, 5, 0], [0, 3, 5, 9]):
        assert secagg.join_shares({k: shares[k] for k in chosen}, 3) == secret
    with pytest.raises(Refused, match="3 are needed"):
        secagg.join_shares({k: shares[k] for k in (0, 3)}, 3)
    with pytest.raises(Refused, match="do not belong together"):
        secagg.join_shares({0: shares[0], 3: shares[3], 5: shares[9]}, 3)


def test_a_member_reveals_once_and_not_to_a_few(rng) -> None:
    vectors = {k: rng.integers(0, 2**32, 5, dtype=np.uint32) for k in range(3)}
    _, _, _, members = run(vectors, [0, 1, 2], threshold=2)
    with pytest.raises(Refused, match="revealed once"):
        members[0].reveal([0, 1])
    fresh = secagg.Member(0, 2)
    with pytest.raises(Refused):
        fresh.reveal([0])
