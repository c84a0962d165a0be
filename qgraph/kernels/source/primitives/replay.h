// The calls of a whole, kept with the addresses that they were given, and made again as one task.
//
// A decode step calls the same kernels time after time: the weights and the caches stay where they are. Setting
// up those calls (a buffer for every result, a task for every kernel) costs some microseconds each, in a thread
// that takes a core from the kernels. A replay keeps the calls and the buffers between them. Small inputs are
// copied to where the calls expect them, results that lie in buffers of the replay are copied out.
#pragma once
#include <mutex>

#include "whole.h"

namespace qgraph {

// What a replay can do of a step: a kernel, a view of its input, or nothing.
enum class Kind { kernel, view, other };
Kind kind_of(const Recorded& step);

// How many runs of this process were replays.
int64_t replays();

class Replay {
 public:
  explicit Replay(const Whole& whole);
  ~Replay();

  // Whether buffers for the results of these steps may be kept.
  static bool worth(const std::vector<Recorded>& steps, size_t first);

  // Do the steps from `whole.first` on: take their inputs from `values`, put the results there. False where
  // nothing was done: inputs lie where they did not lie the last time.
  bool run(const Whole& whole, Values& values);

 private:
  struct Input;
  struct Output;
  struct Kept;

  std::vector<Input> look(const Values& values) const;
  std::shared_ptr<Kept> record(const Whole& whole, std::vector<Input> inputs, const Values& given);
  void play(const Whole& whole, Values& values) const;

  std::vector<size_t> inputs_, results_;  // places
  std::mutex turn_;
  std::vector<Input> last_;  // what came last
  std::shared_ptr<Kept> kept_;
};

}  // namespace qgraph
