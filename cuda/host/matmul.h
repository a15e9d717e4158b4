// The product on the CPU.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/product.h"

namespace jax_qgemm::host {

// Calls body(i) once for every i in [0, count), on whatever threads, and returns when all have returned.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// `width` is the number of threads that `parallel_for` can keep busy.
void matmul(const Product& product, const ParallelFor& parallel_for, int64_t width);

}  // namespace jax_qgemm::host
