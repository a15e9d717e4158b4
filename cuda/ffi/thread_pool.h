// XLA's CPU thread pool as a parallel loop.
#pragma once

#include "host/matmul.h"
#include "xla/ffi/api/ffi.h"

namespace jax_qgemm {

// A loop whose chunks are claimed by this thread and by pool tasks alike. It waits for claimed chunks only, never for a
// task that has not started: the pool may be full of handlers that wait likewise.
host::ParallelFor parallel_for(xla::ffi::ThreadPool pool);

}  // namespace jax_qgemm
