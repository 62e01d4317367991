"""What `fedrot.aggregate` refuses, each with one line that names it."""

import math

import pytest
import torch
from core_helpers import SHAPES, assert_same, make_adapter, refused

from fedrot import aggregate
from fedrot.core.errors import AdapterError, RecipeError
from fedrot.core.methods import methods

PAIR = [make_adapter(0), make_adapter(1)]


def test_no_adapters_are_refused():
    with refused("no adapters"):
        aggregate([])


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_weights_that_are_not_one_each_are_refused(weights):
    with refused("2 adapters", f"{len(weights)} weights"):
        aggregate(PAIR, weights)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e308])
@pytest.mark.parametrize("place", [0, 1])
def test_a_weight_that_is_not_positive_or_could_overflow_is_refused(weight, place):
    weights = [1.0, 1.0]
    weights[place] = weight
    with refused("weight", repr(weight)):
        aggregate(PAIR, weights)


@pytest.mark.parametrize("weight", [True, "much", None, [1.0], 10**400])
def test_a_weight_that_is_no_number_is_refused_by_its_index(weight):
    with refused("weights[1] must be a number", repr(weight)):
        aggregate(PAIR, [1.0, weight])


def test_a_weight_may_be_any_kind_of_number():
    assert_same(aggregate(PAIR, [torch.tensor(1), "3"]), aggregate(PAIR, [1.0, 3.0]))


def test_an_unknown_method_is_refused_with_the_choices():
    with refused("'median'", *methods(), error=RecipeError):
        aggregate(PAIR, method="median")


@pytest.mark.parametrize(("method", "key"), [("fedit", "strength"), ("fedrot", "lambda"), ("fedrot", "name")])
def test_an_unknown_setting_is_refused_by_its_name(method, key):
    with refused(repr(key), method, error=RecipeError):
        aggregate(PAIR, method=method, reference=make_adapter(2), **{key: 0.4})


def test_fedrot_without_a_reference_is_refused():
    with refused("fedrot", "reference", error=RecipeError):
        aggregate(PAIR, method="fedrot")


def test_alternating_is_refused_since_there_are_no_rounds():
    with refused("alternate", "A, B or joint", error=RecipeError):
        aggregate(PAIR, method="fedrot", reference=make_adapter(2), factor="alternate")


@pytest.mark.parametrize(("key", "value"), [("strength", 1.5), ("strength", math.nan), ("factor", "C")])
def test_a_setting_s_bad_value_is_refused_by_its_name(key, value):
    with refused(key, error=RecipeError):
        aggregate(PAIR, method="fedrot", reference=make_adapter(2), **{key: value})


@pytest.mark.parametrize(
    ("method", "key", "value", "kind"),
    [
        ("lora_fair", "mu", "x", "a number"),
        ("fedrot_svd", "kept_rank", 2.5, "a whole number or null"),
        ("fedrot_consensus", "steps", 1.5, "a whole number"),
        ("fedrot_consensus", "steps", True, "a whole number"),
        ("fedrot", "guard", "yes", "true or false"),
        ("fedrot", "strength", True, "a number or auto"),
        ("fedex", "dequantize", 1, "true or false"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_its_name(method, key, value, kind):
    with refused(f"method.{key} must be {kind}, got {value!r}", error=RecipeError):
        aggregate(PAIR, method=method, reference=make_adapter(2), **{key: value})


def test_a_whole_number_is_a_number_too():
    assert_same(aggregate(PAIR, method="lora_fair", mu=1), aggregate(PAIR, method="lora_fair", mu=1.0))


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_adapter(5, shapes={n: s for n, s in SHAPES.items() if n != "enc.0.out"}), ("'enc.0.out'", "missing")),
        (make_adapter(5, shapes={**SHAPES, "enc.9.out": (7, 16)}), ("'enc.9.out'", "not in")),
        (make_adapter(5, shapes={**SHAPES, "enc.0.out": (8, 16)}), ("layers/enc.0.out/a", "(1, 8)", "(1, 7)")),
        (make_adapter(5, shapes={**SHAPES, "enc.0.out": (7, 15)}), ("layers/enc.0.out/b", "(15, 1)", "(16, 1)")),
        (make_adapter(5, head=False), ("'classifier.bias'", "missing")),
    ],
)
def test_an_adapter_of_another_form_is_refused_by_its_index_and_what_differs(place, other, words):
    adapters = [*PAIR, make_adapter(3)]
    adapters[place] = other
    with refused(f"adapters[{place}]", *words):
        aggregate(adapters)


def test_a_layer_of_another_orientation_is_refused_by_its_index_and_name():
    # The factors would average, but the result could fit one of the two base models only.
    with refused("adapters[1]", "enc.0."):
        aggregate([PAIR[0], make_adapter(1, fan_in_fan_out=True)])


@pytest.mark.parametrize("strength", [0.4, 0.0])
@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (make_adapter(5, rank=2), ("enc.0.query", "rank 2", "has 3")),
        (make_adapter(5, rank=4), ("enc.0.query", "rank 4", "has 3")),
        (make_adapter(5, shapes={"enc.0.out": (7, 16)}), ("enc.0.query",)),
        (make_adapter(5, shapes={**SHAPES, "enc.0.out": (7, 15)}), ("enc.0.out",)),
    ],
)
def test_a_reference_of_another_form_is_refused_whatever_the_strength(reference, words, strength):
    with refused("reference", *words, error=AdapterError):
        aggregate(PAIR, method="fedrot", reference=reference, strength=strength)


def test_it_is_the_reference_that_is_said_to_lack_a_layer():
    with pytest.raises(AdapterError) as caught:
        aggregate(PAIR, method="fedrot", reference=make_adapter(5, shapes={"enc.0.out": (7, 16)}))
    assert "the reference has it" not in str(caught.value)
    with pytest.raises(AdapterError) as caught:
        aggregate(PAIR, method="fedrot", reference=make_adapter(5, shapes={**SHAPES, "enc.9.out": (7, 16)}))
    assert "not in the reference" not in str(caught.value)


def test_a_reference_without_a_head_will_do():
    with_head, without = (
        aggregate(PAIR, method="fedrot", reference=make_adapter(2, head=head)) for head in (True, False)
    )
    assert all(torch.equal(t, without.layers[n].a) for n, t in ((n, p.a) for n, p in with_head.layers.items()))
    assert with_head.head.keys() == without.head.keys() == PAIR[0].head.keys()
