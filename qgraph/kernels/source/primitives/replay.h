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

// Whether it is MLX's update of a block in place.
bool updates(const mx::Primitive& primitive);

// The bytes of what a step computes: none where its result lies in the buffer of an input.
size_t bytes_made(const Recorded& step);

// How many runs of this process were replays.
int64_t replays();

class Replay {
 public:
  explicit Replay(const Whole& whole);
  ~Replay();

  // Whether buffers for the results of these steps may be kept.
  static bool worth(const std::vector<Recorded>& steps, size_t first);

  // Do the steps from `whole.first` on: take their inputs from `values`, or else from those of the whole, and put
  // the results into `values`. Each is false where nothing was done. `repeat` makes the calls that are kept, where
  // inputs lie as they did then; it drains the stream where a task there may hold what is to be overwritten.
  // `begin` makes and keeps calls, where inputs lie as they did the last time; none may be held by a task.
  bool repeat(const Whole& whole, const Arrays& given, Values& values, const std::function<void()>& drain);
  bool begin(const Whole& whole, const Arrays& given, Values& values);

 private:
  struct Input;
  struct Output;
  struct Kept;
  struct Held;
  struct Task;

  const mx::array& at(size_t place, const Arrays& given, const Values& values) const;
  std::vector<Input> look(const Arrays& given, const Values& values) const;
  std::shared_ptr<Kept> record(const Whole& whole, std::vector<Input> inputs, const Values& given);
  Task prepare(const Arrays& given, const Values& values) const;
  bool take_over(const Arrays& given, const Values& values);
  void send(const Whole& whole, Task task, const Arrays& given, Values& values);

  std::vector<size_t> inputs_, results_;  // places
  std::vector<size_t> number_;            // of an input of the whole, by place
  std::vector<bool> written_;             // places of what an update overwrites: never copied
  std::mutex turn_;
  std::vector<Input> last_;  // what came last
  std::shared_ptr<Kept> kept_;
  std::shared_ptr<Held> queued_;  // of the last run
};

}  // namespace qgraph
