"""An adapter put into its base model for good: a plain model folder, for servers that take no adapters."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedrot.core.adapter import Adapter
from fedrot.core.errors import DataError
from fedrot.learning.loading import load_base, model_path
from fedrot.learning.settings import ModelSettings

# The modules that give a classifier's logits, as transformers names them; a pooler or a pre_classifier, trained beside
# them, is none.
_OUTPUTS = {"classifier", "score", "classification_head"}


def merge_into_base(folder: Path, out: Path, base: str | None = None) -> None:
    """Write base model, with the adapter in `folder` merged into its weights, and tokenizer to `out` in float32.

    `base` is the base model's folder or hub name; None: the one that the adapter names, in the revision that it names.
    Raises `DataError` where it cannot be loaded or the adapter does not fit.
    """
    from peft import PeftModel

    adapter = Adapter.load(folder)
    named = base or str(adapter.config.get("base_model_name_or_path") or "")
    if not named:
        raise DataError(f"{folder}: does not name its base model; give it by --base")
    revision = None if base else adapter.config.get("revision")
    settings = ModelSettings(path=named, revision=str(revision) if revision else None)
    labels = [f"LABEL_{i}" for i in range(_labels(adapter.head))]
    with torch.random.fork_rng():
        model, tokenizer, _ = load_base(model_path(settings), settings, labels)
    strange = sorted(set(adapter.layers) - {name for name, _ in model.named_modules()})
    if strange:
        raise DataError(f"{folder}: {named} has no layer {strange[0]!r}; give the right base model by --base")
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as problem:
        raise DataError(f"{folder}: does not fit {named} ({str(problem).splitlines()[0][:160]})") from None
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _labels(head: Mapping[str, Tensor]) -> int:
    """The labels of a classifier: the rows of its output's last weight; 0 of a language model, which has no head."""
    output = [t for name, t in head.items() if _OUTPUTS & set(name.split(".")) and t.ndim == 2]
    return output[-1].shape[0] if output else 0
