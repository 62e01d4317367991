"""Compressed uploads in whole rounds: bytes, what clients keep, what the server sees, resuming, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, Silent, first_adapter, go, outcome
from tiny_runs import Tiny, assert_equal, begin, cut_and_resumed, flat
from torch import Tensor

from fedrot.core.adapter import part_of
from fedrot.core.alignment import rotate_back
from fedrot.core.compression import decompress, payload_bytes
from fedrot.core.errors import RecipeError
from fedrot.core.methods import get_method, methods
from fedrot.core.methods.base import ALL_PARTS, Upload
from fedrot.core.packed import Layout
from fedrot.running.client import LOST, travelling_parts
from fedrot.running.engine import Failure
from fedrot.running.recipe_file import parse_recipe
from fedrot.running.rounds import play_round

CODECS = ("bf16", "int8")
lossy = pytest.mark.parametrize("codec", CODECS)
CLIENTS = ["books", "films", "music"]
NEW_FRAMES = ["flexlora", "flora"]
UNABLE = ["fedask", "centralised"]
ABLE = [name for name in methods() if name not in UNABLE]


def by(codec: str, *flags: str, feedback: bool = True) -> tuple[str, ...]:
    return ("--federation.compression", codec, "--federation.feedback", str(feedback).lower(), *flags)


def lost(tiny: Tiny, client: str) -> dict[str, Tensor]:
    """What the client keeps of what compression lost, by flat name."""
    state = tiny.engine.states().get(client, {})
    return {name.removeprefix(LOST): t for name, t in state.items() if name.startswith(LOST)}


def size(parts: dict[str, Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in parts.values())) ** 0.5


@pytest.mark.parametrize("name", ABLE)
def test_bytes_are_those_of_the_payloads(name: str, tiny_values: dict[str, Any]) -> None:
    """Half and a quarter, and the scales: one float32 for each row of A, column of B and row of the head."""
    up: dict[str, list[int]] = {}
    for codec in ("none", *CODECS):
        tiny = begin(tiny_values, *by(codec, "--method.name", name, feedback=name not in NEW_FRAMES)).play(2)
        up[codec] = [record["bytes"]["up"] for record in tiny.records]
        assert all(record["clients"]["used"] == CLIENTS for record in tiny.records)
    for number, plain in enumerate(up["none"]):
        parts, form = travelling_parts(tiny.recipe, number), tiny.adapter
        layout = Layout.of(form, parts)
        turned = [u for u in tiny.engine.uploads[3 * number : 3 * number + 3] if u.rotation]
        rotations = sum(4 * r.numel() for u in turned for r in u.rotation.values())
        sides = len(parts & {"a", "b"})
        scales = sum(sides * pair.rank for pair in form.layers.values())
        scales += sum(len(t) if t.ndim > 1 else 1 for t in form.head.values()) if "head" in parts else 0
        assert plain - rotations == 3 * 4 * layout.size
        assert up["bf16"][number] - rotations == 3 * 2 * layout.size
        assert up["int8"][number] - rotations == 3 * (layout.size + 4 * scales)


@lossy
def test_the_server_gets_what_the_payload_says_and_no_more(codec: str, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *by(codec)).play(2)
    plain = parse_recipe(tiny_values, by("none"))
    broadcast, layout = tiny.adapter, Layout.of(tiny.adapter, ALL_PARTS)
    for client in CLIENTS:
        made, exact = tiny.client(client), tiny.client(client, plain)
        assert made.payload is not None
        assert made.payload.numel() == payload_bytes(layout, tiny.recipe.federation.compression)
        assert_equal(
            decompress(made.payload, broadcast, layout, tiny.recipe.federation.compression), made.upload.adapter
        )
        assert exact.payload is None
        assert not any(name.startswith(LOST) for name in exact.kept)
        # What did not arrive is kept, with what was kept before.
        arrived, wanted, before = flat(made.upload.adapter), flat(exact.upload.adapter), lost(tiny, client)
        assert size(before) > 0
        for name, tensor in wanted.items():
            off = (arrived[name] + made.kept[LOST + name].double() - tensor - before[name].double()).abs().max()
            assert float(off) < 1e-6


@pytest.mark.parametrize(("codec", "most"), [("bf16", 0.004), ("int8", 0.01)])
def test_little_of_the_change_is_lost(codec: str, most: float, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *by(codec)).play()
    before = flat(begin(tiny_values).adapter)
    for upload in tiny.engine.uploads:
        change = {name: tensor - before[name] for name, tensor in flat(upload.adapter).items()}
        assert 0 < size(lost(tiny, upload.client)) < most * size(change)


def test_feedback_makes_up_for_what_was_lost(tiny_values: dict[str, Any]) -> None:
    """One client: the broadcast follows what it uploads. Over rounds the sum of all that is lost stays one round's."""
    flags = ("--method.name", "fedit", "--partition.kind", "iid", "--partition.clients", "1")
    for feedback in (True, False):
        tiny = begin(tiny_values, *by("int8", *flags, feedback=feedback))
        plain = parse_recipe(tiny_values, by("none", *flags))
        (client,) = tiny.engine.clients
        behind: dict[str, Tensor] = {}
        steps = []
        for _ in range(6):
            trained = flat(tiny.client(client, plain).upload.adapter)
            tiny.play()
            missing = {name: tensor - flat(tiny.adapter)[name] for name, tensor in trained.items()}
            behind = {name: behind[name] + t if behind else t for name, t in missing.items()}
            steps.append(size(missing))
        if feedback:
            for name, tensor in lost(tiny, client).items():
                torch.testing.assert_close(tensor.double(), behind[name], atol=2e-6, rtol=0)
            assert size(behind) < 1.5 * max(steps)
        else:
            assert not lost(tiny, client)
            assert size(behind) > 1.5 * max(steps)


CASES: dict[str, tuple[str, ...]] = {
    "int8": by("int8"),
    "bf16, b and a in turn": by("bf16", "--method.name", "rolora"),
    "int8, some": by("int8", "--federation.participation", "0.67"),
    "int8 without feedback": by("int8", feedback=False),
    "int8, own heads": by("int8", "--lora.head", "personal", "--method.name", "fedsa"),
    "int8, variates": by("int8", "--local.scaffold", "true"),
    "bf16, ranks": by("bf16", "--lora.ranks", '{"books": 1}'),
    "int8 into the base": by("int8", "--method.name", "fedex"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(case: str, tiny_values: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = cut_and_resumed(tiny_values, tmp_path, *CASES[case])
    assert [record["round"] for record in whole["metrics"]] == [0, 1, 2, 3]
    assert resumed == whole


def test_a_client_s_rounding_does_not_depend_on_who_else_takes_part(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *by("int8", "--compute.stack", "1"))
    found = []
    for clients in (CLIENTS, CLIENTS[::-1], CLIENTS[1:]):
        uploads = [one for one in tiny.engine.train(tiny.state.broadcast, clients) if isinstance(one, Upload)]
        found.append({upload.client: upload.adapter for upload in uploads})
    for other in found[1:]:
        for client, adapter in other.items():
            assert_equal(adapter, found[0][client])


@lossy
@pytest.mark.parametrize("name", ["fedit", "fedrot", "fedrot_svd", "rolora"])
def test_scores_are_near_those_without(codec: str, name: str, tiny_values: dict[str, Any]) -> None:
    flags = ("--method.name", name, "--rounds", "4", "--local.steps", "8")
    plain, other = (begin(tiny_values, *by(way), *flags).play(4).records for way in ("none", codec))
    assert other[-1]["evaluation"]["loss"] == pytest.approx(plain[-1]["evaluation"]["loss"], abs=0.01)
    assert other[-1]["evaluation"]["accuracy"] == pytest.approx(plain[-1]["evaluation"]["accuracy"], abs=0.051)
    assert plain[-1]["evaluation"]["loss"] < 0.97 * plain[0]["evaluation"]["loss"], "nothing was learnt"


@lossy
def test_diagnostics_still_say_what_turning_brought(codec: str, tiny_values: dict[str, Any]) -> None:
    """Of what arrived: it is turned back exactly, so before alignment too they are near those without compression."""
    tiny, plain = (begin(tiny_values, *by(way), "--local.lr", "0.05").play(2) for way in (codec, "none"))
    found, wanted = (one.records[0]["aggregation"] for one in (tiny, plain))
    for key in ("ideal", "before", "after", "floor", "sent"):
        assert found[key] == pytest.approx(wanted[key], rel=0.02), key
    second = tiny.records[1]["aggregation"]
    assert second["sent"] == pytest.approx(second["after"], rel=1e-5)
    assert second["before"] != second["after"]
    for upload in tiny.engine.uploads[3:]:
        assert upload.rotation
        back = rotate_back(upload.adapter, upload.rotation)
        for name, pair in upload.adapter.layers.items():
            torch.testing.assert_close(back.layers[name].delta(), pair.delta(), rtol=1e-5, atol=1e-6)


def fail(upload: Upload) -> Failure:
    return Failure(upload.client, "power cut")


def spoil(upload: Upload) -> Upload:
    return replace(upload, held=0)


@pytest.mark.parametrize("fault", [fail, spoil])
def test_a_client_that_was_dropped_keeps_what_it_had(fault: Any, tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *by("int8")).play()
    before = {client: lost(tiny, client) for client in CLIENTS}
    tiny.engine.faults["films"] = fault
    tiny.play()
    assert "films" in tiny.records[-1]["clients"]["dropped"]
    for client in CLIENTS:
        now = lost(tiny, client)
        assert now.keys() == before[client].keys() == dict(tiny.adapter.tensors()).keys()
        assert all(torch.equal(t, before[client][name]) for name, t in now.items()) == (client == "films")


def test_what_the_other_factor_lost_waits_for_its_turn(tiny_values: dict[str, Any]) -> None:
    tiny = begin(tiny_values, *by("int8", "--method.name", "rolora")).play()
    first = lost(tiny, "books")
    assert {part_of(name) for name in first} == {"b", "head"}
    second = lost(tiny.play(), "books")
    assert {part_of(name) for name in second} == ALL_PARTS
    third = lost(tiny.play(), "books")
    for name, tensor in first.items():
        if name.endswith("bias"):  # two opposite numbers: both are at the end of the scale, and nothing is lost
            continue
        assert torch.equal(second[name], tensor) == (part_of(name) == "b")
        assert not torch.equal(third[name], second[name])


def test_what_is_personal_is_neither_sent_nor_rounded(tiny_values: dict[str, Any]) -> None:
    flags = ("--method.name", "fedsa", "--lora.head", "personal")
    tiny, plain = (begin(tiny_values, *by(way), *flags).play() for way in ("int8", "none"))
    for client in CLIENTS:
        assert {part_of(name) for name in lost(tiny, client)} == {"a"}
        mine, exact = (one.engine.states()[client] for one in (tiny, plain))
        assert mine.keys() - exact.keys() == {LOST + name for name in lost(tiny, client)}
        assert all(torch.equal(mine[name], tensor) for name, tensor in exact.items())
    for upload in tiny.engine.uploads:
        sent, start = dict(upload.adapter.tensors()), dict(begin(tiny_values).adapter.tensors())
        assert all(torch.equal(sent[name], t) for name, t in start.items() if part_of(name) != "a")


def test_control_variates_travel_as_they_are(tiny_values: dict[str, Any]) -> None:
    flags = ("--local.scaffold", "true", "--method.name", "fedit")
    tiny, plain = (begin(tiny_values, *by(way), *flags).play() for way in ("int8", "none"))
    for mine, exact in zip(tiny.engine.uploads, plain.engine.uploads, strict=True):
        assert mine.variate is not None
        assert exact.variate is not None
        assert_equal(mine.variate, exact.variate)
    layout = Layout.of(tiny.adapter, ALL_PARTS)
    assert plain.records[0]["bytes"]["up"] == 3 * 8 * layout.size
    assert tiny.records[0]["bytes"]["up"] == 3 * (payload_bytes(layout, "int8") + 4 * layout.size)


def test_a_change_that_is_not_finite_costs_the_client_its_round(
    tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of finite factors: a method that turns them into others could do that."""
    tiny = begin(tiny_values, *by("int8")).play()
    fedrot = type(tiny.recipe.method)
    method = fedrot.client

    def client(self: Any, local: Any, broadcast: Any, seat: Any, rng: Any) -> Any:
        result = method(self, local, broadcast, seat, rng)
        if seat.name != "films":
            return result
        return replace(result, adapter=result.adapter.map(lambda t: t * float("nan")))

    monkeypatch.setattr(fedrot, "client", client)
    before = lost(tiny, "films")
    tiny.play()
    assert "not finite" in tiny.records[-1]["clients"]["dropped"]["films"]
    assert all(torch.equal(t, before[name]) for name, t in lost(tiny, "films").items())


def test_without_compression_a_run_is_what_it_was(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    go(tiny_values, tmp_path / "one")
    go(tiny_values, tmp_path / "other", *by("none", feedback=False))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "other")


def test_a_round_of_prepared_uploads_counts_the_same_bytes(tiny_values: dict[str, Any]) -> None:
    """What travels is a matter of the recipe and the form, whatever an upload says."""
    recipe = parse_recipe(tiny_values, by("bf16", "--method.name", "fedit"))
    engine = FakeEngine(recipe.method, {"a": 5, "b": 6})
    _, record = play_round(recipe, engine, recipe.method.start(first_adapter()), Silent())
    assert record["bytes"]["up"] == first_adapter().bytes()  # two clients, half each


@lossy
@pytest.mark.parametrize("name", UNABLE)
def test_methods_that_send_no_change_are_refused(codec: str, name: str, tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tiny_values, by(codec, "--method.name", name, feedback=False))
    message = str(caught.value)
    assert message.startswith(f"recipe: federation.compression: method {name} does not upload a change")
    assert "fedrot" in message.partition("methods that work: ")[2]
    assert not any(other in message.partition("methods that work: ")[2].split(", ") for other in UNABLE)
    assert "\n" not in message


@lossy
@pytest.mark.parametrize("name", NEW_FRAMES)
def test_feedback_is_refused_where_the_frame_is_another_one_each_round(
    codec: str, name: str, tiny_values: dict[str, Any]
) -> None:
    assert not get_method(name).capabilities.keeps_frame
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tiny_values, by(codec, "--method.name", name))
    message = str(caught.value)
    assert message.startswith(f"recipe: federation.feedback: method {name} broadcasts in a new frame")
    assert "set federation.feedback false" in message
    assert "\n" not in message
    recipe = parse_recipe(tiny_values, by(codec, "--method.name", name, feedback=False))
    assert recipe.federation.compression == codec
    assert parse_recipe(tiny_values, by("none", "--method.name", name)).federation.feedback


def test_an_unknown_codec_is_refused(tiny_values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"federation\.compression must be bf16, int8 or none, got 'int4'"):
        parse_recipe(tiny_values, by("int4"))
