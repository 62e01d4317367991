"""Seeds by name."""

import torch
from core_helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from fedrot.core.seeding import generator, seed_of

KEYS = [
    (0,), (1,), (-1,), ("0",), ("1",), ("",), (), (1, "a"), ("a", 1), ("a", "1"), (1, 1), (1, 1, 1), (11,), ("1", 1),
    (1, "shuffle", 3, "north"), (1, "shuffle", 3, "south"), (1, "shuffle", 4, "north"), (2, "shuffle", 3, "north"),
    ("ab", "c"), ("a", "bc"), ("abc",), (True,), ("True",),
]  # fmt: skip


def test_part_type_order_and_number_of_a_key_all_matter():
    assert len({seed_of(*key) for key in KEYS}) == len(KEYS)


@quick
@given(st.lists(st.integers() | st.text(), max_size=4))
def test_a_seed_is_the_same_every_time_and_torch_takes_it(key):
    seed = seed_of(*key)
    assert seed == seed_of(*key)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_a_name_with_control_characters_cannot_pass_for_a_longer_key():
    assert seed_of("a\x1fstr:b") != seed_of("a", "b")
    assert seed_of("1\x1fint:2") != seed_of("1", 2)


def test_seeds_do_not_change_between_versions():
    # Runs on disk are resumed by these numbers.
    assert seed_of(0, "shuffle", 1, "client-0") == 4339660686870736112


def test_the_same_key_gives_the_same_stream_whoever_asked_before():
    first = torch.randn(5, generator=generator(3, "mask", 1))
    torch.manual_seed(99)
    torch.randn(7, generator=generator(3, "mask", 2))
    assert torch.equal(torch.randn(5, generator=generator(3, "mask", 1)), first)
    assert not torch.equal(torch.randn(5, generator=generator(3, "mask", "1")), first)


def test_a_generator_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.rand(9, generator=generator("x"))
    assert torch.equal(torch.rand(3), expected)
