// From XLA's buffers to a Weight: everything that a kernel relies on is checked here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/product.h"
#include "xla/ffi/api/ffi.h"

namespace jax_qgemm {

struct WeightAttributes {
  std::string_view format;
  int64_t group_size;  // integer formats: elements of k per scale, 0 is per channel
  int64_t scale_type;  // integer formats: a ScaleType
};

xla::ffi::Error invalid(const std::string& what);

// False: not one of the types of a Scalar.
bool scalar_of(xla::ffi::DataType type, Scalar* scalar);

// Fills `w` and `stack` from the first `count` of `operands`: planes, of `tile_rows` rows of tiles a weight, and behind
// them perhaps an int32 array, the experts. Without it the planes have the axes of the batch, with it one of their own.
xla::ffi::Error check_stack(const xla::ffi::RemainingArgs& operands, int count, const WeightAttributes& attributes,
                            int64_t batch, int64_t tile_rows, int64_t k, Weight* w, Stack* stack);

}  // namespace jax_qgemm
