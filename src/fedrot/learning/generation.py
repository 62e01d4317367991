"""Writing on: many prompts at once, padded on the left, the likeliest token each time, with the key-value cache."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedrot.learning.models import ResidentModel


def write_on(
    model: ResidentModel,
    prompts: Sequence[NDArray[np.int32]],  # tokens of each, at least one
    tokens: int,
    batch: int,
    precision: str = "fp32",
    stop: Sequence[str] = (),
) -> list[str]:
    """What the model writes after each prompt, in their order: up to the end of the text, `tokens` more tokens, or one of
    the strings `stop`, which is left out. A prompt that leaves too little of the model's context loses its beginning.
    """
    written = [""] * len(prompts)
    longest = model.longest()
    room = None if longest is None else max(1, longest - tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        found = _batch(model, [prompts[i][-room:] if room else prompts[i] for i in places], tokens, precision, stop)
        for place, text in zip(places, found, strict=True):
            written[place] = text
    return written


def _batch(
    model: ResidentModel, prompts: Sequence[NDArray[np.int32]], tokens: int, precision: str, stop: Sequence[str]
) -> list[str]:
    from transformers import GenerationConfig

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
        stop_strings=list(stop) or None,
    )
    with torch.no_grad(), model.autocast(precision):
        found = model.model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            generation_config=greedy,
            tokenizer=tokenizer if stop else None,
        )
    return [_before(tokenizer.decode(row, skip_special_tokens=True), stop) for row in found[:, width:].cpu()]


def _before(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the strings."""
    return text[: min([len(text), *(text.index(word) for word in stop if word in text)])]
