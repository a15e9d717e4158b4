// jax_qgemm._native: the handlers as capsules, and what tests and build_info() ask of the C++ side.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "formats/formats.cuh"
#include "generated/build_config.h"
#include "host/dequantize.h"
#include "host/matmul.h"
#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* jax_qgemm_matmul_cpu(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jax_qgemm_fused_matmul_cpu(XLA_FFI_CallFrame*);
#ifdef JAX_QGEMM_WITH_CUDA
extern "C" XLA_FFI_Error* jax_qgemm_matmul_cuda(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jax_qgemm_fused_matmul_cuda(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jax_qgemm_integer_matmul_cuda(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jax_qgemm_dequantize_cuda(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jax_qgemm_quantize_cuda(XLA_FFI_CallFrame*);
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace {

nb::capsule capsule(XLA_FFI_Handler* handler) { return nb::capsule(reinterpret_cast<void*>(handler)); }

nb::dict registrations() {
  nb::dict cpu, cuda, all;
  cpu["jax_qgemm.matmul.v1"] = capsule(jax_qgemm_matmul_cpu);
  cpu["jax_qgemm.fused_matmul.v1"] = capsule(jax_qgemm_fused_matmul_cpu);
#ifdef JAX_QGEMM_WITH_CUDA
  cuda["jax_qgemm.matmul.v1"] = capsule(jax_qgemm_matmul_cuda);
  cuda["jax_qgemm.fused_matmul.v1"] = capsule(jax_qgemm_fused_matmul_cuda);
  cuda["jax_qgemm.integer_matmul.v1"] = capsule(jax_qgemm_integer_matmul_cuda);
  cuda["jax_qgemm.dequantize.v1"] = capsule(jax_qgemm_dequantize_cuda);
  cuda["jax_qgemm.quantize_activations.v1"] = capsule(jax_qgemm_quantize_cuda);
#endif
  all["cpu"] = cpu;
  all["CUDA"] = cuda;
  return all;
}

nb::dict build_info() {
  nb::dict info;
  info["version"] = JAX_QGEMM_VERSION;
  info["cuda_version"] = JAX_QGEMM_CUDA_VERSION;
  info["cuda_architectures"] = JAX_QGEMM_CUDA_ARCHITECTURES;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["host_instruction_sets"] = JAX_QGEMM_HOST_INSTRUCTION_SETS;
  info["layout_version"] = jax_qgemm::kLayoutVersion;
  return info;
}

using PlaneRow = std::tuple<std::string, bool, int, int, int>;

nb::dict plane_tables() {
  nb::dict tables;
  jax_qgemm::for_each_format([&](auto format) {
    using F = decltype(format);
    std::vector<PlaneRow> rows;
    for (const auto& p : F::kPlanes) rows.emplace_back(p.name, p.code, p.bits, p.shift, p.group);
    tables[F::kName] = nb::cast(rows);
  });
  return tables;
}

using Plane = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

nb::object dequantize(const std::string& format, const std::vector<Plane>& planes, int64_t n, int64_t k, int group_size,
                      int scale_type) {
  if (planes.size() > jax_qgemm::kMaxPlanes) throw std::invalid_argument("planes: too many");
  jax_qgemm::Weight w{};
  for (size_t i = 0; i < planes.size(); ++i) w.planes[i] = planes[i].data();
  w.group = group_size;
  w.scale_type = static_cast<jax_qgemm::ScaleType>(scale_type);
  auto* values = new float[static_cast<size_t>(n * k)];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  if (!jax_qgemm::host::dequantize(format, w, n, k, values)) throw std::invalid_argument("format: unknown " + format);
  return nb::cast(nb::ndarray<nb::numpy, float>(values, {static_cast<size_t>(n), static_cast<size_t>(k)}, owner));
}

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::object dequantize_q8_1(const Bytes& raw) {
  using Block = jax_qgemm::Q8_1::Block;
  if (raw.size() % sizeof(Block) != 0) throw std::invalid_argument("raw: not a whole number of q8_1 blocks");
  const size_t count = raw.size() / sizeof(Block), floats = count * jax_qgemm::Q8_1::kBlock;
  auto* values = new float[floats];
  nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  jax_qgemm::host::dequantize_q8_1(raw.data(), static_cast<int64_t>(count), values);
  return nb::cast(nb::ndarray<nb::numpy, float>(values, {floats}, owner));
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("registrations", &registrations, "XLA FFI handlers by platform and target name.");
  m.def("build_info", &build_info, "How this module was built.");
  m.def("plane_tables", &plane_tables,
        "For every format, its planes as (name, is_code, bits, shift, group), for comparison with the Python tables.");
  m.def("dequantize", &dequantize, "format"_a, "planes"_a, "n"_a, "k"_a, "group_size"_a = 0, "scale_type"_a = 0,
        "The C++ decoder, element by element: float32 (n, k) of the planes of one weight.");
  m.def("dequantize_q8_1", &dequantize_q8_1, "raw"_a, "The same of q8_1 blocks: float32 of uint8 (blocks * 36,).");
  m.def(
      "set_host_instruction_set",
      [](const std::string& name) {
        if (!jax_qgemm::host::set_instruction_set(name))
          throw std::invalid_argument("name: no instruction set " + name);
      },
      "name"_a, "For tests: makes later products on the CPU use it; \"\" is the best that this CPU has.");
}
