"""Worked examples before a problem: what is asked, in which tokens, and where an answer then ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning_helpers import refused, resident
from model_folders import SIZES, write_model
from test_generation import CHAT

from fedrot.learning.data import ASSISTANT, Rows, Turn, conversations
from fedrot.learning.evaluation import How
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import DataSettings
from fedrot.learning.tasks.answers import Problems, by_answers
from fedrot.learning.tasks.generation import Template, encode, prompt_of
from fedrot.learning.tasks.shots import drawn_shots, end_of_answer, end_of_turn, with_shots

TOKENS = 40


def problem(question: str, answer: str) -> list[Turn]:
    """In GSM8K's form."""
    return [("user", f"Question: {question}\nAnswer:"), (ASSISTANT, f" {answer}")]


TRAIN = conversations([problem(f"{i} + {i}?", f"Twice {i}.\n#### {2 * i}") for i in range(20)])
TEST = conversations([problem("1 + 2?", "It is 3.\n#### 3"), problem("2 + 3?", "It is 5.\n#### 5")])
SHOTS = drawn_shots(TRAIN, 2, seed=1)


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama", tiny_model, causal=True, **SIZES["llama"])


@pytest.fixture
def words(folder: Path) -> Any:
    """A tokenizer of words, which loses white space."""
    return resident(folder, labels=()).tokenizer


@pytest.fixture
def model(folder: Path) -> ResidentModel:
    """With a tokenizer of single bytes, which loses nothing of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made: ResidentModel = resident(folder, labels=())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<pad>", "<end>", *letters])}, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<end>")
    made.tokenizer.chat_template = CHAT
    return made


def said_by_heart(model: ResidentModel, text: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model writes this text after every prompt until it is stopped; how many tokens it wrote is noted."""
    ids, counts = model.tokenizer(text, add_special_tokens=False)["input_ids"], []

    def generate(input_ids: Any, generation_config: Any, stopping_criteria: Any, **_: Any) -> Any:
        width = input_ids.shape[1]
        for token in ids[: generation_config.max_new_tokens]:
            input_ids = torch.cat([input_ids, torch.full((len(input_ids), 1), token)], dim=1)
            stopped = bool(stopping_criteria) and bool(stopping_criteria(input_ids, None).all())
            if stopped or token in generation_config.eos_token_id:
                break
        counts.append(input_ids.shape[1] - width)
        return input_ids

    monkeypatch.setattr(model.model, "generate", generate)
    monkeypatch.setattr(model, "longest", lambda: 1000)
    return counts


def test_plain_examples_are_texts_with_an_empty_line_between_them() -> None:
    shots = [problem("1 + 1?", "Twice 1.\n#### 2"), problem("2 + 2?", "Twice 2.\n#### 4\n")]
    asked = with_shots(TEST.turns[0], shots, "plain")  # type: ignore[index]
    assert {role for role, _ in asked} == {"user"}
    assert "".join(text for _, text in asked) == (
        "Question: 1 + 1?\nAnswer: Twice 1.\n#### 2\n\nQuestion: 2 + 2?\nAnswer: Twice 2.\n#### 4\n\n"
        "Question: 1 + 2?\nAnswer:"
    )


def test_a_plain_example_s_tokens_are_those_it_is_learnt_in(words: Any) -> None:
    shot, asked = [("user", "the film"), (ASSISTANT, "good")], [("user", "the book"), (ASSISTANT, "bad")]
    learnt = encode(words, conversations([shot]), 64).tokens.tolist()
    assert learnt[-1] == words.eos_token_id
    own = prompt_of(words, with_shots(asked, [], "plain"), "plain").tolist()
    assert prompt_of(words, with_shots(asked, [shot], "plain"), "plain").tolist() == learnt[:-1] + own


def test_in_a_chat_examples_are_earlier_turns_and_the_system_speaks_once(model: ResidentModel) -> None:
    told: Turn = ("system", "Be brief.")
    shot = [told, ("user", "a"), (ASSISTANT, "b"), ("user", "c"), (ASSISTANT, "d"), ("user", "thanks")]
    asked = with_shots([told, ("user", "e"), (ASSISTANT, "f"), ("user", "g"), (ASSISTANT, "h")], [shot], "chat")
    assert asked == [told, ("user", "a"), (ASSISTANT, "b"), ("user", "c"), (ASSISTANT, "d"), ("user", "e")]
    found = model.tokenizer.decode(prompt_of(model.tokenizer, asked, "chat"))
    assert (
        found
        == "<system> Be brief. [SEP] <user> a [SEP] <assistant> b [SEP] <user> c [SEP] <assistant> d [SEP] "
        + ("<user> e [SEP] <assistant> ")
    )


def test_a_template_that_rewrites_earlier_turns_can_be_asked_all_the_same(model: ResidentModel) -> None:
    """Only what is learnt must be told apart from what was said earlier."""
    model.tokenizer.chat_template = "{{ messages | length }} " + CHAT
    asked = with_shots([("user", "e"), (ASSISTANT, "f")], [[("user", "a"), (ASSISTANT, "b")]], "chat")
    found = model.tokenizer.decode(prompt_of(model.tokenizer, asked, "chat"))
    assert found == "3 <user> a [SEP] <assistant> b [SEP] <user> e [SEP] <assistant> "


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("begins", [True, False], ids=["with a first token", "without"])
@pytest.mark.parametrize(
    "turns",
    [TEST.turns[0], [("system", "Be brief."), ("user", "e"), (ASSISTANT, "f"), ("user", "g")], [(ASSISTANT, "f")]],  # type: ignore[index]
    ids=["one turn", "several", "none before"],
)
def test_without_examples_a_prompt_is_what_comes_before_the_learnt_tokens(
    model: ResidentModel, turns: Sequence[Turn], template: Template, begins: bool
) -> None:
    from tokenizers import processors

    if begins:
        model.tokenizer.bos_token = "<pad>"
        single = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
        model.tokenizer.backend_tokenizer.post_processor = single
    data = encode(model.tokenizer, conversations([turns]), 500, template)
    assert data.learnt is not None
    found = prompt_of(model.tokenizer, with_shots(turns, [], template), template)
    assert found.tolist() == data.tokens[: int(np.argmax(data.learnt))].tolist()


def test_examples_are_drawn_by_the_seed() -> None:
    drawn = drawn_shots(TRAIN, 8, seed=1)
    assert drawn == drawn_shots(TRAIN, 8, seed=1)
    assert drawn[:3] == drawn_shots(TRAIN, 3, seed=1)
    assert drawn != drawn_shots(TRAIN, 8, seed=2)
    assert len({tuple(turns) for turns in drawn}) == 8
    assert all(turns in (TRAIN.turns or ()) for turns in drawn)
    assert drawn_shots(TRAIN, 0, seed=1) == []


def test_more_examples_than_there_are_is_refused() -> None:
    assert len(drawn_shots(TRAIN, 20, seed=1)) == 20
    with refused("evaluation.shots", "21", "20 training examples"):
        drawn_shots(TRAIN, 21, seed=1)


def test_every_problem_comes_after_the_same_examples(model: ResidentModel) -> None:
    asked = Problems(TEST, "number", TOKENS, shots=SHOTS)
    first, second = (model.tokenizer.decode(asked.prompt(model.tokenizer, i)) for i in (0, 1))
    before = first.removesuffix("Question: 1 + 2?\nAnswer:")
    assert second == before + "Question: 2 + 3?\nAnswer:"
    assert before == "".join(f"{text}{answer}\n\n" for (_, text), (_, answer) in SHOTS)


@pytest.mark.parametrize(
    ("kind", "texts", "template", "ends"),
    [
        ("number", ["Question: a", "Question: b"], "plain", ("\n\nQuestion:",)),
        ("number", ["How many a?", "What is b?"], "plain", ("\n\n",)),
        ("text", ["Question: a", "Question: b"], "plain", ("\n\n",)),
        ("number", ["Question: a", "Question: b"], "chat", ()),
        ("text", ["Question: a", "Question: b"], "chat", ()),
    ],
)
def test_where_an_answer_ends(kind: str, texts: list[str], template: Template, ends: tuple[str, ...]) -> None:
    turns = [[("user", text), (ASSISTANT, "x")] for text in texts]
    assert end_of_answer(kind, turns[:1], turns[1:], template) == ends
    assert end_of_answer(kind, turns, [], template) == ()


@pytest.mark.parametrize("kind", ["number", "text"])
def test_an_answer_ends_where_the_model_makes_up_the_next_question(
    model: ResidentModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = " It is 3.\n#### 3"
    counts = said_by_heart(model, f"{own}\n\nQuestion: 4 + 4?\nAnswer: It is 8.\n#### 8", monkeypatch)
    scored = by_answers(Problems(TEST, kind, 200, shots=SHOTS), How(2))
    assert scored.measure(model, model.read(), np.arange(2)).tolist() == [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert counts == [len(own) + len("\n\nQuestion:" if kind == "number" else "\n\n")]
    # Without examples, nothing is written that an answer would have to be told from.
    scored = by_answers(Problems(TEST, kind, 200), How(2))
    assert scored.measure(model, model.read(), np.arange(2))[:, 0].tolist() == [float(kind == "number"), 0.0]


def test_an_empty_line_within_the_working_does_not_end_a_number(
    model: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by_heart(model, " It is\n\n3.\n#### 3\n\nQuestion: 4?", monkeypatch)
    found = by_answers(Problems(TEST, "number", 200, shots=SHOTS), How(2)).measure(model, model.read(), np.arange(2))
    assert found[:, 0].tolist() == [1.0, 0.0]


def test_a_made_up_question_s_number_is_not_the_answer(model: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said_by_heart(model, " I do not know.\n\nQuestion: 1 + 2?\nAnswer: #### 3", monkeypatch)
    found = by_answers(Problems(TEST, "number", 200, shots=SHOTS), How(2)).measure(model, model.read(), np.arange(2))
    assert found[:, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_answers_that_an_empty_line_would_end_too_early_are_refused() -> None:
    rows = conversations([problem("1?", "#### 1"), problem("2?", "two\n\nlines\n#### 2")])
    with refused("evaluation.shots", "problem 2", "empty line", "data.template"):
        Problems(rows, "text", TOKENS, shots=SHOTS)
    Problems(rows, "text", TOKENS)
    Problems(rows, "text", TOKENS, "chat", SHOTS)
    Problems(rows, "number", TOKENS, shots=SHOTS)
    other = [[("user", "How many?"), (ASSISTANT, "#### 1")]]  # so that any empty line ends an answer
    with refused("evaluation.shots", "problem 2", "empty line", "data.template"):
        Problems(rows, "number", TOKENS, shots=other)
    Problems(conversations([problem("1?", "#### 1\n\nas you see")]), "number", TOKENS, shots=other)


@pytest.mark.parametrize(("kind", "answer", "lacks"), [("number", "It is 3.", "####"), ("text", " ", "empty")])
def test_a_problem_without_a_right_answer_is_refused(kind: str, answer: str, lacks: str) -> None:
    rows = conversations([problem("1?", "#### 1"), problem("2?", answer)])
    with refused(f"evaluation.answers is {kind}", "problem 2", lacks):
        Problems(rows, kind, TOKENS)


@pytest.mark.parametrize("special", [True, False])
def test_by_the_template_an_answer_ends_where_a_turn_does(
    model: ResidentModel, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Gemma, Phi-3 and the base models of Qwen2.5, whose end of a turn is not that of a text."""
    from tokenizers import AddedToken

    model.tokenizer.add_tokens([AddedToken("<turn>", special=special), AddedToken(" ", special=False)])
    model.tokenizer.chat_template = CHAT.replace("[SEP]", "<turn>")
    counts = said_by_heart(model, "good day <turn> <user> bad film", monkeypatch)
    rows = conversations([[("system", "a"), ("user", "b"), (ASSISTANT, "good day")]])
    scored = by_answers(Problems(rows, "text", 200, "chat"), How(2))
    assert scored.measure(model, model.read(), np.arange(1)).tolist() == [[1.0, 1.0, 0.0]]
    assert counts == [len("good day ") + 1]
    assert end_of_turn(model.tokenizer, rows.turns[0], "plain") == ()  # type: ignore[index]
    model.tokenizer.chat_template = CHAT.replace("[SEP]", "</>")  # nothing that a text may not have in it
    assert end_of_turn(model.tokenizer, rows.turns[0], "chat") == ()  # type: ignore[index]


def test_prompts_that_the_context_cuts_are_counted(model: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said_by_heart(model, " #### 3", monkeypatch)
    rows: Rows = conversations([problem("1 + 2?", "#### 3"), problem("1 + 2 and no more?", "#### 3")])
    for shots in ((), SHOTS):
        asked = Problems(rows, "number", TOKENS, shots=shots)
        short, long = (len(asked.prompt(model.tokenizer, i)) for i in (0, 1))
        assert short < long
        for room, cut in ((long, [0.0, 0.0]), (long - 1, [0.0, 1.0]), (short, [0.0, 1.0]), (short - 1, [1.0, 1.0])):
            monkeypatch.setattr(model, "longest", lambda room=room: room + TOKENS)
            scored = by_answers(asked, How(2))
            found = scored.measure(model, model.read(), np.arange(2))
            assert found[:, 2].tolist() == cut
            assert scored.score(found, torch.empty(0))["cut"] == sum(cut) / 2


def test_the_template_of_a_recipe_s_data() -> None:
    assert DataSettings(response="response").form == "plain"
    assert DataSettings(messages="messages").form == "chat"
    assert DataSettings(messages="messages", template="plain").form == "plain"
