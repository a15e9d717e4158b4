"""The mutants of mutants.py: an exact text of a source file that occurs in it once, and what replaces it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    what: str
    path: str
    old: str
    new: str


_SHARED_MUTANTS = (
    # Decoders, shared by the CPU and the CUDA kernels.
    Mutant(
        "code-field",
        "the fields of a word of codes are read from the wrong end",
        "cuda/formats/tile_codes.cuh",
        ">> (Bits * (run % kFields))",
        ">> (Bits * (kFields - 1 - run % kFields))",
    ),
    Mutant(
        "row-pair",
        "per-group values of rows g and g+8 are exchanged",
        "cuda/formats/format.cuh",
        "p = {{values[0], values[1]}};",
        "p = {{values[1], values[0]}};",
    ),
    Mutant(
        "f16-subnormal",
        "a subnormal float16 scale becomes zero",
        "cuda/formats/format.cuh",
        "(is_subnormal & subnormal_bits)",
        "(is_subnormal & 0u)",
    ),
    Mutant(
        "q4_1-minimum",
        "q4_1 loses its minimum",
        "cuda/formats/legacy.cuh",
        "if constexpr (HasMinimum) m =",
        "if constexpr (HasMinimum && HighBits != 0) m =",
    ),
    Mutant(
        "k-quant-minimum-sign",
        "the minimum of q4_k and q5_k is added instead of subtracted, in half of the rows",
        "cuda/formats/k_quant.cuh",
        "-minimum.v[1]",
        "minimum.v[1]",
    ),
    Mutant(
        "q2_k-nibbles",
        "the sub-minimum of q2_k is its sub-scale's nibble",
        "cuda/formats/q2_k.cuh",
        "products<uint8_t, 0, 4, 15>",
        "products<uint8_t, 0, 0, 15>",
    ),
    Mutant(
        "q6_k-scale-sign",
        "the sub-scales of q6_k are read as unsigned",
        "cuda/formats/q6_k.cuh",
        "scaled<int8_t, 0, kZero>",
        "scaled<uint8_t, 0, kZero>",
    ),
    Mutant(
        "mxfp4-subnormal",
        "the subnormal scales of mxfp4 are too small",
        "cuda/formats/mxfp4.cuh",
        "(twice >> 2) + 0x200000",
        "(twice >> 2) + 0x100000",
    ),
    Mutant(
        "nvfp4-nan",
        "the NaN of nvfp4's scales decodes as a number",
        "cuda/formats/nvfp4.cuh",
        "is_number = 0u - (s != 0x7f)",
        "is_number = ~0u",
    ),
    Mutant(
        "int-zero",
        "symmetric integers are off by one",
        "cuda/formats/integer.cuh",
        "int zero[2] = {kZero, kZero};",
        "int zero[2] = {kZero - 1, kZero - 1};",
    ),
    Mutant(
        "bf16-scale-as-f16",
        "bfloat16 scales of integers are read as float16",
        "cuda/formats/integer.cuh",
        "w.scale_type == ScaleType::kF16 ?",
        "w.scale_type != ScaleType::kF32 ?",
    ),
    # Kernels of the CPU.
    Mutant(
        "nibbles",
        "low and high nibbles are exchanged",
        "cuda/host/decode.h",
        "out[0][j] = v & kMask;\n      out[1][j] = v >> 4 & kMask;",
        "out[1][j] = v & kMask;\n      out[0][j] = v >> 4 & kMask;",
    ),
    Mutant(
        "high-bits",
        "the high bits of 3-, 5- and 6-bit codes are dropped",
        "cuda/host/decode.h",
        "codes[h][j] |= high[h][j] << F::kLowBits;",
        "codes[h][j] |= high[h][j] & 0;",
    ),
    Mutant(
        "scale-index",
        "every group takes the scale of the next one of its block",
        "cuda/host/decode.h",
        "((row + g) * kGroups + j) * 2",
        "((row + g) * kGroups + (j + 1) % kGroups) * 2",
    ),
    Mutant(
        "last-k-slab",
        "the last, partial slab of k is dropped",
        "cuda/host/matmul_kernels.h",
        "first < tiles; first += slab_tiles",
        "first == 0 || first + slab_tiles <= tiles; first += slab_tiles",
    ),
    Mutant(
        "k-tail",
        "the last element of an odd k is dropped",
        "cuda/host/matmul_kernels.h",
        "rest < kTileK ? rest : kTileK",
        "rest < kTileK ? rest / 2 * 2 : kTileK",
    ),
    Mutant(
        "tail-column",
        "the last column of a partial tile is zero",
        "cuda/host/epilogue.h",
        "  from_f32(columns,",
        "  if (tile.count < kTileN) columns[tile.count - 1] = 0;\n  from_f32(columns,",
    ),
    Mutant(
        "bias-scale",
        "the bias is multiplied by the global scale too",
        "cuda/host/epilogue.h",
        "tile.scale * sum_lanes(part) + tile.bias[j]",
        "tile.scale * (sum_lanes(part) + tile.bias[j])",
    ),
    Mutant(
        "bias-batch",
        "every weight of a batch has the bias of the first",
        "cuda/host/epilogue.h",
        "batch * e.bias_stride + column",
        "column",
    ),
    Mutant(
        "gate-is-up",
        "a gated product activates what the gate opens instead of the gate",
        "cuda/host/epilogue.h",
        "if (!is_up) values[j] = activate",
        "if (!is_gate) values[j] = activate",
    ),
    Mutant(
        "m-tail",
        "of two rows of x left over one is computed",
        "cuda/host/matmul_kernels.h",
        "std::integral_constant<int, 2>{}",
        "std::integral_constant<int, 1>{}",
    ),
    Mutant(
        "transposed-n-tail",
        "the transposed product drops the last tile row of an odd number",
        "cuda/host/matmul_kernels.h",
        "for (int64_t row = 0; row < p.tile_rows(); row += kSpanRows / kTileN) {",
        "for (int64_t row = 0; row + 1 < p.tile_rows(); row += kSpanRows / kTileN) {",
    ),
    Mutant(
        "batch",
        "every weight of a batch is the first",
        "cuda/host/matmul_kernels.h",
        "const int64_t tile_row = first_row + row;",
        "const int64_t tile_row = row;",
    ),
    Mutant(
        "expert-out-of-range",
        "an index beyond the last expert is the first",
        "cuda/kernels/product.h",
        "expert < weights ? expert : weights - 1",
        "expert < weights ? expert : 0",
    ),
    Mutant(
        "token-groups",
        "rows of x beyond the first chunk of rows are those of the first",
        "cuda/host/matmul.cc",
        "&x_[(entry * pass.tokens + token) * stride_]",
        "&x_[entry * pass.tokens * stride_]",
    ),
    Mutant(
        "bf16-rounding",
        "bfloat16 results are truncated instead of rounded",
        "cuda/host/scalars.h",
        "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
        "bits >> 16",
    ),
)

CUDA_MUTANTS = (
    Mutant(
        "a8-code-order",
        "lanes of gemm_sm90_a8 take the codes that the lanes beside them multiply",
        "cuda/tile/code_operand.cuh",
        "0x6420 : 0x7531",
        "0x7531 : 0x6420",
    ),
    Mutant(
        "a8-zero-points",
        "rows g+8 of gemm_sm90_a8 have the zero points of rows g",
        "cuda/tile/code_operand.cuh",
        "X::high(word, zeros[1])",
        "X::high(word, zeros[0])",
    ),
    Mutant(
        "a8-float8-negative",
        "negative weights are one step off as float8 operands",
        "cuda/tile/code_operand.cuh",
        "+ one + sign",
        "+ sign",
    ),
    Mutant(
        "a8-token-scales",
        "odd rows of x have the scales of the even ones before them",
        "cuda/kernels/gemm_sm90_a8.cuh",
        "*= scale[i % 2]",
        "*= scale[0]",
    ),
    Mutant(
        "a8-token-scales-batch",
        "every batch of x has the scales of the first",
        "cuda/kernels/gemm_sm90_a8.cuh",
        "p.x_scales + batch * p.m + first",
        "p.x_scales + first",
    ),
    Mutant(
        "a8-split-tokens",
        "where two thread blocks split k, both store the first half of the rows of x",
        "cuda/kernels/gemm_sm90_a8.cuh",
        "token += rank * (Tokens / 2);",
        "token += 0;",
    ),
    Mutant(
        "a8-group-sums",
        "a group's sum of gemm_sm90_a8 begins with that of the group before it",
        "cuda/kernels/gemm_sm90_a8.cuh",
        "wgmma8<X, false>(exact[part]",
        "wgmma8<X>(exact[part]",
    ),
    Mutant(
        "a8-symmetric",
        "without zero points, rows g of gemm_sm90_a8 have the codes of rows g+8",
        "cuda/tile/code_operand.cuh",
        "high(word << 4, 0)",
        "high(word, 0)",
    ),
    Mutant(
        "a8-int32-sums",
        "sums of int8 codes may leave int32",
        "cuda/kernels/gemm_sm90_a8_launch.cuh",
        "p.k > kMaxSum / (127 << F::kLowBits)",
        "p.k > kMaxSum",
    ),
)

MUTANTS = (*_SHARED_MUTANTS, *CUDA_MUTANTS)
