// Every weight format, and the lookup by name that handlers do once a call.
#pragma once

#include <string_view>

#include "formats/integer.cuh"
#include "formats/iq4_nl.cuh"
#include "formats/iq4_xs.cuh"
#include "formats/mxfp4.cuh"
#include "formats/nvfp4.cuh"
#include "formats/q2_k.cuh"
#include "formats/q3_k.cuh"
#include "formats/q4_0.cuh"
#include "formats/q4_1.cuh"
#include "formats/q4_k.cuh"
#include "formats/q5_0.cuh"
#include "formats/q5_1.cuh"
#include "formats/q5_k.cuh"
#include "formats/q6_k.cuh"
#include "formats/q8_0.cuh"
#include "formats/q8_1.cuh"

namespace jax_qgemm {

// Calls visit with a value of the format's type, for its type alone. False: no format has that name.
template <class Visitor>
bool with_format(std::string_view name, Visitor&& visit) {
#define X(F)              \
  if (name == F::kName) { \
    visit(F{});           \
    return true;          \
  }
#include "formats/formats.def"
#undef X
  return false;
}

template <class Visitor>
void for_each_format(Visitor&& visit) {
#define X(F) visit(F{});
#include "formats/formats.def"
#undef X
}

}  // namespace jax_qgemm
