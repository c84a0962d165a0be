// A program run once in Python, and from then on built in C++: no Python an op.
//
// mx.compile does the same, and more: on a CPU it also fuses element-wise ops by running a C++ compiler.
#include <map>
#include <unordered_map>

#include "../module.h"
#include "../primitive.h"

namespace qgraph {
namespace {

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
  }

  nb::tuple operator()(nb::args arguments) const {
    if (arguments.size() != arity_) throw std::invalid_argument("a tape got another number of arrays");
    std::vector<std::optional<mx::array>> values(places_);
    for (size_t i = 0; i < arity_; i++) values[i] = nb::cast<mx::array>(arguments[i]);
    for (auto& [place, array] : constants_) values[place] = array;
    Arrays inputs;
    for (auto& step : steps_) {
      inputs.clear();
      for (size_t place : step.inputs) inputs.push_back(*values[place]);
      if (step.outputs.size() == 1) {
        values[step.outputs[0]] = mx::array(step.shapes[0], step.dtypes[0], step.primitive, inputs);
      } else {
        auto made = mx::array::make_arrays(step.shapes, step.dtypes, step.primitive, inputs);
        for (size_t i = 0; i < made.size(); i++) values[step.outputs[i]] = made[i];
      }
    }
    nb::list results;
    for (size_t place : outputs_) results.append(nb::cast(*values[place]));
    return nb::tuple(results);
  }

 private:
  struct Step {
    std::shared_ptr<mx::Primitive> primitive;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    std::vector<size_t> inputs, outputs;
  };

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
    Step step{array.primitive_ptr(), {}, {}, {}, {}};
    for (auto& input : array.inputs()) step.inputs.push_back(place_.at(input.id()));
    for (auto& one : array.outputs()) {
      step.shapes.push_back(one.shape());
      step.dtypes.push_back(one.dtype());
      step.outputs.push_back(place_[one.id()] = places_++);
      kept_.push_back(one);  // ids are addresses: what has one stays until all are placed
    }
    steps_.push_back(std::move(step));
  }

  size_t arity_ = 0, places_ = 0;
  std::vector<Step> steps_;
  std::vector<std::pair<size_t, mx::array>> constants_;
  std::vector<size_t> outputs_;
  std::unordered_map<std::uintptr_t, size_t> place_;
  Arrays kept_;
};

// A program with a tape for every stream on which it is called: ops remember the one they were made on.
class Taped {
 public:
  explicit Taped(nb::callable program) : program_(std::move(program)) {}

  nb::tuple operator()(nb::args arguments) {
    auto& tape = tapes_[current_stream().index];
    if (!tape) {
      auto made = std::make_shared<Tape>(program_, arguments);
      tapes_[current_stream().index] = made;  // not `tape`: the program may have let other threads in
      return (*made)(arguments);
    }
    return (*std::shared_ptr<Tape>(tape))(arguments);
  }

 private:
  nb::callable program_;
  std::map<int, std::shared_ptr<Tape>> tapes_;
};

}  // namespace

void bind_tape(nb::module_& m) {
  nb::class_<Taped>(m, "Taped", "A program of arrays, whose ops are made without Python from its second call on.")
      .def(nb::init<nb::callable>())
      .def("__call__", &Taped::operator());
}

}  // namespace qgraph
