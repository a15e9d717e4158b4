"""An encoder's directory, read and written: config.json, tokenizer.json and safetensors, floats or GPTQ."""

import json
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from examples.minilm.model import Config, Encoder
from jax_qgemm.io import load_gptq, save_gptq

# Texts are cut here, as the model's sentence_bert_config.json has it.
_MAX_TOKENS = 256
# Batches are padded to multiples of this, so that few lengths are compiled.
_PAD_TOKENS = 16


def load(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a directory, and its config.json.

    Raises:
      FormatError: a damaged GPTQ checkpoint, see `load_gptq`.
      ValueError: config.json says another architecture.
      OSError: a file can't be read.
    """
    values = json.loads((path / "config.json").read_text())
    config = Config.from_json(values)
    tensors = load_gptq(path)[0] if "quantization_config" in values else load_file(path / "model.safetensors")
    used = {name: t for name, t in tensors.items() if name.startswith(("embeddings.", "encoder."))}
    used.pop("embeddings.position_ids", None)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(_MAX_TOKENS)
    tokenizer.enable_padding(pad_id=values["pad_token_id"], pad_to_multiple_of=_PAD_TOKENS)
    return Encoder(jax.device_put(used), tokenizer, config), values


def save(path: Path, encoder: Encoder, values: dict[str, Any]) -> None:
    """Writes an encoder with quantized dense layers as a GPTQ checkpoint; raises as `save_gptq` does."""
    save_gptq(path, encoder.tensors, values)
    encoder.tokenizer.save(str(path / "tokenizer.json"))
