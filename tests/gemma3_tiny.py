"""A tiny Gemma 3 with random weights, as GGUF tensors and metadata, and its forward pass in float64 NumPy."""

import jax.numpy as jnp
import numpy as np

import jax_qgemm as qg

TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581"]
TOKENS += [*"abcdefghijklmnopqrstuvwxyz", "th"]
VOCABULARY = len(TOKENS)  # 288
METADATA = {
    "general.architecture": "gemma3",
    "general.name": "tiny",
    "gemma3.context_length": 1024,
    "gemma3.block_count": 2,
    "gemma3.embedding_length": 64,
    "gemma3.feed_forward_length": 96,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 2,
    "gemma3.attention.key_length": 32,
    "gemma3.attention.value_length": 16,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 8,
    "gemma3.attention.sliding_window_pattern": 2,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
    "gemma3.final_logit_softcapping": 0.5,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [0.0] * VOCABULARY,
    "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[1] * 28],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_space_prefix": False,
}
_MATRICES = {  # name: (k, n, format), as llama.cpp mixes them
    "attn_q": (64, 128, "q4_0"),
    "attn_k": (64, 64, "q5_0"),
    "attn_v": (64, 32, "q8_0"),
    "attn_output": (64, 64, "q4_1"),
    "ffn_gate": (64, 96, "q4_0"),
    "ffn_up": (64, 96, "q5_1"),
    "ffn_down": (96, 64, "q8_0"),
}
_NORMS = {
    **{"attn_norm": 64, "attn_q_norm": 32, "attn_k_norm": 32, "post_attention_norm": 64},
    **{"ffn_norm": 64, "post_ffw_norm": 64},
}


def tensors(seed: int = 0, quantized: bool = True) -> dict:
    """The model's tensors as `load_gguf` gives them; unquantized, the same weights as float32 (n, k)."""
    rng = np.random.default_rng(seed)

    def matrix(k: int, n: int, format: str, scale: float = 1.0):
        w = qg.quantize(jnp.asarray(rng.standard_normal((k, n)) * scale * k**-0.5, jnp.float32), format)
        return w if quantized else w.dequantize(jnp.float32).T

    def norm(n: int):
        return jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32)

    # A small embedding, or the token itself would outweigh in the logits what the layers make of it.
    result = {"token_embd.weight": matrix(64, VOCABULARY, "q8_0", 0.2), "output_norm.weight": norm(64)}
    for i in range(METADATA["gemma3.block_count"]):
        result |= {f"blk.{i}.{name}.weight": matrix(*spec) for name, spec in _MATRICES.items()}
        result |= {f"blk.{i}.{name}.weight": norm(n) for name, n in _NORMS.items()}
    return result


def oracle_logits(tensors: dict, ids: list[int]) -> np.ndarray:
    """Logits (t, vocabulary) of the tiny model in float64: no cache, every pair of tokens one by one."""
    w = {
        name.removesuffix(".weight"): np.asarray(
            t.dequantize(jnp.float32) if isinstance(t, qg.QTensor) else (t.T if t.ndim == 2 else t),
            np.float64,
        )
        for name, t in tensors.items()
    }

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def rotate(x, base, scale):  # (t, heads, d)
        out, half = np.empty_like(x), x.shape[-1] // 2
        for position in range(x.shape[0]):
            for i in range(half):
                angle = position * scale * base ** (-i / half)
                c, s = np.cos(angle), np.sin(angle)
                a, b = x[position, :, i], x[position, :, i + half]
                out[position, :, i], out[position, :, i + half] = a * c - b * s, a * s + b * c
        return out

    t = len(ids)
    x = w["token_embd"].T[ids] * 8.0
    for layer in range(2):
        p = f"blk.{layer}."
        sliding = layer == 0
        rope = (1e4, 1.0) if sliding else (1e6, 1 / 8)
        h = norm(x, w[p + "attn_norm"])
        q = norm((h @ w[p + "attn_q"]).reshape(t, 4, 32), w[p + "attn_q_norm"])
        k = norm((h @ w[p + "attn_k"]).reshape(t, 2, 32), w[p + "attn_k_norm"])
        v = (h @ w[p + "attn_v"]).reshape(t, 2, 16)
        q, k = rotate(q, *rope), rotate(k, *rope)
        attended = np.zeros((t, 4, 16))
        for i in range(t):
            first = max(0, i - 7) if sliding else 0
            for head in range(4):
                scores = k[first : i + 1, head // 2] @ q[i, head] / np.sqrt(32)
                e = np.exp(scores - scores.max())
                attended[i, head] = (e / e.sum()) @ v[first : i + 1, head // 2]
        x = x + norm(attended.reshape(t, 64) @ w[p + "attn_output"], w[p + "post_attention_norm"])
        h = norm(x, w[p + "ffn_norm"])
        gate = h @ w[p + "ffn_gate"]
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm((gate * (h @ w[p + "ffn_up"])) @ w[p + "ffn_down"], w[p + "post_ffw_norm"])
    output = w.get("output", w["token_embd"])
    return 0.5 * np.tanh(norm(x, w["output_norm"]) @ output / 0.5)
