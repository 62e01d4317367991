"""Writing on: many prompts at once, padded on the left, the likeliest token each time, with the key-value cache."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrot.learning.models import ResidentModel


def write_on(
    model: ResidentModel,
    prompts: Sequence[NDArray[np.int32]],  # tokens of each, at least one
    tokens: int,
    batch: int,
    precision: str = "fp32",
    stop: Sequence[str] = (),
) -> list[str]:
    """What the model writes after each prompt, in their order: up to the end of the text, `tokens` more tokens, or one
    of the strings `stop`, which is left out. A prompt that leaves too little of the context loses its beginning, see
    `cut_prompts`.
    """
    written = [""] * len(prompts)
    room = _room(model, tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        found = _batch(model, [prompts[i][-room:] if room else prompts[i] for i in places], tokens, precision, stop)
        for place, text in zip(places, found, strict=True):
            written[place] = text
    return written


def cut_prompts(model: ResidentModel, prompts: Sequence[NDArray[np.int32]], tokens: int) -> list[bool]:
    """Which prompts are longer than the context less `tokens` for the answer."""
    room = _room(model, tokens)
    return [room is not None and len(prompt) > room for prompt in prompts]


def warn_of_cut(cut: int, prompts: int) -> None:
    """Say in the log that so many prompts were cut, if any were."""
    if cut:
        logging.getLogger("fedrot").warning(
            "%d of %d prompts do not fit in the model's context beside evaluation.tokens, and lost their beginning",
            cut,
            prompts,
        )


def _room(model: ResidentModel, tokens: int) -> int | None:
    """The most tokens of a prompt; None where the model does not say."""
    longest = model.longest()
    return None if longest is None else max(1, longest - tokens)


def _batch(
    model: ResidentModel, prompts: Sequence[NDArray[np.int32]], tokens: int, precision: str, stop: Sequence[str]
) -> list[str]:
    from transformers import GenerationConfig, StoppingCriteriaList

    tokenizer = model.tokenizer
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    greedy = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad(), model.autocast(precision):
        found = model.model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            generation_config=greedy,
            stopping_criteria=StoppingCriteriaList([_stopped_by(tokenizer, stop, width)] if stop else []),
        )
    return [_before(tokenizer.decode(row, skip_special_tokens=True), stop) for row in found[:, width:].cpu()]


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


def _before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the strings."""
    return text[: min([len(text), *(text.index(word) for word in stop if word in text)])]
