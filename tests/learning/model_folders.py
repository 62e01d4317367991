"""Tiny random models of many architectures, saved as transformers saves them, with the tiny model's tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch

from fedrot.learning.architectures import PACKABLE

ENCODER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
GROUPED = ENCODER | {"num_key_value_heads": 2}
# kind -> what its configuration needs
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta", "phi", "gpt_neox"), ENCODER),
    **dict.fromkeys(("llama", "phi3", "qwen2", "smollm3"), GROUPED),
    "mistral": GROUPED | {"sliding_window": None},
    **dict.fromkeys(("gemma", "qwen3"), GROUPED | {"head_dim": 8}),
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
}
ENCODERS = ("bert", "camembert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "electra", "mpnet")
DECODERS = tuple(kind for kind in PACKABLE if kind not in ENCODERS)


def write_model(
    folder: Path, kind: str, tiny_model: Path, pooler: bool = True, causal: bool = False, **config: Any
) -> Path:
    """A random model of this kind, with an output layer if it is to be `causal`; decoders have no padding token."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    decoder = kind in DECODERS
    marks = {"eos_token": "[SEP]", "pad_token": None} if decoder else {}
    names = ["input_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, model_input_names=names, **marks)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 2, "eos_token_id": 3}
    made = AutoConfig.for_model(kind, vocab_size=len(tokenizer), max_position_embeddings=80, **ids, **config)
    base = (AutoModelForCausalLM if causal else AutoModel).from_config(made)
    if not pooler:
        base.pooler = None
    base.save_pretrained(folder)
    assert (json.loads((folder / "tokenizer_config.json").read_text()).get("pad_token") is None) == decoder
    return folder
