"""The adapter in memory: what it refuses, its orientation, its flat names and its stacks."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from core_helpers import HEAD, SHAPES, assert_same, distance, make_adapter, refused
from torch import nn

from fedrot.core import adapter as adapter_module
from fedrot.core.adapter import Adapter, LoraPair, part_of, same_form, stacks
from fedrot.core.errors import AdapterError
from fedrot.core.packed import Layout


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(3), torch.ones(5, 3), ("matrices", "(3,)", "(5, 3)")),
        (torch.ones(3, 4), torch.ones(5, 3, 1, 1), ("matrices", "(3, 4)", "(5, 3, 1, 1)")),
        (torch.ones(3, 4), torch.ones(5, 2), ("rank", "(3, 4)", "(5, 2)")),
        (torch.ones(1, 4), torch.ones(5, 3), ("rank", "(1, 4)", "(5, 3)")),  # would broadcast if it were let through
        (torch.ones(0, 4), torch.ones(5, 0), ("empty", "(0, 4)")),
        (torch.ones(3, 0), torch.ones(5, 3), ("empty", "(3, 0)")),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(5, 3), ("floating point", "int64")),
        (torch.ones(3, 4), torch.ones(5, 3, dtype=torch.bool), ("floating point", "bool")),
        (torch.ones(3, 4), torch.ones(5, 3, dtype=torch.float16), ("float32", "float16")),
    ],
)
def test_factors_that_are_no_pair_are_refused_with_their_shapes_or_dtypes(a, b, words):
    with refused(*words, error=AdapterError):
        LoraPair(a, b, scale=1.0)


def test_rank_and_shapes_need_not_be_square_and_a_pair_cannot_be_changed():
    pair = LoraPair(torch.ones(3, 4), torch.ones(5, 3), 1.0)
    assert pair.rank == 3
    with pytest.raises(FrozenInstanceError):
        pair.scale = 2.0


@pytest.mark.parametrize("rank", range(1, 7))
@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_merging_the_dense_update_gives_a_linear_layer_s_adapted_output(rank, scale):
    pair = make_adapter(rank, rank, scale).layers["enc.0.query"]
    base, x = nn.Linear(12, 9, bias=False), torch.randn(5, 12)
    with torch.no_grad():
        expected = base(x) + scale * (x @ pair.a.T) @ pair.b.T
        base.weight += pair.delta()
        torch.testing.assert_close(base(x), expected, atol=1e-4, rtol=1e-4)


def test_merging_the_dense_update_gives_a_transposed_layer_s_adapted_output():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    pair = make_adapter(0, 4, 1.5, fan_in_fan_out=True).layers["enc.0.query"]
    base, x = conv1d(9, 12), torch.randn(5, 12)
    with torch.no_grad():
        expected = base(x) + 1.5 * (x @ pair.a.T) @ pair.b.T
        base.weight += pair.delta()
        torch.testing.assert_close(base(x), expected, atol=1e-4, rtol=1e-4)


def test_flat_names_are_sorted_complete_and_tell_their_part():
    adapter = make_adapter(0)
    shuffled = Adapter(dict(reversed(adapter.layers.items())), dict(reversed(adapter.head.items())))
    names = [name for name, _ in adapter.tensors()]
    assert names == [name for name, _ in shuffled.tensors()]
    factors = [f"layers/{n}/{side}" for n in sorted(SHAPES) for side in "ab"]
    assert names == factors + [f"head/{n}" for n in sorted(HEAD)]
    assert [part_of(n) for n in names] == ["a", "b"] * len(SHAPES) + ["head"] * len(HEAD)


def test_filling_a_form_with_its_own_tensors_gives_it_back():
    adapter = replace(make_adapter(0, fan_in_fan_out=True, scale=0.25), config={"r": 3})
    again = make_adapter(1, fan_in_fan_out=True, scale=0.25).with_tensors(dict(adapter.tensors()))
    assert_same(again, adapter)
    assert all(p.fan_in_fan_out and p.scale == 0.25 for p in again.layers.values())


@pytest.mark.parametrize("name", ["layers/enc.0.out/b", "head/classifier.bias"])
def test_filling_a_form_with_a_tensor_missing_raises_its_name(name):
    tensors = dict(make_adapter(0).tensors())
    del tensors[name]
    with pytest.raises(KeyError, match=name):
        make_adapter(0).with_tensors(tensors)


def test_map_reaches_every_tensor_and_keeps_what_is_no_tensor():
    adapter = replace(make_adapter(0, fan_in_fan_out=True), config={"r": 3})
    doubled = adapter.map(lambda t: 2 * t)
    originals = dict(adapter.tensors())
    assert all(torch.equal(t, 2 * originals[n]) for n, t in doubled.tensors())
    assert doubled.config == {"r": 3}
    assert all(p.fan_in_fan_out and p.scale == 2.0 for p in doubled.layers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_count_each_part_as_it_travels(dtype):
    """Half precision is widened on the wire."""
    adapter = make_adapter(0, rank=3, dtype=dtype)
    numbers = {
        "a": 3 * sum(d_in for d_in, _ in SHAPES.values()),
        "b": 3 * sum(d_out for _, d_out in SHAPES.values()),
        "head": 3 + 3 * 8,
    }
    for part, count in numbers.items():
        assert adapter.bytes(frozenset({part})) == 4 * count == Layout.of(adapter, {part}).size * 4
    assert adapter.bytes() == 4 * sum(numbers.values())
    assert adapter.bytes(frozenset()) == 0


@pytest.mark.parametrize("limit", [1 << 25, 200, 1])
def test_stacks_hold_every_layer_once_whatever_the_memory_limit(monkeypatch, limit):
    monkeypatch.setattr(adapter_module, "_STACK_ELEMENTS", limit)
    adapters = [make_adapter(0, scale=2.0), make_adapter(1, scale=0.5), make_adapter(2)]
    seen = []
    for stack in stacks(adapters, torch.float64):
        for i, adapter in enumerate(adapters):
            for j, name in enumerate(stack.names):
                pair = adapter.layers[name]
                assert torch.equal(stack.a[i, j], pair.a.double())
                assert torch.equal(stack.b[i, j], pair.b.double())
                assert float(stack.scale[i, j]) == pair.scale
        seen += stack.names
    assert sorted(seen) == sorted(SHAPES)


def test_layers_of_one_shape_share_a_stack():
    assert [set(s.names) for s in stacks([make_adapter(0)], torch.float32)] == [
        {"enc.0.query", "enc.0.value"},
        {"enc.0.out"},
        {"enc.1.query"},
    ]


def without(adapter: Adapter, layer: str = "", head: str = "") -> Adapter:
    return replace(
        adapter,
        layers={n: p for n, p in adapter.layers.items() if n != layer},
        head={n: t for n, t in adapter.head.items() if n != head},
    )


def test_two_adapters_of_one_form_pass_whatever_their_values_and_dtypes():
    same_form(make_adapter(0), make_adapter(1, dtype=torch.float16, scale=4.0))


@pytest.mark.parametrize(
    ("adapter", "reference", "words"),
    [
        (without(make_adapter(0), layer="enc.0.out"), make_adapter(1), ("layer 'enc.0.out'", "missing")),
        (make_adapter(0), without(make_adapter(1), layer="enc.0.out"), ("layer 'enc.0.out'", "not in the reference")),
        (without(make_adapter(0), head="classifier.bias"), make_adapter(1), ("tensor 'classifier.bias'", "missing")),
        (make_adapter(0), make_adapter(1, head=False), ("head tensor 'classifier.bias'", "not in the reference")),
        (make_adapter(0, rank=1), make_adapter(1, rank=3), ("layers/enc.0.out/a", "(1, 7)", "(3, 7)")),
        (
            replace(make_adapter(0), head={"classifier.bias": torch.ones(3), "classifier.weight": torch.ones(1, 8)}),
            make_adapter(1),
            ("head/classifier.weight", "(1, 8)", "(3, 8)"),
        ),
    ],
)
def test_another_form_is_refused_by_the_name_of_what_differs(adapter, reference, words):
    with refused("upload of north", *words, error=AdapterError):
        same_form(adapter, reference, who="upload of north")


def test_the_dense_update_of_a_transposed_layer_is_the_transpose():
    plain = make_adapter(0).layers["enc.0.out"]
    assert plain.delta().shape == (16, 7)
    assert distance(replace(plain, fan_in_fan_out=True).delta(), plain.delta().T) == 0.0
