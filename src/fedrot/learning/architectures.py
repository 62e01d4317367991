"""The base models whose examples can be packed into one row, and how each reads an example.

An encoder's head looks at the first token of an example, a decoder's classifier at the last one that is no padding, a
language model at every token before one that it is to write. A model that is not listed here works as well, from padded
batches. To list one, name it here: the tests compare every listed one
with its padded logits.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from fedrot.learning.packing import ATTENTION, Packing, register

_DECODERS = ("gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3")


def _bert_head(model: Any, read: Tensor) -> Tensor:
    pooled = model.bert.pooler(read[:, None])
    return model.classifier(model.dropout(pooled))


def _roberta_head(model: Any, read: Tensor) -> Tensor:
    return model.classifier(read[:, None])


def _decoder_head(model: Any, read: Tensor) -> Tensor:
    return model.score(read)


# transformers' model type -> (n, hidden) of the tokens that are read -> (n, labels)
_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": _bert_head,
    **dict.fromkeys(("camembert", "roberta", "xlm-roberta"), _roberta_head),
    **dict.fromkeys(_DECODERS, _decoder_head),
}
PACKABLE = tuple(sorted(_HEADS))


def packable(model: Any) -> bool:
    """Whether this model's examples can be packed."""
    config = model.config
    # A window would have to be kept within each example.
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return config.model_type in _HEADS and not windowed


def first_position(model: Any) -> int:
    """The position of an example's first token: RoBERTa and its kin count from behind the padding index that their
    table of positions has.
    """
    embeddings = getattr(getattr(model, model.base_model_prefix, None), "embeddings", None)
    index = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if index is None else int(index) + 1


def reads_last(model: Any) -> bool:
    """Whether an example is read at its last token instead of its first."""
    return model.config.model_type in _DECODERS


def packed_logits(
    model: Any,
    tokens: Tensor,  # (T)
    segments: Tensor | None,  # (T)
    positions: Tensor,  # (T)
    read: Tensor,  # (n) the token of each example that its head looks at
    packing: Packing,
) -> Tensor:  # (n, labels)
    """A classifier's logits for n examples in a row of T tokens without padding."""
    return _HEADS[model.config.model_type](model, packed_states(model, tokens, segments, positions, read, packing))


def packed_states(
    model: Any,
    tokens: Tensor,  # (T)
    segments: Tensor | None,  # (T)
    positions: Tensor,  # (T)
    read: Tensor,  # (U)
    packing: Packing,
) -> Tensor:  # (U, hidden)
    """What the layers make of the tokens that are read, in a row of T tokens without padding."""
    base = getattr(model, model.base_model_prefix)
    inputs = {"input_ids": tokens[None], "position_ids": positions[None]}
    if segments is not None:
        inputs["token_type_ids"] = segments[None]
    extra = {"use_cache": False} if reads_last(model) else {}
    register()
    usual = model.config._attn_implementation
    last = None if reads_last(model) else base.encoder.layer[-1].attention.output
    model.config._attn_implementation = ATTENTION
    try:
        with _Only(last, read) if last is not None else nullcontext():
            hidden = base(**inputs, packing=packing, **extra).last_hidden_state[0]
    finally:
        model.config._attn_implementation = usual
    return hidden if last is not None else hidden[read]


class _Only:
    """After the last attention, what follows works on the tokens that are read: no other one is looked at again."""

    def __init__(self, last: nn.Module, read: Tensor) -> None:
        self._handle = last.register_forward_pre_hook(
            lambda _, inputs: tuple(t.index_select(1, read) for t in inputs), prepend=True
        )

    def __enter__(self) -> None:
        """Nothing is left to do."""

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
