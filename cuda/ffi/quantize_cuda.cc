#include <optional>

#include "ffi/weight_check.h"
#include "kernels/quantize.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

struct PartTypes {
  ffi::DataType codes, scales, sums;
};

std::optional<ActivationFormat> format_named(std::string_view name) {
  if (name == "int8") return ActivationFormat::kInt8;
  if (name == "fp8") return ActivationFormat::kFp8;
  if (name == "q8_1") return ActivationFormat::kQ8_1;
  return std::nullopt;
}

PartTypes types_of(ActivationFormat format) {
  using enum ffi::DataType;
  if (format == ActivationFormat::kQ8_1) return {S8, F16, S16};
  return {format == ActivationFormat::kInt8 ? S8 : F8E4M3FN, F32, INVALID};
}

// A result of `rows` by `columns` elements.
ffi::Error check_part(const char* name, const ffi::AnyBuffer& part, ffi::DataType type, int64_t rows, int64_t columns) {
  const auto dims = part.dimensions();
  if (part.element_type() != type) return invalid(std::string(name) + " have the wrong type");
  if (dims.size() == 0 || dims.back() != columns || static_cast<int64_t>(part.element_count()) != rows * columns) {
    return invalid(std::string(name) + " have the wrong shape");
  }
  if (reinterpret_cast<uintptr_t>(part.untyped_data()) % ffi::ByteWidth(type) != 0) {
    return invalid(std::string(name) + " are not aligned to their type");
  }
  return ffi::Error::Success();
}

ffi::Error quantize_cuda(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> codes,
                         ffi::Result<ffi::AnyBuffer> scales, ffi::RemainingRets others, std::string_view format) {
  const std::optional<ActivationFormat> known = format_named(format);
  if (!known) return invalid("unknown activation format " + std::string(format));
  Activations a = {};
  a.format = *known;
  const bool has_sums = a.format == ActivationFormat::kQ8_1;
  if (!scalar_of(x.element_type(), &a.x_type)) return invalid("x must be f16, bf16 or f32");
  if (x.dimensions().size() == 0) return invalid("x must have an axis");
  a.k = x.dimensions().back();
  if (a.k == 0 || (has_sums && a.k % kQ8_1Group != 0)) {
    return invalid("x has k = " + std::to_string(a.k) + ", expected a positive multiple of " +
                   std::to_string(has_sums ? kQ8_1Group : 1));
  }
  a.rows = static_cast<int64_t>(x.element_count()) / a.k;
  if (reinterpret_cast<uintptr_t>(x.untyped_data()) % ffi::ByteWidth(x.element_type()) != 0) {
    return invalid("x is not aligned to its type");
  }
  if (others.size() != (has_sums ? 1u : 0u)) return invalid("the results must be codes, scales and, of q8_1, sums");

  const PartTypes types = types_of(a.format);
  const int64_t groups = has_sums ? a.k / kQ8_1Group : 1;
  ffi::Error error = check_part("codes", *codes, types.codes, a.rows, a.k);
  if (error.success()) error = check_part("scales", *scales, types.scales, a.rows, groups);
  if (error.success() && has_sums) {
    auto sums = others.get<ffi::AnyBuffer>(0);
    if (!sums.has_value()) return sums.error();
    error = check_part("sums", **sums, types.sums, a.rows, groups);
    a.sums = static_cast<int16_t*>((*sums)->untyped_data());
  }
  if (error.failure() || a.rows == 0) return error;
  a.x = x.untyped_data();
  a.codes = codes->untyped_data();
  a.scales = scales->untyped_data();
  if (const char* problem = launch_quantize(a, stream)) {
    return ffi::Error::Internal(std::string("jax_qgemm.quantize_activations: ") + problem);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_qgemm_quantize_cuda, jax_qgemm::quantize_cuda,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<std::string_view>("format"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
