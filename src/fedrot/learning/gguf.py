"""GGUF files, as llama.cpp writes them: converted once to safetensors in the cache, in float32."""

import hashlib
import io
import logging
import shutil
import tempfile
import warnings
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from fedrot.core.errors import DataError
from fedrot.learning.fetch import cache_root


def safetensors_of(path: Path) -> Path:
    """The folder itself, or the folder of what a GGUF file was converted to: `path` is the file, or a folder that holds
    it and no model of another form.

    Raises `DataError` where the file cannot be converted or there are several.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files or (path / "config.json").exists():
            return path
        if len(files) > 1:
            raise DataError(f"{path}: holds {len(files)} GGUF files; give one of them as model.path")
        path = files[0]
    target = cache_root() / "gguf" / f"{path.stem}-{_digest(path)}"
    if not (target / "config.json").exists():
        _convert(path, target)
    return target


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _convert(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fedrot").warning("%s: converting it once, into %s", path, target)
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-"))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(redirect_stderr(io.StringIO()))  # a progress bar that cannot be switched off
        warnings.simplefilter("ignore")
        made = Path(work) / "model"
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except ImportError:
            raise DataError(f"{path}: reading GGUF files needs the package gguf; run: pip install gguf") from None
        except Exception as problem:  # the reader raises many kinds for a file that is damaged or of a strange kind
            reason = " ".join(str(problem).split())[:160] or type(problem).__name__
            raise DataError(f"{path}: cannot be converted from GGUF ({reason}); see model.path") from None
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not target.exists():  # another process may have been faster
            shutil.move(made, target)
