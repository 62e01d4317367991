"""Made-up examples have the form of their task, are the same each time, and say that they are made up."""

import pytest

from fedrot.learning.data import Dataset
from fedrot.learning.settings import DataSettings
from fedrot.learning.sources.glue import TASKS
from fedrot.learning.sources.read import read_dataset
from fedrot.learning.tasks.answers import answer_of


def made(name: str | None, **more: object) -> Dataset:
    source = {"source": "glue", "name": name} if name else {"source": "gsm8k"}
    return read_dataset(DataSettings(**{**source, "generated": 400, **more}), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_glue_tasks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = made(name)
    assert found.labels == TASKS[name].labels
    assert {"train", "validation", "test"} <= set(found.splits)
    assert ("test_mismatched" in found.splits) == (name == "mnli")
    for rows in found.splits.values():
        assert set(rows.label) == set(range(len(found.labels)))
        assert (rows.pair is not None) == bool(TASKS[name].pair)
    assert "made-up" in caplog.text
    assert name in caplog.text
    assert made(name) == found
    assert not set(found.splits["train"].text) & set(found.splits["validation"].text)


def test_sums_have_the_answer_that_they_state() -> None:
    for turns in made(None).splits["train"].turns or ():
        (_, question), (_, response) = turns
        numbers = [int(word) for word in question.split() if word.isdecimal()]
        assert answer_of(response, "number") == str(sum(numbers))


def test_a_path_is_read_in_their_place(tmp_path: object) -> None:
    from fedrot.core.errors import DataError

    with pytest.raises(DataError, match="no such folder"):
        made("rte", path=f"{tmp_path}/nowhere")
