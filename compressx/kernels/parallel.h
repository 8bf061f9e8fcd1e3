// Work shared out over XLA's own thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace compressx {

// Runs f(0) ... f(n - 1) on at most `threads` threads, this one among them (0: all of the pool). Waits for tasks that
// have begun only, so that a busy pool costs speed and never a deadlock.
inline void Parallel(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n, std::function<void(int64_t)> f) {
  const int64_t limit = threads > 0 ? threads : std::max<int64_t>(1, pool.num_threads());
  if (limit == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  struct Work {
    std::function<void(int64_t)> f;
    int64_t n;
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all;
  };
  auto work = std::make_shared<Work>();
  work->f = std::move(f);
  work->n = n;
  auto run = [work] {
    int64_t mine = 0;
    for (int64_t i; (i = work->next++) < work->n; ++mine) work->f(i);
    std::lock_guard<std::mutex> lock(work->mutex);
    work->done += mine;
    if (work->done == work->n) work->all.notify_all();
  };
  for (int64_t i = std::min(limit, n) - 1; i > 0; --i) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all.wait(lock, [&] { return work->done == work->n; });
}

}  // namespace compressx
