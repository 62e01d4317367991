"""What sites say of their scores: nonsense is left out of the mean, and the log names the site and the reason."""

import logging
from dataclasses import replace

import pytest
from network_faults import OTHERS, Known, Spoil, says

from fedrot.core.errors import RunError
from fedrot.running.network.messages import Message


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda reply: None, "gave no answer"),
        (lambda reply: Message.refusal("too busy"), "too busy"),
        (says(round=0), "of round 0, not of round 2"),
        (says(metric="f1"), "its metric is 'f1', not accuracy"),
        (says(metric=None), "metric must be of type str"),
        (says(scores=[0.5]), "scores must be of type dict"),
        (says(scores={}), "its accuracy is None"),
        (says(scores={"accuracy": 0.5}), "its loss is None"),
        (says(scores={"accuracy": 1.5, "loss": 1}), "its accuracy is 1.5"),
        (says(scores={"accuracy": -0.1, "loss": 1}), "its accuracy is -0.1"),
        (says(scores={"accuracy": True, "loss": 1}), "its accuracy is True"),
        (says(scores={"accuracy": "high", "loss": 1}), "its accuracy is 'high'"),
        (says(scores={"accuracy": 0.5, "loss": 10**400}), "its loss is 1000"),
        (says(scores={"accuracy": 0.5, "loss": float("nan")}), "NaN is not a finite number"),
        (lambda reply: Message({**reply.header, "scores": {"accuracy": 0.5, "loss": float("nan")}}), "its loss is nan"),
    ],
)
def test_scores_that_cannot_be_are_left_out_and_said_to_be(
    spoil: Spoil, words: str, known: Known, caplog: pytest.LogCaptureFixture
) -> None:
    _, record = known.again(evaluate=spoil)
    assert record["clients"]["dropped"] == {}
    scores = record["evaluation"]
    assert list(scores["by_client"]) == OTHERS
    assert scores["examples"] == 40
    assert scores["accuracy"] == pytest.approx(sum(scores["by_client"].values()) / 2)
    (said,) = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    assert said.startswith("music is left out of the scores of validation: ")
    assert words in said
    assert said.isprintable()


def test_more_scores_than_can_be_averaged_are_no_matter(known: Known) -> None:
    plain, spoilt = (known.again(evaluate=spoil)[1]["evaluation"] for spoil in (lambda r: r, says(examples=10**9)))
    assert plain == spoilt


def test_scores_of_an_adapter_that_is_not_finite(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    known.post.faults = {}
    broadcast = known.tiny.state.broadcast
    nothing = replace(broadcast, adapter=broadcast.adapter.map(lambda tensor: tensor * float("nan")))
    with pytest.raises(RunError, match="no site gave scores of validation"):
        known.engine.evaluate(nothing, "validation")
    said = [line.getMessage() for line in caplog.records]
    assert len(said) == 3
    assert all("a number that is not finite (NaN or infinite)" in line for line in said)
