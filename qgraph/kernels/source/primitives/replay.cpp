#include "replay.h"

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

// MLX exports no type information of its ops.
bool updates(const mx::Primitive& primitive) { return primitive.name() == std::string("DynamicSliceUpdate"); }

// Memory laid out as that of `a`, which has no gaps.
mx::array laid_out_as(const mx::array& a) {
  mx::array b(a.shape(), a.dtype(), nullptr, {});
  b.set_data(mx::allocator::malloc(a.data_size() * a.itemsize()), a.data_size(), a.strides(), a.flags());
  return b;
}

// MLX's update of a block that begins where an array says; a start too far is moved until the block fits.
void update(const mx::array& block, mx::array& out, const mx::array& starts, const std::vector<int>& axes) {
  mx::Shape shape = block.shape();
  std::vector<int64_t> steps, most;
  for (int axis : axes) steps.push_back(out.strides(axis)), most.push_back(out.shape(axis) - shape[axis]);
  send(block.primitive().stream(),
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
      if (inputs[1].size()) update(inputs[1], made[0], row_major(inputs[2], stream), op.state());
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

  bool operator==(const Input& o) const {
    if (small != o.small || bytes != o.bytes || strides != o.strides) return false;
    return small || (address == o.address && owned == o.owned);
  }
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

std::atomic<int64_t> replayed{0};

int64_t replays() { return replayed; }

Kind kind_of(const Recorded& step) {
  auto* primitive = step.primitive.get();
  if (dynamic_cast<const Native*>(primitive) || updates(*primitive)) return Kind::kernel;
  return views.count(primitive->name()) || reshaping.count(primitive->name()) ? Kind::view : Kind::other;
}

Replay::Replay(const Whole& whole) {
  std::vector<bool> met(whole.places);
  for (size_t n = whole.first; n < whole.steps.size(); n++) {
    for (size_t place : whole.steps[n].inputs)
      if (!met[place]) inputs_.push_back(place), met[place] = true;
    for (size_t place : whole.steps[n].outputs) met[place] = true;
  }
  std::vector<bool> made_here(whole.places);
  for (size_t n = whole.first; n < whole.steps.size(); n++)
    for (size_t place : whole.steps[n].outputs) made_here[place] = true;
  for (size_t place : whole.results)
    if (made_here[place]) results_.push_back(place);
}

Replay::~Replay() = default;

bool Replay::worth(const std::vector<Recorded>& steps, size_t first) {
  size_t bytes = 0;
  for (size_t n = first; n < steps.size(); n++) {
    if (kind_of(steps[n]) == Kind::view || updates(*steps[n].primitive)) continue;
    for (size_t i = 0; i < steps[n].outputs.size(); i++) {
      size_t size = mx::size_of(steps[n].dtypes[i]);
      for (int length : steps[n].shapes[i]) size *= length;
      bytes += size;
    }
  }
  return bytes <= MOST;
}

bool Replay::run(const Whole& whole, Values& values) {
  std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
  if (!turn) return false;
  auto inputs = look(values);
  if (!kept_ || kept_->inputs != inputs) {
    kept_ = nullptr;
    if (last_ != inputs) {
      last_ = std::move(inputs);
      return false;
    }
    kept_ = record(whole, std::move(inputs), values);
  }
  play(whole, values);
  replayed++;
  return true;
}

std::vector<Replay::Input> Replay::look(const Values& values) const {
  std::vector<Input> inputs;
  inputs.reserve(inputs_.size());
  for (size_t place : inputs_) {
    auto& a = *values[place];
    size_t bytes = a.data_size() * a.itemsize();
    bool small = bytes <= SMALL && a.flags().contiguous;
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
      auto dense = y.flags().contiguous ? y : row_major(y, whole.steps[0].primitive->stream());
      recorder.keep(dense);
      kept->outputs.push_back({place, dense, std::nullopt});
    }
  }
  kept->inputs = std::move(inputs);
  return kept;
}

void Replay::play(const Whole& whole, Values& values) const {
  struct Move {
    const char* from;
    char* to;
    size_t bytes;
  };
  std::vector<Move> before, after;
  std::vector<std::shared_ptr<Buffer>> held;  // until the task has run
  held.reserve(kept_->inputs.size() + kept_->outputs.size());
  for (auto& input : kept_->inputs) held.push_back(values[input.place]->data_shared_ptr());
  for (auto& copied : kept_->copied) before.push_back({values[copied.place]->data<char>(), copied.to, copied.bytes});
  Arrays made;
  for (auto& output : kept_->outputs) {
    auto& like = output.like;
    if (output.input) {
      mx::array y(like.shape(), like.dtype(), nullptr, {});
      y.copy_shared_buffer(*values[*output.input], like.strides(), like.flags(), like.data_size(), output.offset);
      made.push_back(std::move(y));
    } else {
      made.push_back(laid_out_as(like));
      held.push_back(made.back().data_shared_ptr());
      after.push_back({like.data<char>(), made.back().data<char>(), like.data_size() * like.itemsize()});
    }
  }
  for (size_t n = whole.first; n < whole.steps.size(); n++)
    for (size_t i = 0; i < whole.steps[n].inputs.size(); i++)
      if (whole.last[n][i]) values[whole.steps[n].inputs[i]].reset();
  for (size_t i = 0; i < made.size(); i++) values[kept_->outputs[i].place] = std::move(made[i]);
  mx::cpu::get_command_encoder(whole.steps[0].primitive->stream())
      .dispatch([kept = kept_, before = std::move(before), after = std::move(after), held = std::move(held)] {
        for (auto& move : before) std::memcpy(move.to, move.from, move.bytes);
        for (auto& call : kept->recording.calls) call();
        for (auto& move : after) std::memcpy(move.to, move.from, move.bytes);
      });
}

}  // namespace qgraph
