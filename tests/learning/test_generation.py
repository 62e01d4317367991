"""Language models: what is learnt of a conversation, the losses of packed rows, and clients trained in stacks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_helpers import quick, refused, resident, seeds, shaken
from model_folders import DECODERS, SIZES, write_model
from plain_loop import plain_steps
from test_packing import TARGETS
from torch import nn

from fedrot.core.adapter import Adapter
from fedrot.learning.data import ASSISTANT, Rows, conversations
from fedrot.learning.encoding import Encoded
from fedrot.learning.evaluation import How, chosen_rows, evaluate, measure
from fedrot.learning.local import Job, LocalResult, train_clients
from fedrot.learning.models import ResidentModel
from fedrot.learning.settings import LocalSettings
from fedrot.learning.tasks.generation import encode
from fedrot.learning.vocabulary import token_losses

ALL = frozenset({"a", "b", "head"})
WORDS = ["good", "bad", "film", "book", "the", "very", "warm", "dull", "day", "plot"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def written(seed: int = 0, size: int = 24) -> Rows:
    """Prompts and responses of random words, some of a single one."""
    rng = np.random.default_rng(seed)

    def some(low: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, 9)))

    return conversations([(("user", some(1)), (ASSISTANT, some(1))) for _ in range(size)])


@pytest.fixture(scope="module")
def llama(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama", tiny_model, causal=True, **SIZES["llama"])


@pytest.fixture
def model(llama: Path) -> ResidentModel:
    made: ResidentModel = resident(llama, labels=(), dropout=0.2)
    made.model.double()
    return made


@pytest.fixture
def data(model: ResidentModel) -> Encoded:
    return encode(model.tokenizer, written(), 64)


def shown(model: ResidentModel, data: Encoded, row: int) -> tuple[str, str]:
    """(what is only read, what is learnt) of an example."""
    assert data.learnt is not None
    span = slice(data.offsets[row], data.offsets[row + 1])
    tokens, learnt = data.tokens[span], data.learnt[span]
    return model.tokenizer.decode(tokens[~learnt]), model.tokenizer.decode(tokens[learnt])


def test_only_the_response_and_the_end_of_the_text_are_learnt(model: ResidentModel) -> None:
    rows = conversations([(("user", "the film was"), (ASSISTANT, "very good"))])
    data = encode(model.tokenizer, rows, 64)
    assert shown(model, data, 0) == ("the film was", "very good [SEP]")
    assert data.cut == 0


def test_a_response_that_nothing_comes_before_is_learnt_from_its_first_token(model: ResidentModel) -> None:
    data = encode(model.tokenizer, conversations([((ASSISTANT, "very good"),)]), 64)
    assert shown(model, data, 0) == ("[SEP]", "very good [SEP]")


def test_a_chat_is_written_by_the_template_and_only_the_assistant_is_learnt(model: ResidentModel) -> None:
    model.tokenizer.chat_template = CHAT
    turns = [("user", "the film"), (ASSISTANT, "good"), ("user", "the book"), (ASSISTANT, "bad")]
    data = encode(model.tokenizer, conversations([turns]), 64, "chat")
    read, learnt = shown(model, data, 0)
    assert learnt == "good [SEP] bad [SEP]"
    assert "the film" in read
    assert "the book" in read
    whole = model.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert data.tokens.tolist() == model.tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_template_is_refused(model: ResidentModel) -> None:
    with refused("data.template", "plain"):
        encode(model.tokenizer, written(size=2), 64, "chat")


def test_a_template_that_rewrites_earlier_turns_is_refused(model: ResidentModel) -> None:
    model.tokenizer.chat_template = "{{ messages | length }} " + CHAT
    turns = [("user", "the film"), (ASSISTANT, "good"), ("user", "the book"), (ASSISTANT, "bad")]
    with refused("template", "plain"):
        encode(model.tokenizer, conversations([turns]), 64, "chat")


def test_a_template_that_refuses_a_conversation_is_told_in_one_line(model: ResidentModel) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system,\n please') }}{% endif %}"
    model.tokenizer.chat_template = refusing + CHAT
    turns = [("system", "the film"), ("user", "good"), (ASSISTANT, "bad")]
    encode(model.tokenizer, conversations([turns[1:]]), 64, "chat")
    with refused("template", "system, user", "No system, please", "use data.template plain"):
        encode(model.tokenizer, conversations([turns]), 64, "chat")
    model.tokenizer.chat_template = "{% if messages|length == 1 %}{{ raise_exception('Who asks?') }}{% endif %}" + CHAT
    data = encode(model.tokenizer, conversations([turns]), 64, "chat")
    assert shown(model, data, 0)[1] == "bad [SEP]", "only what comes before an answer, and the answer, is written down"


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(4, 30))
def test_what_is_too_long_is_cut_and_counted_and_always_leaves_something_to_learn(
    prompt: int, response: int, longest: int
) -> None:
    from fedrot.learning.tasks.generation import _shortened

    ids, mask = list(range(prompt + response)), [False] * prompt + [True] * response
    found, learnt = _shortened(ids, mask, longest) if len(ids) > longest else (ids, mask)
    assert len(found) <= longest
    assert found == list(range(found[0], found[0] + len(found))), "one piece"
    assert any(learnt)
    assert not learnt[0]
    assert learnt == [i >= prompt for i in found]
    if response + longest // 2 <= longest:
        assert found[-1] == ids[-1], "a response that fits in half is whole"


def test_cut_examples_are_counted_and_said(model: ResidentModel, caplog: pytest.LogCaptureFixture) -> None:
    long = (("user", "the film " * 20), (ASSISTANT, "good"))
    found = encode(model.tokenizer, conversations([long, long, (("user", "the"), (ASSISTANT, "bad"))]), 12)
    assert found.cut == 2
    assert "2 of 3 examples are longer" in caplog.text
    assert shown(model, found, 0)[1] == "good [SEP]"


@quick
@given(seeds, st.integers(1, 700), st.booleans())
def test_token_losses_and_their_gradients_are_the_dense_ones(seed: int, count: int, bias: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    head = nn.Linear(5, 11, bias=bias).double().requires_grad_(False)
    hidden = torch.randn(count, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (count,), generator=rng)
    weights = torch.rand(count, generator=rng, dtype=torch.float64)
    found, right = token_losses(hidden, head, targets)
    (mine,) = torch.autograd.grad((weights * found).sum(), hidden)
    scores = head(hidden)
    wanted = nn.functional.cross_entropy(scores, targets, reduction="none")
    (theirs,) = torch.autograd.grad((weights * wanted).sum(), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(right, scores.argmax(-1) == targets)


@pytest.mark.parametrize("kind", DECODERS)
def test_packed_losses_are_those_of_padded_batches_and_of_transformers(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, kind, tiny_model, causal=True, **SIZES[kind])
    model = resident(folder, targets=TARGETS.get(kind), labels=())
    model.model.double()
    model.write(shaken(model.read(), size=0.3))
    data, rows = encode(model.tokenizer, written(3), 64), np.array([7, 0, 20, 2, 2, 11])
    with torch.no_grad():
        padded = model.token_losses(model.collate(data, rows, packing=False), "fp32")
        found = model.token_losses(model.collate(data, rows, packing=True), "fp32")
    torch.testing.assert_close(found[0], padded[0], rtol=0, atol=1e-11)
    assert torch.equal(found[1], padded[1])
    assert data.learnt is not None
    place = 0
    for row in rows:  # transformers' own loss, of each example alone
        span = slice(data.offsets[row], data.offsets[row + 1])
        tokens = torch.from_numpy(data.tokens[span].astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(data.learnt[span].copy())[None], tokens, -100)
        count = int(data.learnt[span].sum())
        with torch.no_grad():
            wanted = model.model(input_ids=tokens, labels=labels).loss
        # transformers takes its loss in float32.
        assert float(found[0][place : place + count].mean()) == pytest.approx(float(wanted), rel=1e-5)
        place += count
    assert place == len(found[0])


def jobs_of(start: Adapter) -> list[Job]:
    """Clients with different numbers of examples, each from factors of its own."""
    parts = np.split(np.arange(24), [9, 12, 20])
    return [Job(shaken(start, seed=i), mine, (1, 0, f"client-{i}")) for i, mine in enumerate(parts)]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("batch", [1, 4])
def test_clients_of_a_stack_end_where_a_plain_loop_with_transformers_loss_leads_them(
    model: ResidentModel, data: Encoded, packing: bool, batch: int
) -> None:
    settings = LocalSettings(optimizer="sgd", lr=0.3, batch=batch, steps=3)
    jobs = jobs_of(model.read())
    for job, found in zip(jobs, train_clients(model, data, jobs, settings, ALL, packing), strict=True):
        assert isinstance(found, LocalResult)
        wanted, _, _ = plain_steps(model, job.adapter, data, job.indices, settings, job.key)
        begun, goals = dict(job.adapter.tensors()), dict(wanted.tensors())
        for name, tensor in found.adapter.tensors():
            torch.testing.assert_close(tensor, goals[name], rtol=0, atol=1e-9)
            assert not torch.equal(tensor, begun[name])


def test_the_scores_are_means_over_tokens(model: ResidentModel, data: Encoded) -> None:
    adapter, rows = shaken(model.read()), chosen_rows(len(data), 10, 0, "test")
    parts = {"x": np.arange(12), "y": np.arange(12, 24)}

    def alone(work: Any, pieces: Any) -> Any:
        return (work(model, piece) for piece in pieces)

    found = evaluate(alone, {"": adapter}, data, "test", parts, rows, How(4))
    each = measure(model, adapter, data, rows, How(64, packing=True)).numpy()
    assert found.metric == "loss"
    assert found.scores["loss"] == pytest.approx(each[:, 0].sum() / each[:, 2].sum())
    assert found.scores["perplexity"] == pytest.approx(np.exp(found.scores["loss"]))
    assert found.scores["token_accuracy"] == pytest.approx(each[:, 1].sum() / each[:, 2].sum())
    record = found.record()
    by_client = record["by_client"]
    assert isinstance(by_client, dict)
    assert record["worst"] == max(by_client.values()), "of losses the largest is the worst"


def test_a_language_model_learns_the_responses_it_is_taught(llama: Path) -> None:
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = resident(llama, labels=(), targets=targets, rank=8)
    rows = conversations([(("user", word), (ASSISTANT, other)) for word, other in zip(WORDS, WORDS[::-1], strict=True)])
    data = encode(model.tokenizer, rows, 64)
    start = model.read()
    settings = LocalSettings(lr=0.02, batch=10, steps=80)
    (found,) = train_clients(model, data, [Job(start, np.arange(10), (0, 0, "c"))], settings, ALL, True)
    assert isinstance(found, LocalResult)
    before = measure(model, start, data, np.arange(10), How(10))
    after = measure(model, found.adapter, data, np.arange(10), How(10))
    # Its output layer is random, small and frozen, so its loss cannot fall far.
    assert float(after[:, 0].sum()) < 0.95 * float(before[:, 0].sum())


def test_the_adapter_has_no_head_and_a_language_model_s_settings(model: ResidentModel) -> None:
    adapter = model.read()
    assert adapter.head == {}
    assert adapter.config["task_type"] == "CAUSAL_LM"
    assert model.causal
    assert replace(adapter, config={}).layers.keys() == adapter.layers.keys()


def test_a_model_that_lacks_its_output_layer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", tiny_model, **SIZES["llama"])
    with refused("lm_head.weight", "model.path"):
        resident(folder, labels=())
