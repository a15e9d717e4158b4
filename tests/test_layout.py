"""The kernel layout against loops written from its definition and from the PTX ISA's fragment of
mma.m16n8k16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_qgemm.formats import GGUF_FORMATS, CodePlane, Format, QTensor, int2, int3, int4, int8, layout

FORMATS: tuple[Format, ...] = (
    *GGUF_FORMATS.values(),
    int2(16),
    int3(32, symmetric=False),
    int4(128, symmetric=False, scale_dtype="float32"),
    int8(256),
    int4(-1, symmetric=False, scale_dtype="bfloat16"),
)

pack_codes = jax.jit(layout.pack_codes, static_argnums=(1, 2, 3))
unpack_codes = jax.jit(layout.unpack_codes, static_argnums=(1, 2, 3))


def packed_by_loops(codes: np.ndarray, bits: int, shift: int, k_block: int) -> np.ndarray:
    """Run 2s+h of lane 4g+t holds, in bytes e = 0..3, row g+8h and k = 16s + 2t + (e >> 1) + 8 (e & 1);
    fields of `bits` bits hold one run each, 8/bits runs a word, up to four words of a lane together."""
    n, k = codes.shape
    fields = 8 // bits
    lane_words = 8 // fields
    vector = min(lane_words, 4)
    tile_words = 32 * lane_words
    out = np.zeros((n // 16, k // k_block, k_block // 64 * tile_words), np.uint32)
    for row in range(n):
        for column in range(k):
            tile, in_tile = divmod(row, 16)
            h, g = divmod(in_tile, 8)
            block, in_block = divmod(column, k_block)
            tile_k, in_tile_k = divmod(in_block, 64)
            s, j = divmod(in_tile_k, 16)
            t, e = (j % 8) // 2, 2 * (j % 2) + j // 8
            run, lane = 2 * s + h, 4 * g + t
            word = run // fields
            at = tile_k * tile_words + word // vector * 32 * vector + lane * vector + word % vector
            value = (int(codes[row, column]) >> shift) & ((1 << bits) - 1)
            out[tile, block, at] |= np.uint32(value << (8 * e + bits * (run % fields)))
    return out


@pytest.mark.parametrize("k_block", [64, 256])
@pytest.mark.parametrize(("bits", "shift"), [(1, 0), (1, 2), (1, 4), (2, 0), (2, 4), (4, 0), (8, 0)])
def test_codes_are_where_the_definition_puts_them(bits, shift, k_block):
    codes = np.random.default_rng(bits).integers(0, 256, (16, 256), dtype=np.uint8)
    packed = pack_codes(codes, bits, shift, k_block)
    np.testing.assert_array_equal(packed, packed_by_loops(codes, bits, shift, k_block))
    mask = ((1 << bits) - 1) << shift
    np.testing.assert_array_equal(unpack_codes(packed, bits, shift, k_block), codes & mask)


def test_four_bit_words_are_mma_fragments():
    """(word >> 4i) & 0x000f000f is register i of the A fragment of k-step s (PTX ISA, mma.m16n8k16, .f16):
    the row is g for registers 0 and 2, g + 8 for 1 and 3; the column is 2t, and 8 more for registers 2 and 3;
    the upper half is the next column."""
    codes = np.random.default_rng(0).integers(0, 16, (16, 64), dtype=np.uint8)
    words = np.asarray(pack_codes(codes, 4, 0, 64)).reshape(32, 4)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for s in range(4):
            for i in range(4):
                register = (int(words[lane, s]) >> (4 * i)) & 0x000F000F
                row, column = g + 8 * (i % 2), 16 * s + 2 * t + 8 * (i // 2)
                assert register & 0xFFFF == codes[row, column]
                assert register >> 16 == codes[row, column + 1]


def test_nibbles_are_in_the_order_of_the_design():
    """Nibbles 0-7 of word s: rows g and g + 8 in turn, k = 16s + 2t + (0, 0, 8, 8, 1, 1, 9, 9)."""
    codes = np.random.default_rng(1).integers(0, 16, (16, 64), dtype=np.uint8)
    words = np.asarray(pack_codes(codes, 4, 0, 64)).reshape(32, 4)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for s in range(4):
            for nibble, offset in enumerate((0, 0, 8, 8, 1, 1, 9, 9)):
                expected = codes[g + 8 * (nibble % 2), 16 * s + 2 * t + offset]
                assert (int(words[lane, s]) >> (4 * nibble)) & 15 == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize(("blocks", "groups"), [(1, 1), (3, 1), (2, 4), (1, 16)])
def test_groups_keep_rows_g_and_g8_side_by_side(dtype, blocks, groups):
    values = np.random.default_rng(2).integers(0, 200, (48, blocks * groups)).astype(dtype)
    expected = np.zeros((3, blocks, 16 * groups), dtype)
    for row in range(48):
        for group in range(blocks * groups):
            h, g = divmod(row % 16, 8)
            expected[row // 16, group // groups, g * 2 * groups + group % groups * 2 + h] = values[row, group]
    packed = layout.pack_groups(jnp.asarray(values), blocks)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(layout.unpack_groups(packed), values)


@pytest.mark.parametrize("shape", [(2, 3)])
def test_batch_axes_are_packed_alike(shape):
    codes = np.random.default_rng(3).integers(0, 256, (*shape, 16, 128), dtype=np.uint8)
    packed = np.asarray(pack_codes(codes, 2, 0, 128))
    for index in np.ndindex(*shape):
        np.testing.assert_array_equal(packed[index], packed_by_loops(codes[index], 2, 0, 128))
    np.testing.assert_array_equal(unpack_codes(packed, 2, 0, 128), codes & 3)


def random_fields(format: Format, n: int, k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n + k)
    fields = {"codes": rng.integers(0, 1 << format.code_bits, (n, k), dtype=np.uint8)}
    for plane in format.planes:
        if not isinstance(plane, CodePlane):
            top = np.iinfo(plane.dtype).max
            columns = k // plane.group if plane.group else 1
            fields[plane.name] = rng.integers(0, top, (n, columns), dtype=plane.dtype, endpoint=True)
    return fields


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_planes_round_trip_and_padding_is_zero(format):
    n, k = 37, 3 * (64 if format.block == 1 else format.block)
    n_padded, k_padded = layout.round_up(n, 16), layout.round_up(k, format.k_block)
    fields = random_fields(format, n, k)
    rows = np.random.default_rng(0).integers(0, n, (2, 5))

    @jax.jit
    def through_planes(fields, rows):
        planes = format.to_planes(fields)
        padded = format.from_planes(planes, n_padded, k_padded)
        return planes, format.from_planes(planes, n, k), padded, format.take_rows(planes, rows, k)

    planes, unpacked, padded, taken = through_planes(fields, rows)
    for plane, array in zip(format.planes, planes, strict=True):
        assert array.shape == format.plane_shape(plane, n, k)
        assert array.dtype == format.plane_dtype(plane)
        assert array.shape[-1] * array.dtype.itemsize % 16 == 0
    assert unpacked.keys() == taken.keys() == fields.keys()
    for name, expected in fields.items():
        np.testing.assert_array_equal(unpacked[name], expected, err_msg=name)
        np.testing.assert_array_equal(taken[name], expected[rows], err_msg=name)
        assert not np.asarray(padded[name])[n:].any(), name
        assert not np.asarray(padded[name])[:, expected.shape[-1] :].any(), name
    w = QTensor(planes, format, (k_padded - k, n_padded - n))
    assert w.shape == (k, n)
