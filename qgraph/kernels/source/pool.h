// Threads that share the tasks of one kernel call, taken from a counter.
#pragma once
#include <cstdint>

namespace qgraph {

// The threads of a call at most: QGRAPH_THREADS, or the cores that the process may use.
int threads();
void set_threads(int n);

namespace pool {
using Task = void (*)(void* closure, int64_t task);
void run(int64_t tasks, double nanoseconds, Task task, void* closure);
}  // namespace pool

// f(task) for every task below `tasks`, each once, in any order and on any thread; returns when all are done.
// `nanoseconds` estimates the work of all tasks on one thread: little work is not worth a second thread.
// A result must not depend on which thread ran what; f must not throw and must not call parallel.
template <class F>
inline void parallel(int64_t tasks, double nanoseconds, const F& f) {
  auto call = [](void* closure, int64_t task) { (*static_cast<const F*>(closure))(task); };
  pool::run(tasks, nanoseconds, call, const_cast<F*>(&f));
}

// Memory of the calling thread, aligned to 64 bytes, kept for the next call. A slot holds one thing at a
// time: it is lost when the same thread asks for the slot again. Slots 0 to 3 belong to the caller of
// parallel, 4 to 7 to its tasks, so that a task on the calling thread does not overwrite what is shared.
void* scratch(int slot, int64_t bytes);

}  // namespace qgraph
