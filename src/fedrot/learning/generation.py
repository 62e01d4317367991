"""Writing on: many prompts at once, padded on the left, the likeliest token each time, with the key-value cache."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.core.errors import DataError
from fedrot.learning.models import ResidentModel


def write_on(
    model: ResidentModel,
    prompts: Sequence[NDArray[np.int32]],  # tokens of each, at least one
    tokens: int,
    batch: int,
    precision: str = "fp32",
    stop: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> list[str]:
    """What the model writes after each prompt, in their order: up to the end of the text, `tokens` more tokens, one of
    the tokens `ends`, or one of the strings `stop`; ends are left out. A prompt that leaves too little of the context
    loses its beginning, see `cut_prompts`.
    """
    written = [""] * len(prompts)
    room = prompt_room(model, tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        cut = [prompts[i][-room:] if room else prompts[i] for i in places]
        found = _batch(model, cut, tokens, precision, stop, ends)
        for place, text in zip(places, found, strict=True):
            written[place] = text
    return written


def cut_prompts(model: ResidentModel, prompts: Sequence[NDArray[np.int32]], tokens: int) -> list[bool]:
    """Which prompts are longer than the context less `tokens` for the answer."""
    room = prompt_room(model, tokens)
    return [room is not None and len(prompt) > room for prompt in prompts]


def warn_of_cut(cut: int, prompts: int) -> None:
    """Say in the log that so many prompts were cut, if any were."""
    if cut:
        logging.getLogger("fedrot").warning(
            "%d of %d prompts do not fit in the model's context beside evaluation.tokens, and lost their beginning",
            cut,
            prompts,
        )


def prompt_room(model: ResidentModel, tokens: int) -> int | None:
    """The most tokens of a prompt before an answer of `tokens`; None where the model does not say.

    Raises `DataError` where not even one is left.
    """
    longest = model.longest()
    if longest is not None and tokens >= longest:
        raise DataError(
            f"evaluation.tokens is {tokens}, and the model has {longest} positions for prompt and answer; lower it"
        )
    return None if longest is None else longest - tokens


def _batch(
    model: ResidentModel,
    prompts: Sequence[NDArray[np.int32]],
    tokens: int,
    precision: str,
    stop: Sequence[str],
    ends: Sequence[int],
) -> list[str]:
    from transformers import GenerationConfig, StoppingCriteriaList

    tokenizer = model.tokenizer
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    last = [tokenizer.eos_token_id, *ends]
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=last,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad(), model.autocast(precision):
        found = model.model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([_stopped_by(tokenizer, stop, width)] if stop else []),
        )
    written = [list(takewhile(lambda token: token not in last, row)) for row in found[:, width:].tolist()]
    return [
        text_before(_behind(tokenizer, prompt.tolist(), ids), stop)
        for prompt, ids in zip(prompts, written, strict=True)
    ]


def _behind(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text of the tokens behind a prompt. Both are decoded together: SentencePiece's tokenizers drop the first
    space of what they decode, which may be one of a line's indentation.
    """

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = text(prompt), text([*prompt, *ids])
    # Bytes that are no UTF-8, right behind the prompt, may change how its last character is decoded.
    return whole.removeprefix(before) if whole.startswith(before) else text(ids)


def _stopped_by(tokenizer: Any, stop: Sequence[str], width: int) -> Any:
    """A criterion of transformers: rows in whose last tokens, behind the prompt's `width`, one of the strings is."""
    from transformers import StoppingCriteria

    tail = max(map(len, stop)) + 2  # a token is at least one character, or joins two

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids[:, max(width, input_ids.shape[1] - tail) :])
            found = [any(word in text for word in stop) for text in texts]
            return torch.tensor(found, device=input_ids.device)

    return Stopped()


def text_before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the strings."""
    return text[: min([len(text), *(text.index(word) for word in stop if word in text)])]
