// Many steps of a tape as one primitive: MLX schedules it once, instead of once for every step.
//
// What MLX does for each op of a graph (find its place in an order, wake its stream's thread, keep its inputs
// until they are read) takes some microseconds: of a decode step with a thousand small ops, the better part.
#pragma once
#include "../primitive.h"

namespace qgraph {

// An op as it was recorded; `inputs` and `outputs` are places in a table of arrays.
struct Recorded {
  std::shared_ptr<mx::Primitive> primitive;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  std::vector<size_t> inputs, outputs;
};

using Values = std::vector<std::optional<mx::array>>;  // a table of arrays

class Replay;

// Steps that are run together, in order.
struct Whole {
  std::vector<Recorded> steps;
  size_t first = 0;                     // the first step that a replay may do
  std::vector<size_t> early;            // the inputs, by number, of steps before that
  std::shared_ptr<Replay> replay;       // null where there is a step that it cannot do
  std::vector<std::vector<bool>> last;  // of a step's inputs: whether no later step reads them, nor anybody else
  std::vector<size_t> inputs;           // places that are read and made by no step
  std::vector<size_t> overwritten;      // those of them, by number, that an update may write into
  std::vector<size_t> results;          // places that are made and read by others
  std::vector<mx::Shape> shapes;        // of the results
  std::vector<mx::Dtype> dtypes;
  std::vector<mx::array> constants;     // kept: steps read them
  size_t places = 0;
};

// An input to be given on. MLX asks by the number of its holders whether a buffer may be overwritten: where only
// the primitive that runs holds the array, the buffer is taken out of it.
mx::array taken(const mx::array& input);

// The results for the inputs, unevaluated. Inputs that nobody else holds are overwritten where a step can.
Arrays run_whole(const std::shared_ptr<const Whole>& whole, Arrays inputs);

}  // namespace qgraph
