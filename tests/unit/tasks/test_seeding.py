"""A permutation computed per index is a permutation, and depends on all of its key."""

from hypothesis import given
from hypothesis import strategies as st

from rlsys.tasks.seeding import Permutation, derive_seed


@given(size=st.integers(1, 400), key=st.integers())
def test_every_index_has_one_image_and_every_image_one_index(size, key):
    order = Permutation(size, key)
    assert sorted(order(index) for index in range(size)) == list(range(size))


@given(index=st.integers(0, 10**60 - 1))
def test_a_space_too_large_to_list_is_permuted_too(index):
    assert 0 <= Permutation(10**60, 0)(index) < 10**60


def test_images_are_spread_evenly():
    """The first 1,000 of 10,000: each tenth gets 100 give or take 4 standard deviations (9.5)."""
    order = Permutation(10_000, "even")
    tenths = [0] * 10
    for index in range(1_000):
        tenths[order(index) // 1_000] += 1
    assert all(62 <= count <= 138 for count in tenths)


def test_a_different_key_is_a_different_order():
    orders = {tuple(Permutation(50, seed, "epoch", epoch)(i) for i in range(50)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_seeds_of_different_streams_differ_and_are_stable():
    assert derive_seed(3, "train") == derive_seed(3, "train")
    assert len({derive_seed(seed, stream) for seed in range(100) for stream in ("train", "eval")}) == 200
