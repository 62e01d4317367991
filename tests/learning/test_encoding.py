"""Tokenised examples: batches padded to their own longest, and a fingerprint of all that training sees."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import quick, refused, seeds

from fedrot.learning.data import Rows
from fedrot.learning.encoding import Encoded
from fedrot.learning.tasks import classification
from fedrot.learning.tasks.classification import encode

TEXTS = ["good film", "a very dull story of film", "it was", "the plot is boring the day was cold"]
PAD = 9


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def random_encoded(seed: int, n: int, segments: bool = True) -> Encoded:
    """So many examples, of 1 to 20 tokens."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 21, n))])
    total = int(offsets[-1])
    types = rng.integers(0, 2, total).astype(np.uint8) if segments else None
    tokens = rng.integers(10, 99, total).astype(np.int32)
    return Encoded(tokens, types, offsets, rng.integers(0, 3, n), PAD)


@quick
@given(seeds, st.integers(1, 12), st.booleans(), st.data())
def test_a_batch_holds_the_examples_tokens_and_no_more_padding_than_its_longest_needs(
    seed: int, n: int, segments: bool, data: st.DataObject
) -> None:
    encoded = random_encoded(seed, n, segments)
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    inputs, labels = encoded.batch(rows)
    longest = max(encoded.lengths[row] for row in rows)
    assert set(inputs) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if segments else set())
    assert {tensor.shape for tensor in inputs.values()} == {(len(rows), longest)}
    assert labels.tolist() == encoded.labels[rows].tolist()
    for place, row in enumerate(rows):
        span = slice(encoded.offsets[row], encoded.offsets[row + 1])
        size = int(encoded.lengths[row])
        assert inputs["input_ids"][place].tolist() == [*encoded.tokens[span], *[PAD] * (longest - size)]
        assert inputs["attention_mask"][place].tolist() == [1] * size + [0] * (longest - size)
        if encoded.segments is not None:
            assert inputs["token_type_ids"][place].tolist() == [*encoded.segments[span], *[0] * (longest - size)]


def test_another_long_example_does_not_pad_a_batch_of_short_ones(tokenizer: Any) -> None:
    encoded = encode(tokenizer, Rows(["good film", " ".join(["day"] * 60), "it was"], [0, 1, 0]), 64)
    assert encoded.batch([0, 2])[0]["input_ids"].shape == (2, 4)
    assert encoded.batch([0, 1])[0]["input_ids"].shape == (2, 62)


def test_encoding_gives_what_the_tokenizer_gives_for_each_text_alone(tokenizer: Any) -> None:
    encoded = encode(tokenizer, Rows(TEXTS, [0, 1, 1, 0]), 64)
    assert len(encoded) == 4
    assert encoded.pad == tokenizer.pad_token_id
    for i, text in enumerate(TEXTS):
        inputs, _ = encoded.batch([i])
        alone = tokenizer(text, return_tensors="pt")
        assert set(inputs) == set(alone)
        assert all(inputs[name].equal(alone[name]) for name in alone)
        assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == text
    assert encoded.labels.tolist() == [0, 1, 1, 0]


def test_a_padded_batch_is_the_tokenizers_own(tokenizer: Any) -> None:
    inputs, _ = encode(tokenizer, Rows(TEXTS, [0] * 4), 64).batch([3, 0, 1])
    reference = tokenizer([TEXTS[3], TEXTS[0], TEXTS[1]], padding="longest", return_tensors="pt")
    assert all(inputs[name].equal(reference[name]) for name in reference)


def test_pairs_are_joined_and_the_longer_text_is_cut_first(tokenizer: Any) -> None:
    first, second = "good film", "the plot is boring the day was cold"
    whole = encode(tokenizer, Rows([first], [0], [second]), 64).batch([0])[0]
    assert tokenizer.decode(whole["input_ids"][0]) == f"[CLS] {first} [SEP] {second} [SEP]"
    assert whole["token_type_ids"][0].tolist() == [0] * 4 + [1] * 9
    cut = encode(tokenizer, Rows([first], [0], [second]), 9).batch([0])[0]
    assert tokenizer.decode(cut["input_ids"][0]) == f"[CLS] {first} [SEP] the plot is boring [SEP]"
    assert cut["token_type_ids"][0].tolist() == [0] * 4 + [1] * 5
    turned = encode(tokenizer, Rows([second], [0], [first]), 9).batch([0])[0]
    assert tokenizer.decode(turned["input_ids"][0]) == f"[CLS] the plot is boring [SEP] {first} [SEP]"


def test_a_long_text_is_cut_to_the_maximum_length_with_its_end_mark(tokenizer: Any) -> None:
    encoded = encode(tokenizer, Rows(TEXTS, [0] * 4), 6)
    assert encoded.lengths.tolist() == [4, 6, 4, 6]
    assert tokenizer.decode(encoded.batch([1])[0]["input_ids"][0]) == "[CLS] a very dull story [SEP]"


def test_a_model_without_token_types_gets_none(tokenizer: Any, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_model, model_input_names=["input_ids", "attention_mask"])
    encoded = encode(plain, Rows(TEXTS, [0] * 4), 64)
    assert encoded.segments is None
    assert set(encoded.batch([0])[0]) == {"input_ids", "attention_mask"}
    assert encoded.tokens.tolist() == encode(tokenizer, Rows(TEXTS, [0] * 4), 64).tokens.tolist()


@pytest.mark.parametrize("pair", [None, TEXTS[::-1]], ids=["one text", "two"])
def test_a_split_is_tokenised_some_examples_at_a_time(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, pair: list[str] | None
) -> None:
    rows, sizes = Rows(TEXTS, [0, 1, 1, 0], pair), []

    class Spy:
        pad_token_id = tokenizer.pad_token_id

        def __call__(self, texts: list[str], *args: Any, **options: Any) -> Any:
            sizes.append(len(texts))
            return tokenizer(texts, *args, **options)

    whole = encode(Spy(), rows, 9)
    monkeypatch.setattr(classification, "_AT_ONCE", 3)
    found = encode(Spy(), rows, 9)
    assert sizes == [4, 3, 1]
    assert found.fingerprint() == whole.fingerprint()
    assert (found.tokens.dtype, found.segments is not None) == (np.int32, True)


def test_an_example_without_tokens_is_refused_by_its_row(tokenizer: Any) -> None:
    """Of a tokenizer that puts nothing around a text; another one's empty text is the tokens around it."""
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    rows = Rows(["good film", "", "it was"], [0, 1, 0])
    assert encode(tokenizer, rows, 64).lengths.tolist() == [4, 2, 4]
    with refused("the split 'train': row 2 of 3", "no tokens", "leave"):
        encode(bare, rows, 64, "the split 'train'")
    assert encode(bare, replace(rows, pair=["it", "was", "fine"]), 64).lengths.tolist() == [3, 1, 3]


@quick
@given(seeds, st.integers(2, 12), st.booleans(), st.data())
def test_the_fingerprint_changes_with_any_change_and_with_nothing_else(
    seed: int, n: int, segments: bool, data: st.DataObject
) -> None:
    encoded = random_encoded(seed, n, segments)
    assert encoded.fingerprint() == random_encoded(seed, n, segments).fingerprint()
    others = [random_encoded(seed, n, not segments)]
    for name in ["tokens", "labels", *(["segments"] if segments else [])]:
        array = getattr(encoded, name).copy()
        array[data.draw(st.integers(0, len(array) - 1))] ^= 1
        others.append(replace(encoded, **{name: array}))
    offsets = encoded.offsets.copy()
    offsets[data.draw(st.integers(1, n - 1))] += 1
    others.append(replace(encoded, offsets=offsets))
    assert len({encoded.fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1


def test_the_fingerprint_depends_on_the_examples_order(tokenizer: Any) -> None:
    rows = Rows(TEXTS, [0, 1, 1, 0])
    assert encode(tokenizer, rows, 64).fingerprint() != encode(tokenizer, rows.take([3, 2, 1, 0]), 64).fingerprint()
