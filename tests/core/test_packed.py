"""An adapter as one flat tensor: nothing is lost on the way, and what does not fit is refused by name."""

from dataclasses import replace

import pytest
import torch
from core_helpers import SHAPES, assert_same, make_adapter, moved, quick, ranks, refused, seeds
from hypothesis import given
from hypothesis import strategies as st

from fedrot.core.adapter import Adapter, part_of
from fedrot.core.errors import AdapterError
from fedrot.core.methods.base import ALL_PARTS
from fedrot.core.packed import Layout

PARTS = [frozenset(p) for p in (set(), {"a"}, {"b"}, {"head"}, {"a", "head"}, {"b", "head"}, {"a", "b"}, ALL_PARTS)]
some_parts = st.sampled_from(PARTS)
FORM = make_adapter(0)
LAYOUT = Layout.of(FORM, ALL_PARTS)


@quick
@given(seeds, ranks, some_parts)
def test_what_is_packed_comes_back_bit_for_bit_and_the_rest_is_the_form_s(seed, rank, parts):
    form = make_adapter(seed, rank)
    sent = moved(form, seed + 1, 1e3)
    layout = Layout.of(form, parts)
    back = dict(layout.unpack(layout.pack(sent), form).tensors())
    mine, theirs = dict(sent.tensors()), dict(form.tensors())
    for name, tensor in back.items():
        assert torch.equal(
            tensor.view(torch.int32), (mine if part_of(name) in parts else theirs)[name].view(torch.int32)
        )
        assert (tensor is theirs[name]) == (part_of(name) not in parts)


def test_no_number_of_float32_is_changed():
    """Zeros of both signs, the smallest and the largest numbers and infinity."""
    hard = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4028235e38, float("inf"), -float("inf"), 1 + 2**-23])
    form = Adapter({}, {"x": torch.zeros(9)})
    layout = Layout.of(form, {"head"})
    back = layout.unpack(layout.pack(Adapter({}, {"x": hard})), form).head["x"]
    assert torch.equal(back.view(torch.int32), hard.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_was(dtype):
    form = make_adapter(0, dtype=dtype)
    layout = Layout.of(form, ALL_PARTS)
    flat = layout.pack(moved(form, 1))
    assert flat.dtype == torch.float32
    assert_same(layout.unpack(flat, form), moved(form, 1))
    assert layout.schema != LAYOUT.schema


def test_float64_is_refused_where_it_would_travel():
    form = replace(make_adapter(0, dtype=torch.float64), head=FORM.head)
    with refused("layers/enc.0.out/a is torch.float64", "float32", error=AdapterError):
        Layout.of(form, {"a"})
    assert Layout.of(form, {"head"}).size == 3 + 24


def test_the_order_is_that_of_the_tensors_and_the_offsets_say_where():
    assert LAYOUT.names == tuple(name for name, _ in FORM.tensors())
    flat = LAYOUT.pack(FORM)
    assert torch.equal(flat, torch.cat([tensor.flatten() for _, tensor in FORM.tensors()]))
    for name, (start, end) in zip(LAYOUT.names, zip(LAYOUT.offsets, LAYOUT.offsets[1:], strict=False), strict=True):
        assert torch.equal(flat[start:end], dict(FORM.tensors())[name].flatten())
    assert LAYOUT.offsets[-1] == LAYOUT.size == len(flat)


def test_layers_in_another_order_are_packed_alike():
    turned = Adapter(dict(reversed(FORM.layers.items())), dict(reversed(FORM.head.items())))
    assert Layout.of(turned, ALL_PARTS) == LAYOUT
    assert torch.equal(LAYOUT.pack(turned), LAYOUT.pack(FORM))


def test_what_was_unpacked_has_memory_of_its_own():
    flat = LAYOUT.pack(FORM)
    back = LAYOUT.unpack(flat, FORM)
    flat.zero_()
    assert_same(back, FORM)


def with_pair(**changes: object) -> Adapter:
    return replace(FORM, layers={**FORM.layers, "enc.0.out": replace(FORM.layers["enc.0.out"], **changes)})


OTHERS = {
    "scale": with_pair(scale=1.0),
    "orientation": with_pair(fan_in_fan_out=True),
    "shape": make_adapter(0, rank=2),
    "dtype": FORM.map(lambda t: t.half()),
    "a layer less": make_adapter(0, shapes={n: s for n, s in SHAPES.items() if n != "enc.1.query"}),
    "a layer more": make_adapter(0, shapes={**SHAPES, "enc.2.out": (3, 3)}),
    "another name": make_adapter(0, shapes={n.replace("query", "key"): s for n, s in SHAPES.items()}),
    "no head": make_adapter(0, head=False),
    "turned shapes": replace(FORM, head={name: t.reshape(t.shape[::-1]) for name, t in FORM.head.items()}),
}
SAYS = {
    "scale": "scales",
    "orientation": "fan_in_fan_out",
    "shape": "layers/enc.0.out/a has shape (2, 7), the layout has (3, 7)",
    "dtype": "dtypes",
    "a layer less": "layers/enc.1.query/a is missing",
    "a layer more": "layers/enc.2.out/a is not in the layout",
    "another name": "layers/enc.0.query/a is missing",
    "no head": "head/classifier.bias is missing",
    "turned shapes": "head/classifier.weight has shape (8, 3), the layout has (3, 8)",
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_form_has_another_schema_and_the_difference_is_said(case):
    other = OTHERS[case]
    assert Layout.of(other, ALL_PARTS).schema != LAYOUT.schema
    for act in (lambda: LAYOUT.pack(other), lambda: LAYOUT.unpack(torch.zeros(LAYOUT.size), other)):
        with refused(SAYS[case], error=AdapterError):
            act()


def test_a_scale_that_differs_by_rounding_is_the_same():
    assert Layout.of(with_pair(scale=2.0 * (1 + 1e-14)), ALL_PARTS).schema == LAYOUT.schema


def test_values_say_nothing_about_the_layout_and_parts_do():
    assert Layout.of(moved(FORM, 1), ALL_PARTS) == LAYOUT
    assert len({Layout.of(FORM, parts).schema for parts in PARTS}) == len(PARTS)


def test_the_other_side_s_schema_must_be_the_same():
    LAYOUT.agree(Layout.of(moved(FORM, 1), ALL_PARTS).schema)
    for schema in (Layout.of(FORM, {"a"}).schema, "", "x" * 10**6):
        with refused("the other side", LAYOUT.schema, "same recipe", error=AdapterError):
            LAYOUT.agree(schema)


@pytest.mark.parametrize(
    "flat",
    [
        torch.zeros(LAYOUT.size + 1),
        torch.zeros(LAYOUT.size - 1),
        torch.zeros(0),
        torch.zeros(1, LAYOUT.size),
        torch.zeros(()),
        torch.zeros(LAYOUT.size, dtype=torch.float64),
        torch.zeros(LAYOUT.size, dtype=torch.bfloat16),
        torch.zeros(LAYOUT.size, dtype=torch.int32),
        torch.zeros(1).expand(10**15),  # as large as it says only if somebody copies it
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_another_size_or_dtype_is_refused(flat):
    with refused("packed adapter", f"{LAYOUT.size} numbers of torch.float32", error=AdapterError):
        LAYOUT.unpack(flat, FORM)
