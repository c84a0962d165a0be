// A program run once in Python, and from then on built in C++: no Python an op.
//
// mx.compile does the same, and more: on a CPU it also fuses element-wise ops by running a C++ compiler.
#include <algorithm>
#include <map>
#include <unordered_map>

#include "../module.h"
#include "replay.h"

namespace qgraph {
namespace {

// The steps of a program. Those on which several results depend are run as a whole; what only one result
// needs stays ops of its own, so that a result that nobody evaluates costs nothing.
class Tape {
 public:
  // Run `program` on arrays that stand for `examples`, and keep the ops that it made.
  Tape(nb::callable program, nb::args examples) {
    Arrays stand_ins;
    nb::list arguments;
    for (nb::handle example : examples) {
      auto like = nb::cast<mx::array>(example);
      mx::array stand_in(like.shape(), like.dtype(), nullptr, {});
      stand_in.set_tracer(true);
      place_[stand_in.id()] = places_++;
      stand_ins.push_back(stand_in);
      arguments.append(nb::cast(stand_in));
    }
    arity_ = stand_ins.size();
    nb::tuple results = nb::cast<nb::tuple>(program(*nb::tuple(arguments)));
    Arrays outputs;
    for (nb::handle result : results) outputs.push_back(nb::cast<mx::array>(result));
    for (auto& output : outputs) record(output);
    for (auto& output : outputs) outputs_.push_back(place_.at(output.id()));
    place_.clear();
    kept_.clear();
    divide();
  }

  nb::tuple operator()(Arrays arguments) const {
    if (arguments.size() != arity_) throw std::invalid_argument("a tape got another number of arrays");
    Values values(places_);
    for (size_t i = 0; i < arity_; i++) values[i] = std::move(arguments[i]);
    for (auto& [place, array] : constants_) values[place] = array;
    if (whole_) {
      Arrays inputs;
      for (size_t place : whole_->inputs) inputs.push_back(*values[place]);
      auto made = run_whole(whole_, std::move(inputs));
      for (size_t i = 0; i < made.size(); i++) values[whole_->results[i]] = std::move(made[i]);
      for (size_t n : rest_) make(steps_[n], values);
    } else {
      for (auto& step : steps_) make(step, values);
    }
    nb::list results;
    for (size_t place : outputs_) results.append(nb::cast(*values[place]));
    return nb::tuple(results);
  }

 private:
  static void make(const Recorded& step, Values& values) {
    Arrays inputs;
    inputs.reserve(step.inputs.size());
    for (size_t place : step.inputs) inputs.push_back(*values[place]);
    if (step.outputs.size() == 1) {
      values[step.outputs[0]] = mx::array(step.shapes[0], step.dtypes[0], step.primitive, std::move(inputs));
      return;
    }
    auto made = mx::array::make_arrays(step.shapes, step.dtypes, step.primitive, inputs);
    for (size_t i = 0; i < made.size(); i++) values[step.outputs[i]] = made[i];
  }

  // The ops behind `output`, inputs first; without recursion, since a chain may be long.
  void record(const mx::array& output) {
    std::vector<std::pair<mx::array, size_t>> path{{output, 0}};
    while (!path.empty()) {
      auto& [array, next] = path.back();
      if (place_.count(array.id())) {
        path.pop_back();
      } else if (!array.has_primitive()) {
        if (array.is_tracer()) throw std::invalid_argument("a program used an array of another trace");
        constants_.emplace_back(place_[array.id()] = places_++, array);
        kept_.push_back(array);
        path.pop_back();
      } else if (next < array.inputs().size()) {
        auto input = array.inputs()[next++];  // a copy: the path may move in memory
        path.emplace_back(input, 0);
      } else {
        add(array);
        path.pop_back();
      }
    }
  }

  void add(mx::array array) {
    Recorded step{array.primitive_ptr(), {}, {}, {}, {}};
    for (auto& input : array.inputs()) step.inputs.push_back(place_.at(input.id()));
    for (auto& one : array.outputs()) {
      step.shapes.push_back(one.shape());
      step.dtypes.push_back(one.dtype());
      step.outputs.push_back(place_[one.id()] = places_++);
      kept_.push_back(one);  // ids are addresses: what has one stays until all are placed
    }
    steps_.push_back(std::move(step));
  }

  // Find the steps that are run as a whole: those of several results, or of the only one.
  void divide() {
    constexpr size_t WORTH = 8;  // steps: fewer are not
    std::vector<int> maker(places_, -1), needed(steps_.size(), 0);
    for (size_t n = 0; n < steps_.size(); n++)
      for (size_t place : steps_[n].outputs) maker[place] = static_cast<int>(n);
    std::vector<size_t> results;
    for (size_t place : outputs_)
      if (maker[place] >= 0 && !std::count(results.begin(), results.end(), place)) results.push_back(place);
    std::vector<int> seen(steps_.size(), -1);
    for (size_t r = 0; r < results.size(); r++) {
      std::vector<int> open{maker[results[r]]};
      while (!open.empty()) {
        int n = open.back();
        open.pop_back();
        if (n < 0 || seen[n] == static_cast<int>(r)) continue;
        seen[n] = static_cast<int>(r), needed[n]++;
        for (size_t place : steps_[n].inputs) open.push_back(maker[place]);
      }
    }
    const int several = results.size() > 1 ? 2 : 1;
    if (several > 1) add_readers(maker, needed);
    auto whole = std::make_shared<Whole>();
    std::vector<bool> inside(steps_.size());
    for (size_t n = 0; n < steps_.size(); n++) {
      inside[n] = needed[n] >= several && steps_[n].primitive->device() == mx::Device::cpu;
      inside[n] = inside[n] && steps_[n].primitive->stream() == steps_[0].primitive->stream();
      if (inside[n]) whole->steps.push_back(steps_[n]);
      else if (needed[n] >= several) return;  // on another stream: MLX must see to the order
      else rest_.push_back(n);
    }
    if (whole->steps.size() < WORTH) return;
    put_first(*whole);
    connect(*whole, maker, inside);
    if (whole->first < whole->steps.size() && Replay::worth(whole->steps, whole->first))
      whole->replay = std::make_shared<Replay>(*whole);
    whole_ = std::move(whole);
  }

  // What reads a cache that the whole overwrites belongs to the whole too, where that is little work: as an op of
  // its own it would hold the cache while the next run is made ready.
  void add_readers(const std::vector<int>& maker, std::vector<int>& needed) const {
    constexpr size_t LITTLE = 1 << 14;  // bytes of a result
    std::vector<bool> cache(places_);
    for (size_t n = 0; n < steps_.size(); n++) {
      auto& step = steps_[n];
      bool reads = updates(*step.primitive);
      for (size_t place : step.inputs) reads = reads || cache[place];
      if (!reads) continue;
      if (updates(*step.primitive) || kind_of(step) == Kind::view) {
        for (size_t place : step.outputs) cache[place] = true;
        continue;
      }
      std::vector<size_t> open{n};
      bool little = true;
      for (size_t i = 0; i < open.size() && little; i++) {
        little = bytes_made(steps_[open[i]]) <= LITTLE;
        for (size_t place : steps_[open[i]].inputs)
          if (maker[place] >= 0 && needed[maker[place]] == 1) open.push_back(maker[place]);
      }
      if (!little) continue;
      for (size_t m : open)
        if (needed[m] == 1) needed[m] = 2;
    }
  }

  // Put first what a replay leaves to MLX; all, where that is not possible.
  void put_first(Whole& whole) const {
    std::vector<bool> made(places_);  // by a step of the replay
    std::vector<Recorded> first, then;
    bool possible = true;
    for (auto& step : whole.steps) {
      const auto kind = kind_of(step);
      bool behind = kind == Kind::kernel;
      for (size_t place : step.inputs) behind = behind || made[place];
      possible = possible && !(behind && kind == Kind::other);
      if (behind)
        for (size_t place : step.outputs) made[place] = true;
      (behind ? then : first).push_back(step);
    }
    whole.first = possible ? first.size() : whole.steps.size();
    if (!possible) return;
    whole.steps = std::move(first);
    whole.steps.insert(whole.steps.end(), then.begin(), then.end());
  }

  void connect(Whole& whole, const std::vector<int>& maker, const std::vector<bool>& inside) const {
    whole.places = places_;
    std::vector<bool> wanted(places_), listed(places_);
    for (size_t place : outputs_) wanted[place] = true;
    for (size_t n : rest_)
      for (size_t place : steps_[n].inputs) wanted[place] = true;
    for (auto& step : whole.steps) {
      for (size_t place : step.inputs) {
        if (listed[place] || (maker[place] >= 0 && inside[maker[place]])) continue;
        listed[place] = true;
        whole.inputs.push_back(place);
      }
      for (size_t i = 0; i < step.outputs.size(); i++) {
        if (!wanted[step.outputs[i]]) continue;
        whole.results.push_back(step.outputs[i]);
        whole.shapes.push_back(step.shapes[i]);
        whole.dtypes.push_back(step.dtypes[i]);
      }
    }
    // From behind, the first reader that is met is the last one.
    std::vector<bool> read(places_);
    for (size_t place : whole.results) read[place] = true;
    whole.last.resize(whole.steps.size());
    for (size_t n = whole.steps.size(); n-- > 0;) {
      auto& inputs = whole.steps[n].inputs;
      whole.last[n].resize(inputs.size());
      for (size_t i = inputs.size(); i-- > 0;) {
        whole.last[n][i] = !read[inputs[i]];
        read[inputs[i]] = true;
      }
    }
    std::vector<bool> early(places_), written(places_);
    for (size_t n = whole.steps.size(); n-- > 0;) {
      auto& step = whole.steps[n];
      bool passed_on = updates(*step.primitive);
      for (size_t place : step.outputs) passed_on = passed_on || (kind_of(step) == Kind::view && written[place]);
      if (passed_on) written[step.inputs[0]] = true;
    }
    for (size_t n = 0; n < whole.first; n++)
      for (size_t place : whole.steps[n].inputs) early[place] = true;
    for (size_t i = 0; i < whole.inputs.size(); i++)
      if (early[whole.inputs[i]]) whole.early.push_back(i);
    for (size_t i = 0; i < whole.inputs.size(); i++)
      if (written[whole.inputs[i]]) whole.overwritten.push_back(i);
    for (auto& [place, array] : constants_) whole.constants.push_back(array);
  }

  size_t arity_ = 0, places_ = 0;
  std::vector<Recorded> steps_;
  std::vector<std::pair<size_t, mx::array>> constants_;
  std::vector<size_t> outputs_;
  std::shared_ptr<const Whole> whole_;  // null where there is none
  std::vector<size_t> rest_;            // steps that are not in it
  std::unordered_map<std::uintptr_t, size_t> place_;
  Arrays kept_;
};

// A program with a tape for every stream on which it is called: ops remember the one they were made on. Every
// thread has a stream of its own, numbered as they come; threads end, so only the last few tapes are kept.
//
// A transformation of MLX gets ops of its own: mx.vmap writes the new axis into those that it meets (Reshape,
// Transpose), which a tape would then make again.
class Taped {
 public:
  explicit Taped(nb::callable program) : program_(std::move(program)) {}

  nb::object operator()(nb::args arguments) {
    Arrays given;
    for (nb::handle argument : arguments) {
      given.push_back(nb::cast<mx::array>(argument));
      if (given.back().is_tracer()) return program_(*arguments);
    }
    const int stream = current_stream().index;
    auto found = tapes_.find(stream);
    auto tape = found == tapes_.end() ? nullptr : found->second;
    if (!tape) {
      tape = std::make_shared<Tape>(program_, arguments);
      tapes_[stream] = tape;
      if (tapes_.size() > KEPT) tapes_.erase(tapes_.begin()->first == stream ? std::prev(tapes_.end()) : tapes_.begin());
    }
    return (*tape)(std::move(given));
  }

 private:
  static constexpr size_t KEPT = 8;
  nb::callable program_;
  std::map<int, std::shared_ptr<Tape>> tapes_;
};

}  // namespace

void bind_tape(nb::module_& m) {
  m.def("replays", &replays, "How many runs of programs have repeated the calls of an earlier one.");
  nb::class_<Taped>(m, "Taped", "A program of arrays, whose ops are made without Python from its second call on.")
      .def(nb::init<nb::callable>())
      .def("__call__", &Taped::operator());
}

}  // namespace qgraph
