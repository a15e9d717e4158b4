#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include "ffi/thread_pool.h"

namespace jax_qgemm {
namespace {

// Shared by the loop and its tasks; a task that starts after the loop has returned finds nothing left to claim.
struct Loop {
  const int64_t count;
  const std::function<void(int64_t)>* body;  // valid while a claimed chunk runs
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable done;
  int64_t finished = 0;
  std::exception_ptr failure;

  Loop(int64_t n, const std::function<void(int64_t)>* f) : count(n), body(f) {}

  void work() {
    int64_t completed = 0;
    std::exception_ptr caught;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++completed) {
      try {
        (*body)(i);
      } catch (...) {
        caught = std::current_exception();
      }
    }
    if (completed == 0) return;
    const std::lock_guard lock(mutex);
    finished += completed;
    if (caught) failure = caught;
    if (finished == count) done.notify_all();
  }
};

}  // namespace

host::ParallelFor parallel_for(xla::ffi::ThreadPool pool) {
  return [pool](int64_t count, const std::function<void(int64_t)>& body) mutable {
    const auto loop = std::make_shared<Loop>(count, &body);
    const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([loop] { loop->work(); });
    loop->work();
    std::unique_lock lock(loop->mutex);
    loop->done.wait(lock, [&] { return loop->finished == loop->count; });
    if (loop->failure) std::rethrow_exception(loop->failure);
  };
}

}  // namespace jax_qgemm
