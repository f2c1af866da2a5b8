// Ctrl-C in a long call: the thread that called asks now and then, and all threads of the call stop.
#pragma once
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace tokenpool {

// Asks whether the caller wants to stop; null (no one does) until Python sets it.
extern std::atomic<bool (*)()> interrupt_check;

// One for each call, made by its thread.
class Watch {
  using Clock = std::chrono::steady_clock;

 public:
  // Throws when the call is to stop. Cheap: between iterations, images, blocks of tokens.
  void look() {
    if (!stopped_ && std::this_thread::get_id() == caller_ && Clock::now() - last_ > std::chrono::milliseconds(50)) {
      bool (*const check)() = interrupt_check;
      last_ = Clock::now();
      if (check && check()) stopped_ = true;
    }
    if (stopped_) throw std::runtime_error("tokenpool_ext: interrupted");
  }

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point last_ = Clock::now();
  std::atomic<bool> stopped_{false};
};

}  // namespace tokenpool
