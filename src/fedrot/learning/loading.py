"""Loading a base model from a folder or a hub, and putting fresh adapters into it."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fedrot.core.errors import DataError, choices
from fedrot.core.seeding import seed_of
from fedrot.learning.fetch import fetched
from fedrot.learning.gguf import safetensors_of
from fedrot.learning.models import PEFT_NAME, ResidentModel
from fedrot.learning.settings import LoraSettings, ModelSettings


def model_path(settings: ModelSettings) -> str:
    """The folder or hub name that transformers is given."""
    if not settings.path:
        raise DataError("model.path: give a local folder, a hub name, or fetch:NAME (see `fedrot data`)")
    if settings.path.startswith("fetch:"):
        return str(safetensors_of(fetched(settings.path.removeprefix("fetch:"))))
    if Path(settings.path).is_file() and not settings.path.endswith(".gguf"):
        raise DataError(f"{settings.path}: this is a file; give the model's folder (model.path)")
    there = Path(settings.path).expanduser()
    if not there.exists() and (settings.path.startswith((".", "/", "~")) or settings.path.endswith(".gguf")):
        raise DataError(f"{settings.path}: no such model folder (model.path)")
    return str(safetensors_of(there)) if there.exists() else settings.path


def load_model(settings: ModelSettings, lora: LoraSettings, labels: Sequence[str], seed: int) -> ResidentModel:
    """Load base model and tokenizer and inject fresh adapters; factors and head start from `seed` alone.

    With labels it is a sequence classifier, without any a language model. Raises `DataError` naming the recipe key: a
    model that cannot be loaded, targets that it does not have.
    """
    from peft import get_peft_model
    from transformers.utils import logging as transformers_logging

    path = model_path(settings)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(), warnings.catch_warnings():
        # The libraries warn about each other's deprecations, which a user of fedrot can do nothing about.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT then sets what is right
        torch.manual_seed(seed_of(seed, "start"))
        base, tokenizer, missing = load_base(path, settings, labels)
        _check_targets(lora.targets, base, settings.path)
        try:
            model = get_peft_model(base, _config(lora, None if not labels else _fresh_modules(missing), bool(labels)))
        except ValueError as problem:
            raise DataError(
                f"lora.targets: {lora.targets or 'the default'} fits no layer of {settings.path} "
                f"({_first_line(problem)}); its linear layers are {choices(_linear_names(base))}"
            ) from None
        whole = settings.dtype == "float32" and settings.quantize is None
        resident = ResidentModel(model.float() if whole else _float_adapter(model), tokenizer)
    model.peft_config[PEFT_NAME].base_model_name_or_path = path
    model.peft_config[PEFT_NAME].revision = settings.revision
    return resident


def load_base(path: str, settings: ModelSettings, labels: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, names of tensors that the files lack and that were drawn) of a folder or a hub name."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    auto: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=settings.revision, trust_remote_code=False)
        base, loaded = auto.from_pretrained(
            path,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            output_loading_info=True,
            use_safetensors=True,  # nothing is unpickled, and no code of the model's own is run
            trust_remote_code=False,
            **(names if labels else {}),
            **_quantised(settings),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise DataError(f"{path}: the model cannot be loaded ({_first_line(problem)}); see model.path") from None
    missing = sorted(loaded["missing_keys"])
    _check_loaded(path, base, missing, tokenizer, fresh_head=bool(labels))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError(f"{path}: the tokenizer has neither a padding token nor one for the end of a text")
    base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer, missing


def _quantised(settings: ModelSettings) -> dict[str, Any]:
    """What from_pretrained needs for a base in 4 or 8 bits. `DataError` where that cannot be had."""
    if settings.quantize is None:
        return {}
    if not torch.cuda.is_available():
        raise DataError(f"model.quantize {settings.quantize}: PyTorch sees no GPU here; set it to null")
    from transformers import BitsAndBytesConfig

    if settings.quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": 0}}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )
    return {"quantization_config": four, "device_map": {"": 0}}


def _config(lora: LoraSettings, fresh: list[str] | None, classifier: bool) -> Any:
    """PEFT's settings; `fresh` are modules to train in full beside the classifier's head."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_rslora=lora.rslora,
        modules_to_save=fresh,
    )


def _check_loaded(path: str, base: Any, missing: Iterable[str], tokenizer: Any, fresh_head: bool) -> None:
    """Refuse what the library only warns of: parts of the base model that were not in the files and are random now.

    Fresh modules on top of a classifier, head and pooler, are what fine-tuning starts from; see `_fresh_modules`.
    """
    inside = f"{base.base_model_prefix}."
    absent = sorted(n for n in missing if not fresh_head or (n.startswith(inside) and ".pooler." not in n))
    if absent:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"{path}: {absent[0]}{others} cannot be found in the model's files; see model.path")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DataError(f"{path}: the tokenizer has no vocabulary, its files are missing; see model.path")
    if not fresh_head and tokenizer.eos_token_id is None:
        raise DataError(f"{path}: the tokenizer has no token for the end of a text; name its eos_token, see model.path")
    if beyond := _beyond(tokenizer, base.get_input_embeddings().num_embeddings):
        raise DataError(
            f"{path}: the tokenizer has {beyond[0]!r}, for which the model has no embedding: they belong to different "
            "models, or the model was not resized; see model.path"
        )


def _beyond(tokenizer: Any, rows: int) -> list[str]:
    """Tokens that have none of so many rows of embeddings. Marks that stand in no text, such as Gemma 3's for an image,
    need none; those that the tokenizer or a batch puts around texts do.
    """
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
    marks = set(tokenizer.all_special_tokens) - {getattr(tokenizer, name) for name in names}
    return sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows and token not in marks)


def _fresh_modules(missing: Iterable[str]) -> list[str] | None:
    """Modules that the files lack and that PEFT does not count as head by itself, such as a pooler: they are drawn from
    the seed, so they must be trained and saved with the adapter, or it would mean something else elsewhere.
    """
    modules = {name.rpartition(".")[0] for name in missing}
    return sorted(m for m in modules if not {"classifier", "score"} & set(m.split("."))) or None


def _check_targets(targets: Sequence[str] | None, base: nn.Module, path: str) -> None:
    """Refuse a target that names no linear layer: PEFT passes over it when another one fits."""
    names = [name for name, module in base.named_modules() if _is_linear(module)]
    strange = [t for t in targets or () if not any(name == t or name.endswith(f".{t}") for name in names)]
    if strange:
        raise DataError(
            f"lora.targets: {choices(strange)} fits no linear layer of {path}; those are {choices(_linear_names(base))}"
        )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _linear_names(base: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in base.named_modules() if _is_linear(module)}


def _float_adapter(model: nn.Module) -> nn.Module:
    """Factors and head in float32 over a half-precision base."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.float()
    return model


def _first_line(problem: BaseException) -> str:
    return str(problem).strip().splitlines()[0][:160] if str(problem).strip() else type(problem).__name__
