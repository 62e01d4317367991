"""What arrives spoiled, late, twice or never: it is dropped with the reason, and the state is as without it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import Silent
from network_faults import OTHERS, Known, Spoil, header, lacks, number, of_a_layer, payload, says, within
from network_sites import ONE_BY_ONE, LocalPost, deployed, divide_files
from tiny_runs import assert_equal, begin

from fedrot.core.errors import RunError
from fedrot.running.network.messages import Message
from fedrot.running.rounds import play_round


def test_without_a_fault_all_uploads_are_used(known: Known) -> None:
    state, record = known.again()
    assert record["clients"] == {"drawn": 3, "used": [*OTHERS, "music"], "dropped": {}}
    moved = dict(state.broadcast.adapter.tensors())
    assert not all(torch.equal(moved[name], t) for name, t in known.without.broadcast.adapter.tensors())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        # The header as a whole.
        (header(b"{"), "header is not JSON"),
        (header(b"\xff\xfe\xfa"), "header is not JSON"),
        (header(b""), "header is not JSON"),
        (header(b"[]"), "not an object"),
        (header(b'"train"'), "not an object"),
        (header(b"NaN"), "NaN is not a finite number"),
        (header(b'{"a": -Infinity}'), "-Infinity is not a finite number"),
        (header(b'{"a": 1e999}'), "1e999 is not a finite number"),
        (header(b'{"a": ' + b"9" * 9999 + b"}"), "header is not JSON"),
        (header(b'{"a": ' + b"[" * 200_000), "header is not JSON"),
        (header(b'{"a": "' + b"a" * (10 << 20) + b'"}'), "more than the"),
        (header(b"{}"), "round must be of type int, got None"),
        (says(extra=1), "holds 'extra'"),
        (says(**{"\n\x1b[31m": 1}), "holds '\\n\\x1b[31m'"),
        # Its values.
        (says(schema="0" * 32), "packs adapters of schema '0000"),
        (says(schema=5), "schema must be of type str"),
        (lacks("schema"), "schema must be of type str, got None"),
        (says(round=0), "of round 0, not of round 1"),
        (says(round=True), "round must be of type int"),
        (says(round=-1), "round must be a whole number"),
        (says(held=True), "held must be of type int"),
        (says(held=-60), "held must be a whole number"),
        (says(held=60.0), "held must be of type int"),
        (says(held=2**60), "held must be a whole number"),
        (says(held=10**400), "held must be a whole number"),
        (says(held=61), "it says 61 examples are held, the site said 60 on joining"),
        (says(held=0), "it says 0 examples"),
        (says(used=0), "examples used must be a positive whole number, got 0"),
        (says(used=25), "it says 25 rows were used, 60 examples give 24 at most"),
        (says(used="24"), "used must be of type int"),
        (says(used=None), "used must be of type int"),
        (says(turned=1), "turned must be of type bool"),
        (says(turned=False), "are expected"),
        (says(variate=True), "at least"),
        (says(variate="no"), "variate must be of type bool"),
        (says(metrics=[1, 2, 3]), "metrics must be of type dict"),
        (within("metrics", lambda m: {**m, "loss": "low"}), "loss must be a number, got 'low'"),
        (within("metrics", lambda m: {**m, "loss": None}), "loss must be a number"),
        (within("metrics", lambda m: {**m, "steps": True}), "steps must be a number"),
        (within("metrics", lambda m: {**m, "tokens": 10**400}), "tokens must be a number"),
        (within("metrics", lambda m: {**m, "tokens": [[[{}]]]}), "tokens must be a number"),
        (within("metrics", lambda m: {**m, "more": 1}), "holds 'more'"),
        (within("metrics", lambda m: {"loss": m["loss"]}), "metrics: steps must be a finite number below 2^53"),
        (says(layers="none"), "layers must be of type dict"),
        (says(layers={"elsewhere": {}}), "holds 'elsewhere'"),
        (within("layers", lambda layers: dict.fromkeys(layers, "far")), "must be of type dict, got 'far'"),
        (within("layers", lambda layers: dict(list(layers.items())[1:])), "drift is not that of the adapter's layers"),
        (of_a_layer(lambda drift: {}), "must be a finite number below 2^159 in size, got None"),
        (of_a_layer(lambda drift: {**drift, "angle": {"a": [1]}}), "angle must be a number"),
        (of_a_layer(lambda drift: {**drift, "spin": 1.0}), "holds 'spin'"),
        (says(seconds=5), "seconds must be of type dict"),
        (says(seconds={"train": -1}), "seconds of train must be a number that is not negative"),
        (says(seconds={"train": "1"}), "train must be a number"),
        (says(seconds={"round": 1}), "holds 'round'"),
        # The tensors.
        (payload(lambda old: old[:-1]), "bytes, at least"),
        (payload(lambda old: old[:0]), "has 0 bytes, at least"),
        (payload(lambda old: old[4:]), "bytes, at least"),
        (payload(lambda old: torch.cat([old, old[:4]])), "are expected"),
        (payload(lambda old: torch.cat([old, old])), "are expected"),
        (number(0, float("nan")), "values that are not finite"),
        (number(7, float("-inf")), "values that are not finite"),
        (number(7, 1e9), "above checks.max_norm"),
        (number(7, 3e38), "products overflow"),
        (number(-1, float("nan")), "not orthogonal"),
        (number(-1, 2.0), "not orthogonal"),
        # No message at all.
        (lambda reply: None, "gave no answer"),
        (lambda reply: "the line broke", "the line broke"),
        (lambda reply: Message.refusal("I would rather not"), "I would rather not"),
        (lambda reply: Message.refusal("no\n\x1b[2J" * 99), "no [2Jno"),
        (lambda reply: Message({"refused": [[[[[[[[[]]]]]]]]]}), "[[[[["),
        (lambda reply: replace(reply, header={**reply.header, "refused": "no", "join": 1}), "no"),
    ],
)
def test_an_upload_that_is_spoiled_is_dropped(spoil: Spoil, words: str, known: Known) -> None:
    assert words in known.dropped(spoil)


def test_rotations_of_another_determinant(known: Known) -> None:
    """The last rotation with a row turned round: orthogonal, and a reflection."""

    def reflected(old: torch.Tensor) -> torch.Tensor:
        numbers = old.clone().view(torch.float32)
        numbers[-2:] *= -1
        return numbers.view(torch.uint8)

    assert "not orthogonal with determinant 1" in known.dropped(payload(reflected))


def test_huge_values_without_a_bound_do_not_end_the_run(known: Known) -> None:
    """They are finite, so they count: what a hostile client may do is checks.max_norm's and robust.rule's to say."""
    recipe = known.tiny.recipe
    known.post.faults = {("music", "train"): lambda request, reply: number(7, 1e15)(reply)}
    state, record = play_round(
        replace(recipe, checks=replace(recipe.checks, max_norm=None)), known.engine, known.tiny.state, Silent()
    )
    assert record["clients"]["dropped"] == {}
    assert state.broadcast.round == 2


def test_a_late_reply_of_an_earlier_round_is_not_taken_for_this_one_s(known: Known) -> None:
    (first,) = [
        reply
        for client, request, reply in known.post.carried
        if client == "music" and request.header["kind"] == "train" and request.header["round"] == 0
    ]
    assert known.dropped(lambda reply: first) == "upload: the message is of round 0, not of round 1"


def test_a_reply_to_another_request(known: Known) -> None:
    """The schema alone would not tell a score from an upload."""
    scores = known.post.carried[-1][2]
    assert "metric" in scores.header
    assert "which this version of fedrot does not know" in known.dropped(lambda reply: scores)


class Crowd(LocalPost):
    """Replies come twice, the second one spoiled, and some from clients that were not asked."""

    def ask(self, requests: Mapping[str, Message], seconds: float | None) -> Iterator[tuple[str, Message | str]]:
        for client, reply in super().ask(requests, seconds):
            assert isinstance(reply, Message)
            for other in ("stranger", *sorted(set(self.sites) - set(requests))):
                yield other, reply
            yield client, reply
            yield client, replace(reply, payload=reply.payload.flip(0))
            yield client, "gone"


def test_replies_that_come_twice_or_unasked_change_nothing(
    tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    flags = ("--federation.participation", "0.67")
    here = begin(tiny_values, *ONE_BY_ONE, *flags).play(2)
    crowd = Crowd(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")
    there = deployed(tiny_values, crowd, *flags).play(2)
    assert_equal(there.adapter, here.adapter)
    assert [r["clients"] for r in there.records] == [r["clients"] for r in here.records]


def test_too_few_usable_uploads_end_the_run_with_every_reason(known: Known) -> None:
    known.post.faults = {
        ("music", "train"): lambda request, reply: None,
        ("films", "train"): lambda request, reply: says(used=0)(reply),
    }
    with pytest.raises(RunError, match=r"round 1: 1 of 3 uploads were usable, the quorum is 2") as caught:
        play_round(known.tiny.recipe, known.engine, known.tiny.state, Silent())
    assert "films: upload: examples used" in str(caught.value)
    assert "music: gave no answer" in str(caught.value)
    # The run can be taken up where it was.
    assert "gave no answer" in known.dropped(lambda reply: None)


ANSWERS: Sequence[tuple[Spoil, str]] = [
    (lambda reply: None, "gave no answer"),
    (says(round=0), "answer: the message is of round 0, not of round 1"),
    (says(schema="0"), "answer: the other side packs adapters"),
    (payload(lambda old: old[:-4]), "answer: the message's payload has"),
    (payload(lambda old: torch.cat([old, old])), "answer: the message's payload has"),
    (number(3, float("nan")), "values that are not finite"),
]


def test_answers_of_a_second_phase_that_are_spoiled_are_dropped(
    tiny_values: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    post = LocalPost(divide_files(tiny_data, tmp_path / "sites"), tmp_path / "memory")
    tiny = deployed(tiny_values, post, "--method.name", "fedask").play()
    states = []
    for spoil, words in ANSWERS:
        post.faults["music", "answer"] = lambda request, reply, spoil=spoil: spoil(reply)
        state, record = play_round(tiny.recipe, tiny.engine, tiny.state, Silent())
        assert record["clients"]["used"] == OTHERS
        assert words in record["clients"]["dropped"]["music"]
        assert record["clients"]["dropped"]["music"].startswith("second phase: ")
        states.append(state)
    for state in states[1:]:
        assert_equal(state.broadcast.adapter, states[0].broadcast.adapter)
