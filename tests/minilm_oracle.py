"""The MiniLM example's encoder in float64 NumPy, one sentence at a time, and a tiny random model of its kind.

Written from the published architecture: J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding" (2019), and for the pooling N. Reimers and I. Gurevych, "Sentence-BERT" (2019).
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file
from scipy.special import erf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import jax_qgemm as qg

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
}


def floats(tensors):
    """The tensors in float64; a QTensor's dense weight as a checkpoint has it, (n, k)."""
    return {
        name: np.asarray(t.dequantize().T if isinstance(t, qg.QTensor) else t, np.float64)
        for name, t in tensors.items()
    }


def embed(tensors, ids, heads, eps):
    """The embedding of one sentence, (d,), and the input (t, k) of every dense layer, by name.

    Args:
      tensors: as `floats` gives them.
      ids: the sentence's tokens, without padding.
    """
    inputs = {}

    def dense(name, x):
        inputs[name] = x
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + tensors["embeddings.token_type_embeddings.weight"][0])
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer."))
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            dense(f"{layer}.attention.self.{name}", x).reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))
        attended = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(x.shape)
        x = norm(f"{layer}.attention.output.LayerNorm", x + dense(f"{layer}.attention.output.dense", attended))
        hidden = dense(f"{layer}.intermediate.dense", x)
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", hidden))
    mean = x.mean(axis=0)
    return mean / np.sqrt(mean @ mean), inputs


def write_tiny_model(path, sentences):
    """A directory with a random model whose vocabulary is the letters and half of the words of the sentences."""
    words = sorted({word for s in sentences for word in s.lower().replace(".", " ").replace(",", " ").split()})
    letters = sorted(set("".join(sentences).lower()) - {" "})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary + words[::2]))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(CONFIG))

    rng = np.random.default_rng(0)
    d, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    tensors = {"embeddings.position_ids": np.arange(256)[None], "pooler.dense.weight": np.ones((d, d), np.float32)}

    def add(name, *shape, mean=0.0):
        tensors[name] = (mean + rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    def add_norm(name):
        add(f"{name}.weight", d, mean=1)
        add(f"{name}.bias", d)

    for name, rows in (("word", len(ids)), ("position", 256), ("token_type", 2)):
        add(f"embeddings.{name}_embeddings.weight", rows, d)
    add_norm("embeddings.LayerNorm")
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name, n, k in (
            *((f"attention.self.{part}", d, d) for part in ("query", "key", "value")),
            ("attention.output.dense", d, d),
            ("intermediate.dense", ffn, d),
            ("output.dense", d, ffn),
        ):
            add(f"{layer}.{name}.weight", n, k)
            add(f"{layer}.{name}.bias", n)
        add_norm(f"{layer}.attention.output.LayerNorm")
        add_norm(f"{layer}.output.LayerNorm")
    save_file(tensors, path / "model.safetensors")
