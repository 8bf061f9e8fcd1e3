// Work shared out over threads that wait for the next layer awake.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "parallel.h"

namespace compressx {

// Threads that help with the newest work they are offered. The layers of a network follow each other within microseconds,
// and waking a thread takes as long as a small layer: so a helper watches for new work before it goes to sleep.
class Team {
 public:
  static Team& Get() {
    static Team* team = new Team;  // never destroyed: its threads may outlive main()
    return *team;
  }

  void Offer(const std::shared_ptr<Work>& work) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; helpers_ + 1 < work->ranges; ++helpers_) std::thread([this, id = helpers_ + 1] { Help(id); }).detach();
    } catch (const std::system_error&) {  // no more threads available: who offers does more himself
    }
    work_ = work;
    ++offers_;
    if (sleeping_) wake_.notify_all();
  }

 private:
  static constexpr std::chrono::microseconds kWatch{200};

  void Help(int64_t id) {
    for (uint64_t seen = 0;;) {
      const auto start = std::chrono::steady_clock::now();
      while (offers_ == seen && std::chrono::steady_clock::now() - start < kWatch) Pause();
      std::shared_ptr<Work> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return offers_ != seen; });
        --sleeping_;
        seen = offers_;
        work = work_;
      }
      if (id < work->ranges) work->Run(id);
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Work> work_;
  std::atomic<uint64_t> offers_{0};
  int64_t helpers_ = 0, sleeping_ = 0;
};

// Runs f(0) ... f(n - 1) on at most `threads` threads, this one among them (0: as many as XLA's pool has).
inline void Together(xla::ffi::ThreadPool& pool, int64_t threads, int64_t n, std::function<void(int64_t)> f) {
  Share(pool, threads, n, std::move(f), [](const std::shared_ptr<Work>& work) { Team::Get().Offer(work); });
}

}  // namespace compressx
