"""Writing on and answering: greedy decoding in padded batches, answers taken out of texts, exact match."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import quick, refused, resident, shaken
from model_folders import SIZES, write_model
from test_shots import said_by_heart

from fedrot.learning.data import ASSISTANT, conversations
from fedrot.learning.evaluation import How
from fedrot.learning.generation import cut_prompts, write_on
from fedrot.learning.models import ResidentModel
from fedrot.learning.tasks.answers import Problems, answer_of, by_answers, score

TOKENS = 8


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ResidentModel:
    folder = tmp_path_factory.mktemp(request.param)
    wide = {"initializer_range": 0.5}  # so that different prompts are followed by different words
    made: ResidentModel = resident(
        write_model(folder, request.param, tiny_model, causal=True, **SIZES[request.param], **wide), labels=()
    )
    made.write(shaken(made.read(), size=0.3))
    return made


def by_hand(model: ResidentModel, prompt: list[int], tokens: int, ends: Sequence[int] = ()) -> str:
    """Greedy decoding one token at a time, alone and without a cache; the text with that of the prompt before it."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            following = int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following in (model.tokenizer.eos_token_id, *ends):
            break
        ids.append(following)
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


PROMPTS = ["the film was", "good", "a very dull book of the day is bad", "the plot", "warm"]


def test_prompts_of_any_length_are_continued_as_each_would_be_alone(model: ResidentModel) -> None:
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    wanted = [by_hand(model, one, TOKENS) for one in ids]
    assert len({text.removeprefix(prompt) for text, prompt in zip(wanted, PROMPTS, strict=True)}) > 2
    for batch in (1, 2, 5):
        found = write_on(model, [np.array(one, dtype=np.int32) for one in ids], TOKENS, batch)
        assert [prompt + text for prompt, text in zip(PROMPTS, found, strict=True)] == wanted


def test_a_token_to_end_at_ends_the_text_and_is_left_out(model: ResidentModel) -> None:
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    prompts = [np.array(one, dtype=np.int32) for one in ids]
    free = write_on(model, prompts, TOKENS, 5)
    ends = [model.tokenizer.convert_tokens_to_ids(next(text.split()[1] for text in free if len(text.split()) > 1))]
    found = write_on(model, prompts, TOKENS, 5, ends=ends)
    assert found != free
    assert [p + t for p, t in zip(PROMPTS, found, strict=True)] == [by_hand(model, one, TOKENS, ends) for one in ids]


def test_the_space_that_a_text_begins_with_is_written(model: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded alone, tokens of SentencePiece's tokenizers, such as Llama 2's, lose it: four spaces become three."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({one: i for i, one in enumerate(["<end>", *"\u2581\ndefrtunx():"])}, []))
    letters.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    letters.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<end>", eos_token="<end>")
    monkeypatch.setattr(model, "tokenizer", made)
    said_by_heart(model, "   return x", monkeypatch)  # and the space that the tokenizer puts before a text
    prompts = [np.array(made(text)["input_ids"], dtype=np.int32) for text in ("def f(x):\n", "def fun(x):\n", "x")]
    assert write_on(model, prompts, 40, 3) == ["    return x"] * 3


def test_an_answer_that_leaves_no_place_for_a_prompt_is_refused(model: ResidentModel) -> None:
    longest = model.longest()
    assert longest is not None
    prompts = [np.full(2, 5, dtype=np.int32), np.full(1, 5, dtype=np.int32)]
    assert cut_prompts(model, prompts, longest - 1) == [True, False]
    for tokens in (longest, longest + 1):
        with refused("evaluation.tokens", str(tokens), f"{longest} positions"):
            write_on(model, prompts, tokens, 2)


def test_a_string_to_stop_at_ends_the_text_and_is_left_out(model: ResidentModel) -> None:
    ids = [np.array(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32) for text in PROMPTS]
    free = write_on(model, ids, TOKENS, 5)
    word = next(text.split()[1] for text in free if len(text.split()) > 1)
    found = write_on(model, ids, TOKENS, 5, stop=[word])
    assert found == [text[: text.index(word)] if word in text else text for text in free]


def test_a_prompt_that_fills_the_context_loses_its_beginning(model: ResidentModel) -> None:
    longest = model.longest()
    assert longest is not None
    ids = model.tokenizer(" ".join(["good bad film"] * 40), add_special_tokens=False)["input_ids"]
    assert len(ids) > longest
    (found,) = write_on(model, [np.array(ids, dtype=np.int32)], TOKENS, 1)
    kept = ids[-(longest - TOKENS) :]
    assert model.tokenizer.decode(kept, skip_special_tokens=True) + found == by_hand(model, kept, TOKENS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 3.\n#### 18", "18"),
        ("#### 1,200", "1200"),
        ("####-3", "-3"),
        ("#### $5.50", "5.5"),
        ("#### 5.0 apples", "5"),
        ("#### .5", "0.5"),
        ("#### -0", "0"),
        ("#### 100", "100"),
        ("18", None),
        ("#### eighteen", None),
        ("", None),
        ("#### 4 #### 5", "4"),
    ],
)
def test_the_answer_stands_behind_the_mark(text: str, answer: str | None) -> None:
    assert answer_of(text, "number") == answer


@quick
@given(st.integers(-(10**9), 10**9))
def test_a_number_is_the_same_however_it_is_written(number: int) -> None:
    forms = {answer_of(f"#### {form}", "number") for form in (f"{number}", f"{number:,}", f"{number}.00", f"${number}")}
    assert len(forms) == 1


def test_exact_match_counts_right_answers_missing_ones_and_cut_prompts_apart() -> None:
    found = score(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert found["cut"] == 0.75
    assert found["exact_match"] == 0.5
    assert found["unparsed"] == 0.25
    assert 0.1 < found["low"] < 0.2  # Wilson's interval of 2 of 4: .150 to .850
    assert found["low"] == pytest.approx(0.1500, abs=1e-3)
    assert found["high"] == pytest.approx(0.8500, abs=1e-3)


def test_what_the_model_writes_is_compared_with_the_response(model: ResidentModel) -> None:
    """References are what the model itself writes, but for one."""
    ids = [np.array(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32) for text in PROMPTS]
    own = [text or "good" for text in write_on(model, ids, TOKENS, 5)]
    answers = [*own[:-1], "something else"]
    rows = conversations([(("user", p), (ASSISTANT, a)) for p, a in zip(PROMPTS, answers, strict=True)])
    asked = Problems(rows, "text", TOKENS)
    assert all(asked.prompt(model.tokenizer, i).tolist() == one.tolist() for i, one in enumerate(ids))
    scored = by_answers(asked, How(3))
    found = scored.measure(model, model.read(), np.arange(5))
    written = [bool(text.strip()) for text in write_on(model, ids, TOKENS, 5)]
    assert found[:, 0].tolist() == [float(w) for w in written[:-1]] + [0.0]
    assert found[:, 1].tolist() == [float(w) for w in written]
    assert found[:, 2].tolist() == [0.0] * 5
    assert scored.metric == "exact_match"
