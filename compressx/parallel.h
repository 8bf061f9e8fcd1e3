// Work shared out over XLA's own thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace compressx {

// Runs f(0) ... f(n - 1) on at most `threads` threads, this one among them (0: all of the pool). Each thread begins with a
// range of its own, the same at every call, so that what it wrote in one layer it reads in the next; then it helps the
// others. Waits for tasks that have begun only, so that a busy pool costs speed and never a deadlock.
inline void Parallel(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n, std::function<void(int64_t)> f) {
  const int64_t limit = threads > 0 ? threads : std::max<int64_t>(1, pool.num_threads());
  if (limit == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  struct Work {
    std::function<void(int64_t)> f;
    int64_t n, ranges;
    std::vector<std::atomic<int64_t>> next;
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all;
    Work(std::function<void(int64_t)> f, int64_t n, int64_t ranges)
        : f(std::move(f)), n(n), ranges(ranges), next(ranges) {
      for (int64_t r = 0; r < ranges; ++r) next[r] = r * n / ranges;
    }
  };
  auto work = std::make_shared<Work>(std::move(f), n, std::min(limit, n));
  auto run = [work](int64_t first) {
    int64_t mine = 0;
    for (int64_t k = 0; k < work->ranges; ++k) {
      const int64_t range = (first + k) % work->ranges, end = (range + 1) * work->n / work->ranges;
      for (int64_t i; (i = work->next[range]++) < end; ++mine) work->f(i);
    }
    std::lock_guard<std::mutex> lock(work->mutex);
    work->done += mine;
    if (work->done == work->n) work->all.notify_all();
  };
  for (int64_t r = 1; r < work->ranges; ++r) pool.Schedule([run, r] { run(r); });
  run(0);
  // the last task of another thread is soon done: a short watch costs less than going to sleep and being woken
  for (int i = 0; i < 20000; ++i)
    if (work->done == work->n) return;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all.wait(lock, [&] { return work->done == work->n; });
}

}  // namespace compressx
