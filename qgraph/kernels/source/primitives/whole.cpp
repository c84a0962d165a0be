#include "whole.h"

#include <atomic>

#include "mlx/scheduler.h"
#include "replay.h"

namespace qgraph {
namespace {

constexpr size_t TOGETHER = 32;          // buffers that are let go by one task
constexpr size_t AHEAD = size_t(1) << 27;  // bytes that steps may allocate before those before them have run
constexpr int TASKS = 2;                 // of the scheduler, that may be left of those then

// What one run made, until it is asked for.
struct Run {
  std::vector<std::optional<mx::array>> results;
};

// Buffers that queued kernels read, held until those have run.
class Held {
 public:
  explicit Held(mx::Stream stream) : encoder_(mx::cpu::get_command_encoder(stream)) {}
  ~Held() { let_go(); }

  // The inputs of a step that nobody reads any more, but for those whose buffer is the result's now.
  void hold(const Arrays& inputs, const std::vector<bool>& last, const Arrays& made) {
    for (size_t i = 0; i < inputs.size(); i++) {
      if (!last[i]) continue;
      auto& data = inputs[i].data_shared_ptr();
      bool passed_on = false;
      for (auto& out : made) passed_on = passed_on || out.data_shared_ptr() == data;
      if (!passed_on) buffers_.push_back(data);
    }
    for (auto& out : made) allocated_ += out.nbytes();
    if (allocated_ > AHEAD) {
      let_go();
      while (mx::scheduler::n_active_tasks() > TASKS) mx::scheduler::wait_for_one();
      allocated_ = 0;
    } else if (buffers_.size() >= TOGETHER) {
      let_go();
    }
  }
  void hold(const mx::array& array) { buffers_.push_back(array.data_shared_ptr()); }
  void hold(const std::shared_ptr<const Whole>& whole) {
    encoder_.dispatch([whole]() {});
  }
  void let_go() {
    if (buffers_.empty() && encoder_.temporaries().empty()) return;
    encoder_.dispatch([buffers = std::move(buffers_), arrays = std::move(encoder_.temporaries())]() {});
    buffers_.clear();
    encoder_.temporaries().clear();
  }

 private:
  mx::cpu::CommandEncoder& encoder_;
  std::vector<std::shared_ptr<mx::array::Data>> buffers_;
  size_t allocated_ = 0;
};

// Wait until all that is queued on a stream has run. Until then it holds the buffers that it reads, and no step
// could overwrite one: a cache that goes from run to run would be copied.
void drain(mx::Stream stream) {
  auto through = std::make_shared<std::atomic<bool>>(false);
  mx::cpu::get_command_encoder(stream).dispatch([through]() {
    through->store(true);
    through->notify_all();
  });
  through->wait(false);
}

// Runs all steps; its own result means nothing but that they were started.
class WholePrimitive : public mx::Primitive {
 public:
  WholePrimitive(mx::Stream s, std::shared_ptr<const Whole> whole, std::shared_ptr<Run> run)
      : mx::Primitive(s), whole_(std::move(whole)), run_(std::move(run)) {}
  const char* name() const override { return "QgraphWhole"; }
  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("QgraphWhole: not for a GPU"); }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    allocate(outputs[0]);
    Values values(whole_->places);
    Held held(stream());
    auto& replay = whole_->replay;
    size_t n = 0;
    bool replayed = false;
    if (replay) {
      for (size_t i : whole_->early) values[whole_->inputs[i]] = taken(inputs[i]);
      for (; n < whole_->first; n++) step(whole_->steps[n], whole_->last[n], values, held);
      replayed = replay->repeat(*whole_, inputs, values, [this] { drain(stream()); });
    }
    if (!replayed) {
      take(inputs, values, n);
      replayed = replay && replay->begin(*whole_, inputs, values);
    }
    if (!replayed) {
      for (; n < whole_->steps.size(); n++) step(whole_->steps[n], whole_->last[n], values, held);
      for (auto& value : values)  // results that nobody may ask for, and second outputs, are written all the same
        if (value) held.hold(*value);
    }
    for (size_t i = 0; i < whole_->results.size(); i++) values[whole_->results[i]].swap(run_->results[i]);
    held.hold(whole_);  // the constants
  }

 private:
  // All inputs that steps from the nth on read, when no task on the stream holds what is to be overwritten.
  void take(const Arrays& inputs, Values& values, size_t n) {
    for (size_t i : whole_->overwritten) {
      auto& input = inputs[i];
      if (input.is_donatable() || input.data_shared_ptr().use_count() == 1) continue;
      drain(stream());
      break;
    }
    std::vector<bool> read(whole_->places);
    for (; n < whole_->steps.size(); n++)
      for (size_t place : whole_->steps[n].inputs) read[place] = true;
    for (size_t i = 0; i < inputs.size(); i++) {
      auto& value = values[whole_->inputs[i]];
      if (!value && read[whole_->inputs[i]]) value = taken(inputs[i]);
    }
  }

  static void step(const Recorded& step, const std::vector<bool>& last, Values& values,
                   Held& held) {
    Arrays inputs, made;
    inputs.reserve(step.inputs.size());
    for (size_t i = 0; i < step.inputs.size(); i++) {
      auto& value = values[step.inputs[i]];
      if (last[i]) {
        inputs.push_back(std::move(*value));
        value.reset();
      } else {
        inputs.push_back(*value);
      }
    }
    // MLX's reshape asks its result for the primitive, and that for the stream.
    for (size_t i = 0; i < step.outputs.size(); i++)
      made.emplace_back(step.shapes[i], step.dtypes[i], step.primitive, Arrays{});
    step.primitive->eval_cpu(inputs, made);
    held.hold(inputs, last, made);
    for (size_t i = 0; i < made.size(); i++) values[step.outputs[i]] = std::move(made[i]);
  }

  std::shared_ptr<const Whole> whole_;
  std::shared_ptr<Run> run_;
};

// One result of a run, when the steps have been started.
class ResultPrimitive : public mx::Primitive {
 public:
  ResultPrimitive(mx::Stream s, std::shared_ptr<Run> run, size_t number)
      : mx::Primitive(s), run_(std::move(run)), number_(number) {}
  const char* name() const override { return "QgraphResult"; }
  void eval_gpu(const Arrays&, Arrays&) override { throw std::runtime_error("QgraphResult: not for a GPU"); }
  void eval_cpu(const Arrays&, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(*run_->results[number_]);
    run_->results[number_].reset();
  }

 private:
  std::shared_ptr<Run> run_;
  size_t number_;
};

}  // namespace

mx::array taken(const mx::array& input) {
  if (!input.is_donatable()) return input;
  mx::array own(input.shape(), input.dtype(), nullptr, {});
  own.copy_shared_buffer(input);
  const_cast<mx::array&>(input).set_data(mx::allocator::malloc(0));
  return own;
}

Arrays run_whole(const std::shared_ptr<const Whole>& whole, Arrays inputs) {
  auto run = std::make_shared<Run>();
  run->results.resize(whole->results.size());
  auto stream = whole->steps[0].primitive->stream();
  mx::array started({1}, mx::uint8, std::make_shared<WholePrimitive>(stream, whole, run), std::move(inputs));
  Arrays results;
  for (size_t i = 0; i < whole->results.size(); i++)
    results.emplace_back(whole->shapes[i], whole->dtypes[i], std::make_shared<ResultPrimitive>(stream, run, i), Arrays{started});
  return results;
}

}  // namespace qgraph
