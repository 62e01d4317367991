"""What an upload must be before it may touch the state: one reason for every way to be bad."""

import math
from dataclasses import replace

import pytest
import torch
from core_helpers import SHAPES, make_adapter, moved, random_rotations, refused, upload
from torch import Tensor

from fedrot.core.adapter import Adapter, LoraPair
from fedrot.core.alignment import find_rotations, rotate
from fedrot.core.checks import RejectedUpload, check_upload
from fedrot.core.drift import client_drift
from fedrot.core.settings import CheckSettings

FORM = make_adapter(0)
GOOD = moved(FORM, 1)
OPEN = CheckSettings()


def with_tensor(name: str, tensor: Tensor) -> Adapter:
    """The good adapter with one tensor replaced."""
    return GOOD.with_tensors(dict(GOOD.tensors()) | {name: tensor})


def with_pair(name: str, pair: LoraPair | None) -> Adapter:
    layers = {n: p for n, p in GOOD.layers.items() if n != name}
    return replace(GOOD, layers=layers if pair is None else {**layers, name: pair})


def spoilt(name: str, value: float) -> Adapter:
    tensor = dict(GOOD.tensors())[name].clone()
    tensor.view(-1)[-1] = value
    return with_tensor(name, tensor)


def test_a_good_upload_passes_and_is_left_as_it_is():
    check_upload(upload(GOOD), FORM, OPEN)
    check_upload(upload(FORM), FORM, CheckSettings(max_norm=0.0))
    rotations = find_rotations(GOOD, FORM, "A", 1.0)
    check_upload(upload(rotate(GOOD, rotations), rotations), FORM, CheckSettings(max_norm=1e6))


def test_an_upload_that_went_far_is_not_dropped_for_saying_so():
    far = GOOD.map(lambda t: t * 1e15)
    drift = client_drift(far, FORM, {})
    assert max(found["move2"] for found in drift.values()) > 2**53
    check_upload(replace(upload(far), layers=drift), FORM, OPEN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_good_upload_of_another_precision_passes_where_the_broadcast_has_it_too(dtype):
    form = make_adapter(0, dtype=dtype)
    check_upload(upload(moved(form, 1)), form, OPEN)


def test_rotations_that_travelled_as_float32_pass():
    check_upload(upload(GOOD, {n: r.float() for n, r in random_rotations(0, GOOD).items()}), FORM, OPEN)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (with_pair("enc.0.out", None), ("layer 'enc.0.out'", "missing")),
        (with_pair("enc.9.out", LoraPair(torch.ones(3, 7), torch.ones(16, 3), 2.0)), ("'enc.9.out'", "not in")),
        (replace(GOOD, head={"classifier.bias": torch.ones(3)}), ("head tensor 'classifier.weight'", "missing")),
        (replace(GOOD, head={**GOOD.head, "extra": torch.ones(3)}), ("head tensor 'extra'", "not in")),
        (Adapter({}, GOOD.head), ("enc.0.out", "missing")),
    ],
)
def test_other_names_are_rejected_by_the_first_that_differs(adapter, words):
    with refused("upload", *words, error=RejectedUpload):
        check_upload(upload(adapter), FORM, OPEN)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        # (1, d) against (r, d) would broadcast, and every row of the global factor would be that one.
        (with_pair("enc.0.out", LoraPair(torch.ones(1, 7), torch.ones(16, 1), 2.0)), ("(1, 7)", "(3, 7)")),
        (with_pair("enc.0.out", LoraPair(torch.ones(3, 7), torch.ones(1, 3), 2.0)), ("(1, 3)", "(16, 3)")),
        (with_pair("enc.0.out", LoraPair(torch.ones(3, 1), torch.ones(16, 3), 2.0)), ("(3, 1)", "(3, 7)")),
        (with_tensor("head/classifier.weight", torch.ones(1, 8)), ("classifier.weight", "(1, 8)", "(3, 8)")),
        (with_tensor("head/classifier.bias", torch.ones(())), ("classifier.bias", "()", "(3,)")),
        (with_tensor("head/classifier.bias", torch.ones(1, 3)), ("classifier.bias", "(1, 3)", "(3,)")),
        (with_pair("enc.0.out", LoraPair(torch.ones(16, 7).T[:, :3].T, torch.ones(7, 3), 2.0)), ("(7, 3)", "(16, 3)")),
    ],
)
def test_other_shapes_are_rejected_and_never_broadcast(adapter, words):
    with refused("upload", *words, error=RejectedUpload):
        check_upload(upload(adapter), FORM, OPEN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_dtype_is_rejected_by_its_tensor(dtype):
    pair = GOOD.layers["enc.0.out"]
    factors = with_pair("enc.0.out", replace(pair, a=pair.a.to(dtype), b=pair.b.to(dtype)))
    with refused("upload", "layers/enc.0.out/a", str(dtype), "float32", error=RejectedUpload):
        check_upload(upload(factors), FORM, OPEN)
    head = with_tensor("head/classifier.weight", GOOD.head["classifier.weight"].to(dtype))
    with refused("upload", "head/classifier.weight", str(dtype), "float32", error=RejectedUpload):
        check_upload(upload(head), FORM, OPEN)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["layers/enc.0.out/a", "layers/enc.1.query/b", "head/classifier.bias"])
def test_one_value_that_is_not_finite_is_enough_to_be_rejected(name, value):
    with refused("upload", name, "not finite", error=RejectedUpload):
        check_upload(upload(spoilt(name, value)), FORM, CheckSettings(max_norm=1.0))


def test_a_layer_of_another_scale_is_rejected():
    with refused("upload", "enc.0.out", "scale 4.0", "2.0", error=RejectedUpload):
        check_upload(upload(with_pair("enc.0.out", replace(GOOD.layers["enc.0.out"], scale=4.0))), FORM, OPEN)


def test_a_layer_of_another_orientation_is_rejected():
    pair = replace(GOOD.layers["enc.0.out"], fan_in_fan_out=True)
    with refused("upload", "enc.0.out", error=RejectedUpload):
        check_upload(upload(with_pair("enc.0.out", pair)), FORM, OPEN)


def test_a_change_above_the_norm_bound_is_rejected_and_one_at_it_passes():
    named = dict(FORM.tensors())
    norm = math.sqrt(sum(float((t.double() - named[n].double()).square().sum()) for n, t in GOOD.tensors()))
    check_upload(upload(GOOD), FORM, CheckSettings(max_norm=norm * (1 + 1e-9)))
    with refused("upload", "max_norm", f"{norm:.3g}", error=RejectedUpload):
        check_upload(upload(GOOD), FORM, CheckSettings(max_norm=norm * (1 - 1e-6)))


def test_the_norm_bound_counts_the_head():
    far = with_tensor("head/classifier.bias", torch.full((3,), 1e15))
    with refused("max_norm", error=RejectedUpload):
        check_upload(upload(far), FORM, CheckSettings(max_norm=1e6))


@pytest.mark.parametrize("sign", [1, -1])
def test_values_whose_products_could_overflow_are_rejected_with_the_layer(sign):
    a = GOOD.layers["enc.0.out"].a.clone()
    a[0, 0] = sign * (2.0**53 - 2.0**30)
    check_upload(upload(with_tensor("layers/enc.0.out/a", a)), FORM, OPEN)
    a[0, 0] = sign * 2.0**53
    with refused("upload: layers/enc.0.out/a", "of size 9.01e+15", "overflow", error=RejectedUpload):
        check_upload(upload(with_tensor("layers/enc.0.out/a", a)), FORM, OPEN)


@pytest.mark.parametrize("which", ["held", "used"])
@pytest.mark.parametrize("count", [0, -1, 1.5, 5.0, "5", None, True, math.nan, math.inf])
def test_a_number_of_examples_that_is_no_positive_whole_number_is_rejected(which, count):
    with refused("upload", which, repr(count), error=RejectedUpload):
        check_upload(upload(GOOD, **{which: count}), FORM, OPEN)


@pytest.mark.parametrize(
    ("name", "rotation", "words"),
    [
        ("enc.0.out", torch.ones(3, 3), ("not orthogonal",)),
        ("enc.0.out", 1.01 * torch.eye(3), ("not orthogonal",)),
        ("enc.0.out", torch.zeros(3, 3), ("not orthogonal",)),
        ("enc.0.out", torch.full((3, 3), math.nan), ("not orthogonal",)),
        ("enc.0.out", torch.eye(2), ("shape (2, 2)", "rank 3")),
        ("enc.0.out", torch.eye(4), ("shape (4, 4)", "rank 3")),
        ("enc.0.out", torch.ones(3), ("shape (3,)", "rank 3")),
        ("enc.0.out", torch.eye(3)[None], ("shape (1, 3, 3)", "rank 3")),
        ("enc.9.out", torch.eye(3), ("rotations",)),
    ],
)
def test_a_rotation_that_is_none_is_rejected_by_its_layer(name, rotation, words):
    rotations = {**random_rotations(0, GOOD), name: rotation}
    words = words if name not in SHAPES else (name, *words)
    with refused("upload", *words, error=RejectedUpload):
        check_upload(upload(GOOD, rotations), FORM, OPEN)


def test_rotations_of_some_layers_only_are_rejected():
    with refused("upload", "rotations", error=RejectedUpload):
        check_upload(upload(GOOD, {"enc.0.out": torch.eye(3)}), FORM, OPEN)


def test_a_control_variate_is_asked_for_or_not_and_nothing_else_will_do():
    variate = moved(FORM, 2)
    check_upload(upload(GOOD, variate=variate), FORM, OPEN, variate=True)
    check_upload(upload(GOOD), FORM, OPEN, variate=False)
    with refused("upload", "no control variate", "local.scaffold", error=RejectedUpload):
        check_upload(upload(GOOD), FORM, OPEN, variate=True)
    with refused("upload", "a control variate", "local.scaffold", error=RejectedUpload):
        check_upload(upload(GOOD, variate=variate), FORM, OPEN)


@pytest.mark.parametrize(
    ("variate", "words"),
    [
        (with_pair("enc.0.out", None), ("'enc.0.out'", "missing")),
        (with_tensor("head/classifier.bias", torch.ones(1, 3)), ("classifier.bias", "(1, 3)", "(3,)")),
        (GOOD.map(Tensor.double), ("float64", "float32")),
        (spoilt("layers/enc.1.query/b", math.nan), ("layers/enc.1.query/b", "not finite")),
        (spoilt("head/classifier.bias", math.inf), ("head/classifier.bias", "not finite")),
        (make_adapter(0, scale=4.0), ("scale 4.0", "2.0")),
    ],
)
def test_a_control_variate_has_the_broadcast_s_form_and_finite_values(variate, words):
    with refused("control variate", *words, error=RejectedUpload):
        check_upload(upload(GOOD, variate=variate), FORM, OPEN, variate=True)


def test_the_norm_bound_is_on_the_factors_and_not_on_the_variate():
    check_upload(upload(FORM, variate=GOOD), FORM, CheckSettings(max_norm=0.0), variate=True)


MEASURED = {"drift_a": 1.0, "drift_b": 0.5, "move2": 1.25, "gauge2": 0.1, "angle": 0.0, "turn": 0.0}
USUAL = {"loss": 0.5, "steps": 2, "tokens": 40}
NO_NUMBERS = [math.nan, math.inf, "0.5", None, True, [1.0]]


def test_reports_of_every_layer_and_phase_pass():
    layers = client_drift(GOOD, FORM, random_rotations(0, GOOD))
    check_upload(upload(GOOD, layers=layers, seconds={"train": 0.0, "align": 1}), FORM, OPEN)


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("key", list(USUAL))
def test_a_metric_that_is_no_finite_number_is_rejected_by_its_name(key, value):
    with refused("upload", key, error=RejectedUpload):
        check_upload(upload(GOOD, metrics={**USUAL, key: value}), FORM, OPEN)


@pytest.mark.parametrize("key", list(USUAL))
def test_a_metric_that_is_missing_is_rejected_by_its_name(key):
    with refused("upload", key, error=RejectedUpload):
        check_upload(upload(GOOD, metrics={k: v for k, v in USUAL.items() if k != key}), FORM, OPEN)


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("key", list(MEASURED))
def test_a_drift_that_is_no_finite_number_is_rejected_by_its_layer_and_name(key, value):
    layers = dict.fromkeys(SHAPES, MEASURED) | {"enc.0.out": {**MEASURED, key: value}}
    with refused("upload", "enc.0.out", key, error=RejectedUpload):
        check_upload(upload(GOOD, layers=layers), FORM, OPEN)


@pytest.mark.parametrize("names", [["enc.0.out"], [*SHAPES, "enc.9.out"]])
def test_a_drift_of_other_layers_is_rejected(names):
    with refused("upload", "drift", error=RejectedUpload):
        check_upload(upload(GOOD, layers=dict.fromkeys(names, MEASURED)), FORM, OPEN)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "3", None])
def test_seconds_that_are_no_number_or_negative_are_rejected_by_their_phase(value):
    with refused("upload", "train", error=RejectedUpload):
        check_upload(upload(GOOD, seconds={"train": value}), FORM, OPEN)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"held": 10**400}, "held"),
        ({"used": 10**400}, "used"),
        ({"metrics": {**USUAL, "tokens": 10**400}}, "tokens"),
        ({"layers": {name: {**MEASURED, "angle": 10**400} for name in SHAPES}}, "angle"),
        ({"seconds": {"train": 10**400}}, "train"),
    ],
    ids=["held", "used", "metrics", "layers", "seconds"],
)
def test_a_whole_number_beyond_every_float_is_rejected_and_does_not_overflow_later(fields, word):
    with refused("upload", word, error=RejectedUpload):
        check_upload(upload(GOOD, **fields), FORM, OPEN)
