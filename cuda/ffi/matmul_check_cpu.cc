#include <algorithm>
#include <utility>

#include "ffi/matmul_check.h"
#include "ffi/weight_check.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

// The product alone, of x whose type is known: the first `count` operands are the planes of w and perhaps experts, and
// w has `gate` times the columns of out.
ffi::Error fill(ffi::AnyBuffer x, const ffi::RemainingArgs& operands, int count, ffi::Result<ffi::AnyBuffer> out,
                const MatmulAttributes& a, bool transpose, int gate, Product* p) {
  const auto x_dims = x.dimensions(), out_dims = out->dimensions();
  if (!scalar_of(out->element_type(), &p->out_type)) return invalid("out must be f16, bf16 or f32");
  const size_t rank = x_dims.size();
  if (a.batch_ndim < 0 || rank < static_cast<size_t>(a.batch_ndim) + 1 || out_dims.size() != rank) {
    return invalid("x and out must have the same rank, of at least batch_ndim + 1");
  }
  p->batch = p->m = 1;
  for (size_t i = 0; i + 1 < rank; ++i) {
    if (x_dims[i] != out_dims[i]) return invalid("the leading axes of x and out differ");
    (i < static_cast<size_t>(a.batch_ndim) ? p->batch : p->m) *= x_dims[i];
  }
  p->k = transpose ? out_dims[rank - 1] : x_dims[rank - 1];
  p->n = transpose ? x_dims[rank - 1] : out_dims[rank - 1] * gate;
  p->format = a.format;
  p->kernel = a.kernel;
  p->transpose = transpose;
  p->highest = a.highest;
  p->x = x.untyped_data();
  p->x_scales = nullptr;
  p->out = out->untyped_data();
  p->epilogue = {};
  const WeightAttributes weight{a.format, a.group_size, a.scale_type};
  return check_stack(operands, count, weight, p->batch, p->tile_rows(), p->k, &p->w, &p->stack);
}

bool activation_of(std::string_view name, Activation* activation) {
  constexpr std::pair<std::string_view, Activation> kNames[] = {{"none", Activation::kNone},
                                                                {"silu", Activation::kSilu},
                                                                {"gelu", Activation::kGelu},
                                                                {"gelu_tanh", Activation::kGeluTanh},
                                                                {"relu", Activation::kRelu}};
  for (const auto& [known, value] : kNames) {
    if (name == known) {
      *activation = value;
      return true;
    }
  }
  return false;
}

using Dims = ffi::Span<const int64_t>;

bool starts_with(Dims dims, Dims start, size_t count) {
  return dims.size() >= count && start.size() >= count &&
         std::equal(start.begin(), start.begin() + count, dims.begin());
}

// Operand `i`, a float array aligned to its elements.
ffi::Error float_operand(const ffi::RemainingArgs& operands, size_t i, const std::string& name, Scalar* type,
                         const void** data, Dims* dims) {
  auto operand = operands.get<ffi::AnyBuffer>(i);
  if (!operand.has_value()) return operand.error();
  if (!scalar_of(operand->element_type(), type)) return invalid(name + " must be f16, bf16 or f32");
  *data = operand->untyped_data();
  *dims = operand->dimensions();
  if (reinterpret_cast<uintptr_t>(*data) % (*type == Scalar::kF32 ? 4 : 2) != 0) {
    return invalid(name + " is not aligned to its elements");
  }
  return ffi::Error::Success();
}

// The product with its epilogue, of x whose type is known: the last of the operands are those of the epilogue.
ffi::Error fill_fused(ffi::AnyBuffer x, const ffi::RemainingArgs& operands, ffi::Result<ffi::AnyBuffer> out,
                      const MatmulAttributes& a, const EpilogueAttributes& e, Product* p) {
  const int count = static_cast<int>(operands.size()) - e.has_scale - e.has_bias - e.has_residual;
  if (ffi::Error error = fill(x, operands, count, out, a, false, e.gated ? 2 : 1, p); error.failure()) return error;
  p->epilogue.gated = e.gated;
  if (!activation_of(e.activation, &p->epilogue.activation)) {
    return invalid("unknown activation " + std::string(e.activation));
  }
  if (e.gated && p->n % (2 * kTileN) != 0) return invalid("gated, w must have a multiple of 32 columns");

  const Dims out_dims = out->dimensions();
  const auto batch_ndim = static_cast<size_t>(a.batch_ndim);
  Dims dims;
  auto i = static_cast<size_t>(count);
  if (e.has_scale) {
    Scalar type;
    const void* scale;
    if (ffi::Error error = float_operand(operands, i++, "global_scale", &type, &scale, &dims); error.failure()) {
      return error;
    }
    if (type != Scalar::kF32 ||
        (dims.size() != 0 && (dims.size() != batch_ndim || !starts_with(out_dims, dims, batch_ndim)))) {
      return invalid("global_scale must be f32, of no axes or of the batch axes");
    }
    p->epilogue.scale = static_cast<const float*>(scale);
    p->epilogue.scale_stride = dims.size() != 0;
  }
  if (e.has_bias) {
    ffi::Error error = float_operand(operands, i++, "bias", &p->epilogue.bias_type, &p->epilogue.bias, &dims);
    if (error.failure()) return error;
    const bool batched = dims.size() == batch_ndim + 1 && starts_with(out_dims, dims, batch_ndim);
    if ((dims.size() != 1 && !batched) || dims.back() != p->n) {
      return invalid("bias must have the shape (n,) or (*batch, n)");
    }
    p->epilogue.bias_stride = batch_ndim != 0 && batched ? p->n : 0;
  }
  if (e.has_residual) {
    ffi::Error error =
        float_operand(operands, i++, "residual", &p->epilogue.residual_type, &p->epilogue.residual, &dims);
    if (error.failure()) return error;
    if (dims.size() != out_dims.size() || !starts_with(out_dims, dims, dims.size())) {
      return invalid("residual must have the shape of out");
    }
  }
  return ffi::Error::Success();
}

constexpr const char* kFloatX = "x must be f16, bf16 or f32";

}  // namespace

ffi::Error make_product(ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> out,
                        const MatmulAttributes& a, bool transpose, Product* p) {
  if (!scalar_of(x.element_type(), &p->x_type)) return invalid(kFloatX);
  return fill(x, operands, static_cast<int>(operands.size()), out, a, transpose, 1, p);
}

ffi::Error make_fused_product(ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> out,
                              const MatmulAttributes& a, const EpilogueAttributes& e, Product* p) {
  if (!scalar_of(x.element_type(), &p->x_type)) return invalid(kFloatX);
  return fill_fused(x, operands, out, a, e, p);
}

ffi::Error make_integer_product(ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::RemainingArgs operands,
                                ffi::Result<ffi::AnyBuffer> out, const MatmulAttributes& a, const EpilogueAttributes& e,
                                Product* p) {
  const ffi::DataType type = codes.element_type();
  if (type != ffi::DataType::S8 && type != ffi::DataType::F8E4M3FN) return invalid("codes must be s8 or f8e4m3fn");
  p->x_type = type == ffi::DataType::S8 ? Scalar::kInt8 : Scalar::kFp8;
  if (ffi::Error error = fill_fused(codes, operands, out, a, e, p); error.failure()) return error;
  if (p->stack.experts) return invalid("codes take no experts");
  if (reinterpret_cast<uintptr_t>(p->x) % 16 != 0) return invalid("codes are not aligned to 16 bytes");
  const Dims rows = codes.dimensions(), dims = scales.dimensions();
  if (scales.element_type() != ffi::DataType::F32 || dims.size() != rows.size() ||
      !starts_with(rows, dims, rows.size() - 1) || dims.back() != 1) {
    return invalid("scales must be f32, one for each row of codes");
  }
  p->x_scales = static_cast<const float*>(scales.untyped_data());
  if (reinterpret_cast<uintptr_t>(p->x_scales) % 4 != 0) return invalid("scales are not aligned to their elements");
  return ffi::Error::Success();
}

}  // namespace jax_qgemm
