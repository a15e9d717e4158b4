// The product on the CPU.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include "kernels/product.h"

namespace jax_qgemm::host {

// Calls body(i) once for every i in [0, count), on whatever threads, and returns when all have returned.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// `width` is the number of threads that `parallel_for` can keep busy. The result does not depend on it.
void matmul(const Product& product, const ParallelFor& parallel_for, int64_t width);

// For tests: the instruction set of later products, "generic", "avx2" or "avx512"; "" is the best that this CPU has.
// False: this build or this CPU does not have it.
bool set_instruction_set(std::string_view name);

}  // namespace jax_qgemm::host
