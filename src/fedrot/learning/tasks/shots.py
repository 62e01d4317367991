"""Few-shot prompts (Brown et al., arXiv 2005.14165): worked examples before a problem, the same before every one.

Plain, examples and problem are texts with an empty line between them, as GSM8K is usually asked ("Question: ... Answer:
...", an empty line, "Question: ..."). By the chat template the examples are earlier turns of user and assistant.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from fedrot.core.errors import DataError
from fedrot.core.seeding import generator
from fedrot.learning.data import ASSISTANT, Rows, Turn
from fedrot.learning.tasks.generation import Template

BETWEEN = "\n\n"

Turns = Sequence[Turn]


def drawn_shots(train: Rows, count: int, seed: int) -> list[Turns]:
    """`count` of the training conversations, in an order of their own; the same for the same seed.

    Raises `DataError` where there are fewer.
    """
    if count > len(train):
        raise DataError(f"evaluation.shots is {count}, there are {len(train)} training examples; lower it")
    order = torch.randperm(len(train), generator=generator(seed, "shots")).tolist()
    return [(train.turns or ())[i] for i in order[:count]]


def with_shots(problem: Turns, shots: Sequence[Turns], template: Template) -> list[Turn]:
    """What is asked in a conversation before the assistant's first turn, with worked examples before it.

    Plain, an example's answers are no turns of the assistant's, behind which the end of the text is written.
    """
    asked = list(takewhile(lambda turn: turn[0] != ASSISTANT, problem))
    if not shots:
        return asked
    worked = [_answered(shot) for shot in shots]
    if template == "plain":
        return [*(("user", text) for turns in worked for text in _parted(turns)), *asked]
    # A template takes what the system says at the beginning only, and once.
    system = [turn for turn in asked if turn[0] == "system"]
    return [*system, *(turn for turns in [*worked, asked] for turn in turns if turn[0] != "system")]


def _answered(turns: Turns) -> Turns:
    """A conversation up to the last thing that the assistant says."""
    last = max(place for place, (role, _) in enumerate(turns) if role == ASSISTANT)
    return turns[: last + 1]


def _parted(turns: Turns) -> list[str]:
    """What is said in a conversation, and an empty line."""
    *texts, last = (content for _, content in turns)
    return [*texts, last.rstrip() + BETWEEN]


def _text(turns: Turns) -> str:
    return "".join(content for _, content in turns)


def end_of_answer(kind: str, problems: Sequence[Turns], shots: Sequence[Turns], template: Template) -> tuple[str, ...]:
    """The strings at which an answer ends: a model that was shown several examples goes on and makes up the next one.

    Of kind "text" an empty line ends it; of kind "number" one with the word behind it that all problems begin with
    ("Question:"), if they do. Nothing ends it where turns do, or without worked examples.
    """
    if not shots or template != "plain":
        return ()
    if kind == "text":
        return (BETWEEN,)
    first = {"".join(_text(turns).split(maxsplit=1)[:1]) for turns in [*problems, *shots]}
    return (BETWEEN + (first.pop() if len(first) == 1 else ""),)


def end_of_turn(tokenizer: Any, problem: Turns, template: Template) -> tuple[int, ...]:
    """The tokens at which an answer ends beside that of the text: by the chat template the first added token that it
    writes behind what the assistant says, such as Gemma's <end_of_turn>, which need not be the end of the text.
    """
    if template != "chat":
        return ()
    said = "fedrot"
    turns = [*with_shots(problem, (), template), (ASSISTANT, said)]
    messages = [{"role": role, "content": content} for role, content in turns]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(said)[2]
    added = {token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
    return tuple(token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in added)[:1]
