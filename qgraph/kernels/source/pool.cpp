// The pool: idle workers spin for a moment and then sleep; the caller works too.
//
// Every thread has a share of the tasks, one after the other, so that it reads memory in one stream; one that has
// done its share takes what others have not begun.
//
// A caller that waits for a worker which has lost its core to another process waits for a slice of the
// scheduler's time, some milliseconds, far longer than a small call takes. So the pool keeps a balance of what
// the workers save in small calls and what such waits cost: when it is used up, small calls stay on the caller's
// thread for a while.
#include "pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>

namespace qgraph {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double SMALLEST = 8e3;    // nanoseconds of work: below, a second thread costs more than it gains
constexpr double LITTLE = 3e5;      // of work: such calls stay on one thread while the cores are contended
constexpr double STALL = 2.5e5;     // a join that took so much longer than its share of the work
constexpr double CREDIT = 1e7;      // the balance at most: what stalls may cost before calls go on alone
constexpr double COOL = 2.5e7;      // how long they do; doubles until the credit is full again, up to
constexpr double COOLEST = 4e8;
constexpr int SPINS = 2000;         // of a worker, before it yields its core between looks
constexpr double AWAKE = 2e5;       // how long an idle worker stays awake

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

double now() { return std::chrono::duration<double, std::nano>(Clock::now().time_since_epoch()).count(); }

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int wanted() {
  const char* text = std::getenv("QGRAPH_THREADS");
  int n = text ? std::atoi(text) : 0;
  return n > 0 ? n : cores();
}

std::atomic<int> g_threads{0};

class Pool {
 public:
  static Pool& get() {  // never destroyed: workers may outlive the exit of main
    static Pool* pool = new Pool;
    return *pool;
  }

  void run(int count, int64_t tasks, double nanoseconds, pool::Task task, void* closure) {
    std::unique_lock<std::mutex> turn(calls_, std::try_to_lock);
    // Another stream is in here: its call has the workers, this one its own thread.
    if (!turn || (nanoseconds < LITTLE && now() < cool_until_)) return alone(tasks, task, closure);
    start(count - 1);
    task_ = task, closure_ = closure;
    helpers_.store(count - 1, std::memory_order_relaxed);
    for (int i = 0; i < count; i++) {
      shares_[i].next.store(tasks * i / count, std::memory_order_relaxed);
      shares_[i].end = tasks * (i + 1) / count;
    }
    // The round opens. Workers count themselves in and out; one that is late, and finds it closed or meets
    // the next one, changes nothing: counts are added to, never set.
    inside_.fetch_sub(CLOSED, std::memory_order_acq_rel);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work(0, count);
    join(nanoseconds / count, nanoseconds - nanoseconds / count);
  }

 private:
  static void alone(int64_t tasks, pool::Task task, void* closure) {
    for (int64_t i = 0; i < tasks; i++) task(closure, i);
  }

  void start(int workers) {
    while (static_cast<int>(shares_.size()) <= workers) shares_.emplace_back();
    for (; started_ < workers; started_++) std::thread([this, id = started_] { loop(id); }).detach();
  }

  void work(int own, int count) {
    for (int i = 0; i < count; i++) {
      Share& share = shares_[(own + i) % count];
      for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        task_(closure_, task);
    }
  }

  // Close the round to workers that have not come yet, and wait for those inside. `share` is how long the
  // call should take: a wait far beyond it means that a worker is not running; `saved` what workers save then.
  void join(double share, double saved) {
    balance_ = std::min(CREDIT, balance_ + saved);
    if (balance_ == CREDIT) cooling_ = 0;
    int64_t inside = inside_.fetch_add(CLOSED, std::memory_order_acq_rel);
    if (inside == 0) return;
    double begun = now();
    for (int spins = 0; inside_.load(std::memory_order_acquire) != CLOSED; spins++)
      spins < SPINS ? relax() : (void)sched_yield();
    double waited = now() - begun;
    if (waited < STALL + share) return;
    balance_ -= waited;
    if (balance_ > 0) return;
    balance_ = 0;
    cooling_ = std::min(std::max(COOL, cooling_ * 2), COOLEST);
    cool_until_ = begun + waited + cooling_;
  }

  void loop(int id) {
    uint64_t seen = round_.load(std::memory_order_acquire);
    for (;;) {
      seen = await(seen);
      if (id >= helpers_.load(std::memory_order_relaxed)) continue;
      if (inside_.fetch_add(1, std::memory_order_acq_rel) & CLOSED) {
        inside_.fetch_sub(1, std::memory_order_acq_rel);  // too late: all tasks are taken
        continue;
      }
      // This round's shares, which may be fewer than those of the round that woke this worker.
      const int count = helpers_.load(std::memory_order_relaxed) + 1;
      work(id + 1, count);
      inside_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  uint64_t await(uint64_t seen) {
    double begun = now();
    uint64_t round;
    for (int spins = 1; (round = round_.load(std::memory_order_acquire)) == seen; spins++) {
      relax();
      if (spins % 256) continue;
      if (spins > SPINS) sched_yield();
      if (now() - begun < AWAKE) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
    return round;
  }

  static constexpr int64_t CLOSED = int64_t(1) << 40;

  std::mutex calls_;  // held by the call that has the workers
  pool::Task task_ = nullptr;
  void* closure_ = nullptr;
  int started_ = 0;
  std::atomic<int> helpers_{0};
  double balance_ = CREDIT, cool_until_ = 0, cooling_ = 0;
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::deque<Share> shares_;  // of the caller, then of the workers
  alignas(64) std::atomic<int64_t> inside_{CLOSED};
  alignas(64) std::atomic<uint64_t> round_{0};
  std::atomic<int> asleep_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

struct Buffer {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

int threads() {
  int n = g_threads.load(std::memory_order_relaxed);
  if (n == 0) g_threads.store(n = wanted(), std::memory_order_relaxed);
  return n;
}

void set_threads(int n) { g_threads.store(std::max(1, n), std::memory_order_relaxed); }

void pool::run(int64_t tasks, double nanoseconds, Task task, void* closure) {
  int count = static_cast<int>(std::min<int64_t>(threads(), tasks));
  if (count > 1 && nanoseconds >= SMALLEST) return Pool::get().run(count, tasks, nanoseconds, task, closure);
  for (int64_t i = 0; i < tasks; i++) task(closure, i);
}

void* scratch(int slot, int64_t bytes) {
  static thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.memory);
    buffer.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, buffer.bytes);
    if (!buffer.memory) std::abort();
  }
  return buffer.memory;
}

}  // namespace qgraph
