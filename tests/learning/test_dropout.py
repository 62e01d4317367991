"""Dropout whose masks have names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import quick, seeds

from fedrot.learning.dropout import KeyedDropout, dropped_share

KEY = (1, 2, "client", "dropout", 0)


def masked(p: float, layer: str, key: tuple[int | str, ...] | None, x: torch.Tensor) -> torch.Tensor:
    """`x` through a fresh dropout of this layer and key."""
    dropout = KeyedDropout(p, layer)
    dropout.key = key
    return dropout(x)


@quick
@given(seeds, st.floats(0.05, 0.95), st.sampled_from([(40, 30), (2, 5, 120), (1200,)]))
def test_entries_are_zero_or_scaled_by_what_is_kept(seed: int, p: float, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    out = masked(p, "layer", (seed, "step"), x)
    kept = out != 0
    assert out.shape == x.shape
    torch.testing.assert_close(out[kept], x[kept] / (1 - dropped_share(p)))
    assert abs(float(kept.float().mean()) - (1 - p)) < 0.1


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_kept_and_the_mean_are_those_of_p(p: float) -> None:
    out = masked(p, "layer", KEY, torch.ones(400, 500))
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.03)


def test_the_mask_is_named_by_key_and_layer() -> None:
    x = torch.ones(50, 50)
    first = masked(0.5, "layer", KEY, x)
    assert torch.equal(first, masked(0.5, "layer", KEY, x))
    assert not torch.equal(first, masked(0.5, "other layer", KEY, x))
    for other in [(2, *KEY[1:]), (*KEY[:2], "other", *KEY[3:]), (*KEY[:-1], 1)]:
        assert not torch.equal(first, masked(0.5, "layer", other, x))


def test_the_mask_does_not_depend_on_what_ran_before_and_leaves_the_global_generator_alone() -> None:
    x = torch.ones(50, 50)
    dropout = KeyedDropout(0.5, "layer")
    dropout.key = KEY
    torch.manual_seed(0)
    first = dropout(x)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, dropout(x))


def test_without_a_key_or_with_p_zero_nothing_changes() -> None:
    x = torch.rand(50, 50)
    assert torch.equal(masked(0.5, "layer", None, x), x)
    assert torch.equal(masked(0.0, "layer", KEY, x), x)
    assert torch.equal(masked(0.5, "layer", None, x), x)


def test_training_mode_alone_does_not_switch_it_on() -> None:
    x = torch.rand(50, 50)
    assert torch.equal(KeyedDropout(0.5, "layer").train()(x), x)


def test_the_gradient_goes_through_the_same_mask() -> None:
    x = torch.rand(30, 40, requires_grad=True)
    out = masked(0.25, "layer", KEY, x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out.detach() != 0) / 0.75)


def test_half_precision_stays_half_precision() -> None:
    x = torch.ones(50, 50)
    half = masked(0.5, "layer", KEY, x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.float(), masked(0.5, "layer", KEY, x))


def test_what_print_shows_names_share_and_layer() -> None:
    assert str(KeyedDropout(0.25, "enc.0")) == "KeyedDropout(p=0.25, layer='enc.0')"
