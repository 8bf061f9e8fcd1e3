// Work shared out over threads: XLA's own pool here, helpers that wait awake in `kernels/team.h`.

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

// f(0) ... f(n - 1), shared out. Each thread begins with a range of its own, the same at every call, so that what it wrote
// in one layer it reads in the next; then it helps the others.
struct Work {
  std::function<void(int64_t)> f;
  int64_t n, ranges;
  std::vector<std::atomic<int64_t>> next;
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable all;

  Work(std::function<void(int64_t)> f, int64_t n, int64_t ranges) : f(std::move(f)), n(n), ranges(ranges), next(ranges) {
    for (int64_t r = 0; r < ranges; ++r) next[r] = r * n / ranges;
  }

  // What is left of the work, the range `first` first.
  void Run(int64_t first) {
    int64_t mine = 0;
    for (int64_t k = 0; k < ranges; ++k) {
      const int64_t range = (first + k) % ranges, end = (range + 1) * n / ranges;
      for (int64_t i; (i = next[range]++) < end; ++mine) f(i);
    }
    std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (done == n) all.notify_all();
  }

  // Returns when every task that has begun is done. The last one soon is: a short watch costs less than going to sleep
  // and being woken.
  void Wait() {
    for (int i = 0; i < 20000; ++i)
      if (done == n) return;
    std::unique_lock<std::mutex> lock(mutex);
    all.wait(lock, [&] { return done == n; });
  }
};

// Runs f(0) ... f(n - 1) on at most `threads` threads, this one among them (0: as many as XLA's pool has). offer(work) asks
// others to run ranges 1, 2, ... of it. Waits for tasks that have begun only, so that others who never come cost speed
// and not a deadlock.
template <class Offer>
void Share(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n, std::function<void(int64_t)> f, const Offer& offer) {
  const int64_t limit = threads > 0 ? threads : std::max<int64_t>(1, pool.num_threads());
  if (limit == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  auto work = std::make_shared<Work>(std::move(f), n, std::min(limit, n));
  offer(work);
  work->Run(0);
  work->Wait();
}

// On XLA's pool.
inline void Parallel(xla::ffi::ThreadPool& pool, int64_t n, std::function<void(int64_t)> f) {
  Share(pool, 0, n, std::move(f), [&](const std::shared_ptr<Work>& work) {
    for (int64_t r = 1; r < work->ranges; ++r) pool.Schedule([work, r] { work->Run(r); });
  });
}

}  // namespace compressx
