#include <algorithm>
#include <iterator>

#include "ffi/weight_check.h"
#include "formats/formats.cuh"

namespace jax_qgemm {
namespace ffi = xla::ffi;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("jax_qgemm: " + what); }

bool scalar_of(ffi::DataType type, Scalar* scalar) {
  switch (type) {
    case ffi::DataType::F16:
      *scalar = Scalar::kF16;
      return true;
    case ffi::DataType::BF16:
      *scalar = Scalar::kBF16;
      return true;
    case ffi::DataType::F32:
      *scalar = Scalar::kF32;
      return true;
    default:
      return false;
  }
}

namespace {

int64_t bits_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::U8:
      return 8;
    case ffi::DataType::U16:
      return 16;
    case ffi::DataType::U32:
      return 32;
    default:
      return 0;
  }
}

struct ExpectedPlane {
  int64_t bits, blocks, payload;
};

// What plane `i` of format F must look like.
template <class F>
ExpectedPlane expected_plane(int i, const WeightAttributes& a, int64_t k_block, int64_t blocks) {
  constexpr bool kInteger = F::kGroup == 0;
  const bool zero_points = i == static_cast<int>(std::size(F::kPlanes));
  const PlaneSpec spec = zero_points ? group_plane("zero_points", 8, 0) : F::kPlanes[i];
  if (spec.code) return {32, blocks, k_block * kTileN * spec.bits / 32};
  const int64_t group = kInteger ? a.group_size : spec.group;
  const bool wide = kInteger && !zero_points && a.scale_type == static_cast<int64_t>(ScaleType::kF32);
  return {wide ? 32 : spec.bits, group ? blocks : 1, kTileN * (group ? k_block / group : 1)};
}

template <class F>
ffi::Error check_planes(const ffi::RemainingArgs& planes, int count, const WeightAttributes& a, int64_t tile_rows,
                        int64_t k, Weight* w) {
  constexpr int kFixed = static_cast<int>(std::size(F::kPlanes));
  constexpr bool kInteger = F::kGroup == 0;
  if (count != kFixed && !(kInteger && count == kFixed + 1)) {
    return invalid("expected " + std::to_string(kFixed) + " planes, got " + std::to_string(count));
  }
  if (kInteger) {
    const int64_t g = a.group_size;
    if (g != 0 && (g < 16 || g > 256 || (g & (g - 1)) != 0)) return invalid("group_size " + std::to_string(g));
    if (a.scale_type < 0 || a.scale_type > 2) return invalid("scale_type " + std::to_string(a.scale_type));
  }
  const int64_t k_block = kInteger ? std::max<int64_t>(kTileK, a.group_size) : F::kKBlock;
  const int64_t blocks = (k + k_block - 1) / k_block;
  w->k_blocks = blocks;
  w->group = static_cast<int32_t>(a.group_size);
  w->scale_type = static_cast<ScaleType>(a.scale_type);
  for (int i = 0; i < kMaxPlanes; ++i) w->planes[i] = nullptr;
  for (int i = 0; i < count; ++i) {
    auto plane = planes.get<ffi::AnyBuffer>(i);
    if (!plane.has_value()) return plane.error();
    const ExpectedPlane expected = expected_plane<F>(i, a, k_block, blocks);
    const auto dims = plane->dimensions();
    const int64_t total = tile_rows * expected.blocks * expected.payload;
    if (bits_of(plane->element_type()) != expected.bits || dims.size() < 3 || dims.back() != expected.payload ||
        dims[dims.size() - 2] != expected.blocks || static_cast<int64_t>(plane->element_count()) != total) {
      return invalid("plane " + std::to_string(i) + " of format " + F::kName + " has the wrong shape or type");
    }
    if (reinterpret_cast<uintptr_t>(plane->untyped_data()) % 16 != 0) {
      return invalid("plane " + std::to_string(i) + " is not aligned to 16 bytes");
    }
    w->planes[i] = plane->untyped_data();
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::Error check_stack(const ffi::RemainingArgs& operands, int count, const WeightAttributes& a, int64_t batch,
                       int64_t tile_rows, int64_t k, Weight* w, Stack* stack) {
  *stack = {batch, nullptr};
  if (count > 1) {
    auto plane = operands.get<ffi::AnyBuffer>(0), last = operands.get<ffi::AnyBuffer>(static_cast<size_t>(count) - 1);
    if (!plane.has_value()) return plane.error();
    if (!last.has_value()) return last.error();
    if (last->element_type() == ffi::DataType::S32) {  // planes are unsigned
      if (plane->dimensions().size() != 4) return invalid("w with experts must have one axis of weights");
      if (static_cast<int64_t>(last->element_count()) != batch) {
        return invalid("experts must have one index for each entry of the batch");
      }
      *stack = {plane->dimensions()[0], static_cast<const int32_t*>(last->untyped_data())};
      if (stack->weights == 0 && batch != 0) return invalid("w with experts must hold a weight");
      if (reinterpret_cast<uintptr_t>(stack->experts) % 4 != 0) return invalid("experts are not aligned to 4 bytes");
      --count;
    }
  }
  ffi::Error error = ffi::Error::Success();
  const bool known = with_format(a.format, [&](auto format) {
    error = check_planes<decltype(format)>(operands, count, a, stack->weights * tile_rows, k, w);
  });
  return known ? error : invalid("unknown format " + std::string(a.format));
}

}  // namespace jax_qgemm
