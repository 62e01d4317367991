"""Writing text: supervised fine-tuning of a language model on prompts with responses, and on conversations.

An example is a conversation; what the assistant says in it is learnt, and all else is only read. Two ways to write one
down: plain, where the turns follow each other as they are ("2 + 2 =" + " 4" + end of text), and chat, by the
tokenizer's own template. It is scored by the loss of the tokens that are learnt.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.errors import DataError
from fedrot.learning.batching import Batch
from fedrot.learning.data import ASSISTANT, Rows, Turn
from fedrot.learning.encoding import Encoded
from fedrot.learning.models import ResidentModel

METRIC = "loss"
Template = Literal["plain", "chat"]


def encode(tokenizer: Any, rows: Rows, max_length: int, template: Template = "plain") -> Encoded:
    """Tokenise every conversation once.

    One that is longer than `max_length` loses the beginning of what comes before its first learnt token, down to half
    of `max_length`, and then its end; how many were cut is counted. Raises `DataError` for a tokenizer without a chat
    template where one is asked for, and for a template that refuses a conversation.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise DataError("data.template is chat, and the model's tokenizer has no chat template; use plain")
    tokens: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    learnt: list[np.ndarray[Any, np.dtype[np.bool_]]] = []
    cut = 0
    for turns in rows.turns or ():
        ids, mask = _joined(tokenizer, _pieces(tokenizer, turns, template), template)
        if len(ids) > max_length:
            cut += 1
            ids, mask = _shortened(ids, mask, max_length)
        tokens.append(np.asarray(ids, dtype=np.int32))
        learnt.append(np.asarray(mask, dtype=np.bool_))
    if cut:
        logging.getLogger("fedrot").warning(
            "%d of %d examples are longer than data.max_length, %d tokens, and were cut", cut, len(tokens), max_length
        )
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]).astype(np.int64)
    labels = np.zeros(len(tokens), dtype=np.int64)
    pad = tokenizer.pad_token_id
    return Encoded(np.concatenate(tokens), None, offsets, labels, pad, np.concatenate(learnt), cut)


def prompt_of(tokenizer: Any, asked: Sequence[Turn], template: Template) -> NDArray[np.int32]:
    """The tokens that an answer to these turns comes after, however many they are."""
    if template == "chat":
        pieces = [(_templated(tokenizer, _messages(asked), True), False)]
    else:
        pieces = list(_pieces(tokenizer, asked, template))
    ids, mask = _joined(tokenizer, [*pieces, (tokenizer.eos_token, True)], template)
    return np.asarray(ids[: mask.index(True)], dtype=np.int32)


def _joined(tokenizer: Any, pieces: Iterable[tuple[str, bool]], template: Template) -> tuple[list[int], list[bool]]:
    """(tokens, which of them are learnt) of a conversation. The first token is never learnt: nothing comes before it.

    Pieces are tokenised one by one, so that no token has a part in two of them; what is generated later is continued
    from the same tokens.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for text, taught in pieces:
        mine = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += mine
        mask += [taught] * len(mine)
    begin = tokenizer.bos_token_id
    if template == "plain" or mask[0]:
        # A model that begins its texts with a token of its own is given it; where it has none, the end of the last one.
        begin = tokenizer.eos_token_id if begin is None else begin
        if mask[0] or (tokenizer.bos_token_id is not None and _begins(tokenizer)):
            ids, mask = [begin, *ids], [False, *mask]
    return ids, mask


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself puts its first token before a text."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _pieces(tokenizer: Any, turns: Sequence[Turn], template: Template) -> Iterator[tuple[str, bool]]:
    """The text of a conversation piece by piece, and whether each is learnt."""
    if template == "plain":
        for role, content in turns:
            yield content, role == ASSISTANT
            if role == ASSISTANT:
                yield tokenizer.eos_token, True
        return
    so_far = ""
    messages = _messages(turns)
    for number, (role, _) in enumerate(turns, start=1):
        if role != ASSISTANT:  # a template may refuse what the system says alone
            continue
        asked = _templated(tokenizer, messages[: number - 1], True)
        yield asked[_agreed(so_far, asked) :], False
        said = _templated(tokenizer, messages[:number], False)
        yield said[_agreed(asked, said) :], True
        so_far = said


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _templated(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool) -> str:
    if not messages:  # the assistant speaks first; transformers refuses to write nothing
        return ""
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except TemplateError as problem:  # of some models it knows no system, or wants turns to alternate
        roles = ", ".join(message["role"] for message in messages[:8])
        raise DataError(
            f"the model's chat template refuses a conversation that begins {roles} "
            f"({' '.join(str(problem).split())}); use data.template plain"
        ) from None
    return text


def _agreed(before: str, after: str) -> int:
    """Where `after` goes on from `before`. `DataError` where the template rewrites what was said earlier."""
    if not after.startswith(before):
        raise DataError(
            "the model's chat template writes earlier turns differently once a later one is there, so what is learnt "
            "cannot be told apart; use data.template plain"
        )
    return len(before)


def _shortened(ids: list[int], mask: list[bool], longest: int) -> tuple[list[int], list[bool]]:
    """At most `longest` tokens, some of them learnt."""
    before = mask.index(True)
    over = len(ids) - longest
    drop = min(over, max(0, before - max(1, longest // 2)))
    return ids[drop : drop + longest], mask[drop : drop + longest]


def losses(model: ResidentModel, batch: Batch, precision: str) -> Tensor:  # (U)
    """The loss of every token of a batch that is learnt."""
    return model.token_losses(batch, precision)[0]


def measure(model: ResidentModel, batch: Batch, precision: str) -> Tensor:  # (n, 3)
    """For every example of a batch: the sum of its tokens' losses, how many were likeliest, how many there are."""
    found, right = model.token_losses(batch, precision)
    parts = batch.scored.tolist()
    rows = [
        (float(loss.double().sum()), float(hit.sum()), float(count))
        for loss, hit, count in zip(found.cpu().split(parts), right.cpu().split(parts), parts, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def score(found: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean loss of a token, perplexity, and the share of tokens that were likeliest; `found` (n, 3) is what `measure`
    gives.
    """
    loss, right, count = (float(column.sum()) for column in found.T)
    return {"loss": loss / count, "perplexity": math.exp(min(700.0, loss / count)), "token_accuracy": right / count}
