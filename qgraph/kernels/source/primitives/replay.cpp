#include "replay.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <set>

#include "packed.h"

namespace qgraph {
namespace {

using Buffer = mx::array::Data;

constexpr size_t SMALL = 1 << 14;    // bytes of an input that is copied, wherever it lies
constexpr size_t MOST = 1 << 24;     // bytes of buffers that a replay may keep

// Ops whose result lies in the buffer of their input; those of `reshaping` where that is row-major.
const std::set<std::string> views = {"Broadcast", "BroadcastAxes", "Copy",  "ExpandDims", "Slice",
                                     "Split",     "Squeeze",       "StopGradient", "Transpose"};
const std::set<std::string> reshaping = {"Contiguous", "Flatten", "Reshape", "Unflatten"};

// Whether `a` is all of the memory from its first element on. (What MLX says of steps back is not to be relied on.)
bool gapless(const mx::array& a) {
  auto& strides = a.strides();
  return a.flags().contiguous && std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s >= 0; });
}

// Memory laid out as that of `a`, which has no gaps.
mx::array laid_out_as(const mx::array& a) {
  mx::array b(a.shape(), a.dtype(), nullptr, {});
  b.set_data(mx::allocator::malloc(a.data_size() * a.itemsize()), a.data_size(), a.strides(), a.flags());
  return b;
}

// MLX's update of a block that begins where an array says; a start too far is moved until the block fits.
void update(const mx::array& block, mx::array& out, const mx::array& starts, const std::vector<int>& axes,
            mx::Stream stream) {
  mx::Shape shape = block.shape();
  std::vector<int64_t> steps, most;
  for (int axis : axes) steps.push_back(out.strides(axis)), most.push_back(out.shape(axis) - shape[axis]);
  send(stream,
       [=, from = block.data<char>(), from_strides = block.strides(), to = out.data<char>(),
        to_strides = out.strides(), size = block.itemsize(), at = starts.data<void>(), dtype = starts.dtype()] {
         auto begin = integers(at, dtype, static_cast<int64_t>(steps.size()));
         int64_t offset = 0;
         for (size_t i = 0; i < steps.size(); i++)
           offset += std::clamp<int64_t>(begin[i], 0, most[i]) * steps[i];
         copy_elements(from, from_strides, const_cast<char*>(to) + offset * size, to_strides, shape, size);
       });
}

// Makes calls of steps, instead of results.
class Recorder {
 public:
  explicit Recorder(Recording& made) : made_(made) { recording = &made; }
  ~Recorder() { recording = nullptr; }
  Recorder(const Recorder&) = delete;

  // `buffer` is an input's; where `owned`, it may be overwritten.
  void lend(const std::shared_ptr<Buffer>& buffer, bool owned) { lent_[buffer] = owned; }

  void keep(const mx::array& a) {
    auto& buffer = a.data_shared_ptr();
    if (!lent_.count(buffer) && kept_.insert(buffer.get()).second) made_.buffers.push_back(buffer);
  }

  // `last`: which inputs nobody reads afterwards.
  Arrays run(const Recorded& step, Arrays inputs, const std::vector<bool>& last) {
    Arrays made;
    for (size_t i = 0; i < step.outputs.size(); i++)
      made.emplace_back(step.shapes[i], step.dtypes[i], step.primitive, Arrays{});
    auto stream = step.primitive->stream();
    if (updates(*step.primitive)) {
      auto& op = static_cast<const mx::DynamicSliceUpdate&>(*step.primitive);
      copy_on_write(inputs[0], made[0], last[0], stream);
      if (inputs[1].size()) update(inputs[1], made[0], row_major(inputs[2], stream), op.state(), stream);
    } else {
      if (reshaping.count(step.primitive->name())) inputs[0] = row_major(inputs[0], stream);
      step.primitive->eval_cpu(inputs, made);
    }
    for (auto& a : made) keep(a);
    return made;
  }

 private:
  // `out` in the place of x where nobody else reads that, or as a copy of it.
  void copy_on_write(const mx::array& x, mx::array& out, bool last, mx::Stream stream) {
    auto& buffer = x.data_shared_ptr();
    auto lent = lent_.find(buffer);
    const bool alone = last && buffer.use_count() == 2;  // x, and the recording or this
    const bool free = alone && (lent == lent_.end() || lent->second);
    if (free && x.flags().row_contiguous) return out.copy_shared_buffer(x);
    allocate(out);
    send(stream, [from = x.data<char>(), strides = x.strides(), to = out.data<char>(), dense = out.strides(),
                  shape = x.shape(), size = x.itemsize()] {
      copy_elements(from, strides, const_cast<char*>(to), dense, shape, size);
    });
  }

  Recording& made_;
  std::map<std::shared_ptr<Buffer>, bool> lent_;
  std::set<const Buffer*> kept_;
};

}  // namespace

// An input of the steps, as it lies in memory.
struct Replay::Input {
  size_t place;
  const char* address;
  mx::Strides strides;
  size_t bytes;
  bool small, owned;

  // Whether the calls for this one do for another one that is theirs to overwrite as far as this one is.
  bool fits(const Input& o) const {
    return small == o.small && bytes == o.bytes && strides == o.strides && (small || address == o.address);
  }
  bool operator==(const Input& o) const { return fits(o) && owned == o.owned; }
};

// A result: in a buffer that is kept, or in that of an input.
struct Replay::Output {
  size_t place;
  mx::array like;                // its layout, and its address where it is kept
  std::optional<size_t> input;   // the place of the input
  int64_t offset = 0;            // elements, from where that begins
};

struct Replay::Kept {
  struct Copied {
    size_t place;
    char* to;
    size_t bytes;
  };

  std::vector<Input> inputs;
  std::vector<Copied> copied;
  Recording recording;
  std::vector<Output> outputs;
};

// Buffers that a run in the queue holds, since MLX does not: until it is over, or until the next run in the queue
// holds those that it overwrites too.
struct Replay::Held {
  std::mutex turn;
  std::vector<std::shared_ptr<Buffer>> overwritten, others;

  void let_go() {
    std::lock_guard<std::mutex> lock(turn);
    overwritten.clear(), others.clear();
  }
};

// One run of the calls, and what is copied before and after.
struct Replay::Task {
  struct Move {
    const char* from;
    char* to;
    size_t bytes;
  };

  std::shared_ptr<Kept> kept;
  std::vector<Move> before, after;
  std::vector<std::optional<mx::array>> results;  // those in buffers of their own; in the order of the outputs
  std::shared_ptr<Held> held;

  void operator()() {
    for (auto& move : before) std::memcpy(move.to, move.from, move.bytes);
    for (auto& call : kept->recording.calls) call();
    for (auto& move : after) std::memcpy(move.to, move.from, move.bytes);
    held->let_go();
  }
};

namespace {
std::atomic<int64_t> replayed{0};
}

int64_t replays() { return replayed; }

// MLX exports no type information of its ops.
bool updates(const mx::Primitive& primitive) { return primitive.name() == std::string("DynamicSliceUpdate"); }

Kind kind_of(const Recorded& step) {
  auto* primitive = step.primitive.get();
  if (dynamic_cast<const Native*>(primitive) || updates(*primitive)) return Kind::kernel;
  return views.count(primitive->name()) || reshaping.count(primitive->name()) ? Kind::view : Kind::other;
}

size_t bytes_made(const Recorded& step) {
  if (kind_of(step) == Kind::view || updates(*step.primitive)) return 0;
  size_t bytes = 0;
  for (size_t i = 0; i < step.outputs.size(); i++) {
    size_t size = mx::size_of(step.dtypes[i]);
    for (int length : step.shapes[i]) size *= length;
    bytes += size;
  }
  return bytes;
}

Replay::Replay(const Whole& whole) : number_(whole.places), written_(whole.places) {
  std::vector<bool> read(whole.places), made(whole.places);
  for (size_t n = whole.first; n < whole.steps.size(); n++) {
    if (updates(*whole.steps[n].primitive)) written_[whole.steps[n].inputs[0]] = true;
    for (size_t place : whole.steps[n].inputs) {
      if (!read[place] && !made[place]) inputs_.push_back(place);
      read[place] = true;
    }
    for (size_t place : whole.steps[n].outputs) made[place] = true;
  }
  for (size_t place : whole.results)
    if (made[place]) results_.push_back(place);
  for (size_t i = 0; i < whole.inputs.size(); i++) number_[whole.inputs[i]] = i;
}

Replay::~Replay() = default;

bool Replay::worth(const std::vector<Recorded>& steps, size_t first) {
  size_t bytes = 0;
  for (size_t n = first; n < steps.size(); n++) bytes += bytes_made(steps[n]);
  return bytes <= MOST;
}

bool Replay::repeat(const Whole& whole, const Arrays& given, Values& values, const std::function<void()>& drain) {
  std::lock_guard<std::mutex> turn(turn_);
  if (!kept_) return false;
  auto inputs = look(given, values);
  for (size_t i = 0; i < inputs.size(); i++)
    if (!kept_->inputs[i].fits(inputs[i]) || inputs[i].owned > kept_->inputs[i].owned) return false;
  auto task = prepare(given, values);
  if (!take_over(given, values)) {  // perhaps only another op in the queue holds it
    drain();
    if (!take_over(given, values)) return false;
  }
  send(whole, std::move(task), given, values);
  return true;
}

bool Replay::begin(const Whole& whole, const Arrays& given, Values& values) {
  std::lock_guard<std::mutex> turn(turn_);
  kept_ = nullptr;
  auto inputs = look(given, values);
  if (last_ != inputs) {
    last_ = std::move(inputs);
    return false;
  }
  kept_ = record(whole, std::move(inputs), values);
  send(whole, prepare(given, values), given, values);
  return true;
}

// Whether all that is to be overwritten is held by nobody but the last run. That need not hold it any more then,
// since the next run in the queue does.
bool Replay::take_over(const Arrays& given, const Values& values) {
  static Held none;
  auto& held = queued_ ? *queued_ : none;
  std::lock_guard<std::mutex> lock(held.turn);
  std::vector<std::pair<std::shared_ptr<Buffer>*, const mx::array*>> taken;
  bool ours = true;
  for (auto& input : kept_->inputs) {
    if (!input.owned) continue;
    auto& a = at(input.place, given, values);
    auto found = std::find(held.overwritten.begin(), held.overwritten.end(), a.data_shared_ptr());
    if (found != held.overwritten.end()) taken.emplace_back(&*found, &a), found->reset();
    ours = ours && a.is_donatable();
  }
  if (!ours)
    for (auto& [buffer, a] : taken) *buffer = a->data_shared_ptr();
  return ours;
}

const mx::array& Replay::at(size_t place, const Arrays& given, const Values& values) const {
  return values[place] ? *values[place] : given[number_[place]];
}

std::vector<Replay::Input> Replay::look(const Arrays& given, const Values& values) const {
  std::vector<Input> inputs;
  inputs.reserve(inputs_.size());
  for (size_t place : inputs_) {
    auto& a = at(place, given, values);
    size_t bytes = a.data_size() * a.itemsize();
    bool small = bytes <= SMALL && gapless(a) && !written_[place];
    inputs.push_back({place, a.data<char>(), a.strides(), bytes, small, !small && a.is_donatable()});
  }
  return inputs;
}

std::shared_ptr<Replay::Kept> Replay::record(const Whole& whole, std::vector<Input> inputs, const Values& given) {
  auto kept = std::make_shared<Kept>();
  Recorder recorder(kept->recording);
  Values values(whole.places);
  std::map<const Buffer*, const Input*> origin;
  for (auto& input : inputs) {
    auto& a = *given[input.place];
    if (input.small) {
      values[input.place] = laid_out_as(a);
      recorder.keep(*values[input.place]);
      kept->copied.push_back({input.place, values[input.place]->data<char>(), input.bytes});
    } else {
      values[input.place] = mx::array::unsafe_weak_copy(a);  // which MLX does not overwrite
      auto& buffer = values[input.place]->data_shared_ptr();
      recorder.lend(buffer, input.owned);
      origin[buffer.get()] = &input;
    }
  }
  for (size_t n = whole.first; n < whole.steps.size(); n++) {
    auto& step = whole.steps[n];
    Arrays read;
    for (size_t i = 0; i < step.inputs.size(); i++) {
      auto& value = values[step.inputs[i]];
      read.push_back(*value);
      if (whole.last[n][i]) value.reset();
    }
    auto made = recorder.run(step, std::move(read), whole.last[n]);
    for (size_t i = 0; i < made.size(); i++) values[step.outputs[i]] = std::move(made[i]);
  }
  for (size_t place : results_) {
    auto& y = *values[place];
    auto from = origin.find(y.data_shared_ptr().get());
    if (from != origin.end()) {
      int64_t offset = (y.data<char>() - from->second->address) / static_cast<int64_t>(y.itemsize());
      kept->outputs.push_back({place, y, from->second->place, offset});
    } else {
      auto dense = gapless(y) ? y : row_major(y, whole.steps[0].primitive->stream());
      recorder.keep(dense);
      kept->outputs.push_back({place, dense, std::nullopt});
    }
  }
  kept->inputs = std::move(inputs);
  return kept;
}

// What does not depend on who holds the inputs.
Replay::Task Replay::prepare(const Arrays& given, const Values& values) const {
  Task task{kept_, {}, {}, {}, std::make_shared<Held>()};
  for (auto& copied : kept_->copied)
    task.before.push_back({at(copied.place, given, values).data<char>(), copied.to, copied.bytes});
  for (auto& output : kept_->outputs) {
    auto& result = task.results.emplace_back();
    if (output.input) continue;
    auto& like = output.like;
    result = laid_out_as(like);
    task.held->others.push_back(result->data_shared_ptr());
    task.after.push_back({like.data<char>(), result->data<char>(), like.data_size() * like.itemsize()});
  }
  return task;
}

void Replay::send(const Whole& whole, Task task, const Arrays& given, Values& values) {
  auto fetch = [&](size_t place) {
    if (!values[place]) values[place] = taken(given[number_[place]]);
  };
  std::vector<bool> owned(whole.places);
  for (auto& input : kept_->inputs)
    if (input.owned) fetch(input.place), owned[input.place] = true;
  for (size_t i = 0; i < kept_->outputs.size(); i++) {
    auto& [place, like, input, offset] = kept_->outputs[i];
    if (!input) continue;
    fetch(*input);
    task.results[i].emplace(like.shape(), like.dtype(), nullptr, Arrays{});
    task.results[i]->copy_shared_buffer(*values[*input], like.strides(), like.flags(), like.data_size(), offset);
  }
  for (size_t place = 0; place < values.size(); place++) {
    if (!values[place]) continue;
    (owned[place] ? task.held->overwritten : task.held->others).push_back(values[place]->data_shared_ptr());
  }
  queued_ = task.held;
  for (size_t n = whole.first; n < whole.steps.size(); n++)
    for (size_t i = 0; i < whole.steps[n].inputs.size(); i++)
      if (whole.last[n][i]) values[whole.steps[n].inputs[i]].reset();
  for (size_t i = 0; i < task.results.size(); i++) values[kept_->outputs[i].place] = std::move(task.results[i]);
  task.results.clear();
  replayed++;
  mx::cpu::get_command_encoder(whole.steps[0].primitive->stream())
      .dispatch([task = std::make_shared<Task>(std::move(task))] { (*task)(); });
}

}  // namespace qgraph
