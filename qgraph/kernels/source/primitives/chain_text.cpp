#include "chain_text.h"

#include <algorithm>
#include <charconv>

namespace qgraph {
namespace {

using O = Operation;
using A = const Arrays&;

constexpr double CHEAP = 0.05, FUNCTION = 0.3, LANES = 10;

const Known KNOWN[] = {
    {"cast", O::copy, 1, [](A a) { return a[0]; }, CHEAP, true},
    {"negative", O::negative, 1, [](A a) { return mx::negative(a[0]); }, CHEAP, true},
    {"abs", O::abs, 1, [](A a) { return mx::abs(a[0]); }, CHEAP, true},
    {"square", O::square, 1, [](A a) { return mx::square(a[0]); }, CHEAP, false},
    {"cube", O::cube, 1, [](A a) { return mx::power(a[0], mx::array(3, a[0].dtype())); }, CHEAP, false},
    {"reciprocal", O::reciprocal, 1, [](A a) { return mx::reciprocal(a[0]); }, CHEAP, false},
    {"sqrt", O::sqrt, 1, [](A a) { return mx::sqrt(a[0]); }, FUNCTION, false},
    {"rsqrt", O::rsqrt, 1, [](A a) { return mx::rsqrt(a[0]); }, FUNCTION, false},
    {"floor", O::floor, 1, [](A a) { return mx::floor(a[0]); }, CHEAP, true},
    {"ceil", O::ceil, 1, [](A a) { return mx::ceil(a[0]); }, CHEAP, true},
    {"round", O::round, 1, [](A a) { return mx::round(a[0]); }, CHEAP, true},
    {"relu", O::relu, 1, [](A a) { return mx::maximum(a[0], mx::array(0, a[0].dtype())); }, CHEAP, true},
    {"exp", O::exp, 1, [](A a) { return mx::exp(a[0]); }, FUNCTION, false},
    {"expm1", O::expm1, 1, [](A a) { return mx::expm1(a[0]); }, FUNCTION, false},
    {"log", O::log, 1, [](A a) { return mx::log(a[0]); }, FUNCTION, false},
    {"log1p", O::log1p, 1, [](A a) { return mx::log1p(a[0]); }, FUNCTION, false},
    {"sin", O::sin, 1, [](A a) { return mx::sin(a[0]); }, FUNCTION, false},
    {"cos", O::cos, 1, [](A a) { return mx::cos(a[0]); }, FUNCTION, false},
    {"tanh", O::tanh, 1, [](A a) { return mx::tanh(a[0]); }, FUNCTION, false},
    {"sigmoid", O::sigmoid, 1, [](A a) { return mx::sigmoid(a[0]); }, FUNCTION, false},
    {"erf", O::erf, 1, [](A a) { return mx::erf(a[0]); }, FUNCTION, false},
    {"logical_not", O::logical_not, 1, [](A a) { return mx::logical_not(a[0]); }, CHEAP, true},
    {"add", O::add, 2, [](A a) { return mx::add(a[0], a[1]); }, CHEAP, false},
    {"subtract", O::subtract, 2, [](A a) { return mx::subtract(a[0], a[1]); }, CHEAP, false},
    {"multiply", O::multiply, 2, [](A a) { return mx::multiply(a[0], a[1]); }, CHEAP, false},
    {"divide", O::divide, 2, [](A a) { return mx::divide(a[0], a[1]); }, CHEAP, false},
    {"maximum", O::maximum, 2, [](A a) { return mx::maximum(a[0], a[1]); }, CHEAP, true},
    {"minimum", O::minimum, 2, [](A a) { return mx::minimum(a[0], a[1]); }, CHEAP, true},
    {"power", O::power, 2, [](A a) { return mx::power(a[0], a[1]); }, LANES, false},
    {"logaddexp", O::logaddexp, 2, [](A a) { return mx::logaddexp(a[0], a[1]); }, 2 * FUNCTION, false},
    {"equal", O::equal, 2, [](A a) { return mx::equal(a[0], a[1]); }, CHEAP, true},
    {"not_equal", O::not_equal, 2, [](A a) { return mx::not_equal(a[0], a[1]); }, CHEAP, true},
    {"less", O::less, 2, [](A a) { return mx::less(a[0], a[1]); }, CHEAP, true},
    {"less_equal", O::less_equal, 2, [](A a) { return mx::less_equal(a[0], a[1]); }, CHEAP, true},
    {"greater", O::greater, 2, [](A a) { return mx::greater(a[0], a[1]); }, CHEAP, true},
    {"greater_equal", O::greater_equal, 2, [](A a) { return mx::greater_equal(a[0], a[1]); }, CHEAP, true},
    {"logical_and", O::logical_and, 2, [](A a) { return mx::logical_and(a[0], a[1]); }, CHEAP, true},
    {"logical_or", O::logical_or, 2, [](A a) { return mx::logical_or(a[0], a[1]); }, CHEAP, true},
    {"where", O::where, 3, [](A a) { return mx::where(a[0], a[1], a[2]); }, CHEAP, true},
};

const Known& known(std::string_view name) {
  for (auto& k : KNOWN)
    if (k.name == name) return k;
  throw std::invalid_argument("elementwise: unknown operation '" + std::string(name) + "'");
}

mx::Dtype dtype_named(std::string_view name) {
  if (name == "f32") return mx::float32;
  if (name == "bf16") return mx::bfloat16;
  if (name == "f16") return mx::float16;
  if (name == "bool") return mx::bool_;
  throw std::invalid_argument("elementwise: a result of dtype '" + std::string(name) + "'");
}

template <class T> T number(std::string_view text) {
  T value{};
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    throw std::invalid_argument("elementwise: '" + std::string(text) + "' is no number");
  return value;
}

float rounded(double value, mx::Dtype dtype) {
  auto f = static_cast<float>(value);
  if (dtype == mx::bfloat16) return static_cast<float>(static_cast<mx::bfloat16_t>(f));
  if (dtype == mx::float16) return static_cast<float>(static_cast<mx::float16_t>(f));
  return dtype == mx::bool_ ? value != 0 : f;
}

// Everything up to `end`, which is taken off `text` as well.
std::string_view until(std::string_view& text, char end) {
  auto at = text.find(end);
  if (at == std::string_view::npos)
    throw std::invalid_argument("elementwise: no '" + std::string(1, end) + "'");
  auto part = text.substr(0, at);
  text.remove_prefix(at + 1);
  return part;
}

Step parse_step(std::string_view text, int below) {
  auto name = until(text, '('), inner = until(text, ')');
  if (text.empty() || text[0] != ':') throw std::invalid_argument("elementwise: a step without a dtype");
  Step step{nullptr, {}, 0, dtype_named(text.substr(1))};
  if (name == "constant") {
    step.value = rounded(number<double>(inner), step.dtype);
    return step;
  }
  step.known = &known(name);
  if (step.known->operation == O::copy && step.dtype == mx::bool_)
    throw std::invalid_argument("elementwise: a cast to bool");
  while (!inner.empty()) {
    auto one = inner.find(',') == std::string_view::npos ? std::exchange(inner, {}) : until(inner, ',');
    step.operands.push_back(number<int>(one));
    if (step.operands.back() < 0 || step.operands.back() >= below)
      throw std::invalid_argument("elementwise: step " + std::string(name) + " takes what is not yet made");
  }
  if (static_cast<int>(step.operands.size()) != step.known->arity)
    throw std::invalid_argument("elementwise: " + std::string(name) + " takes another number of operands");
  return step;
}

// Whether every number of `from` is one of `to`. (32-bit integers have become floats when they are read.)
bool holds(Element to, Element from) {
  return to == from || to == Element::f32 || from == Element::boolean;
}

}  // namespace

Element element_of(mx::Dtype dtype) {
  if (dtype == mx::bool_) return Element::boolean;
  if (dtype == mx::int32) return Element::i32;
  switch (type_of(dtype)) {
    case Type::bf16: return Element::bf16;
    case Type::f16: return Element::f16;
    default: return Element::f32;
  }
}

std::vector<Step> parse_chain(const std::string& text, int operands) {
  std::vector<Step> steps;
  for (std::string_view rest = text; !rest.empty();) {
    auto one = rest.find(' ') == std::string_view::npos ? std::exchange(rest, {}) : until(rest, ' ');
    steps.push_back(parse_step(one, operands + static_cast<int>(steps.size())));
  }
  if (steps.empty() || operands < 1 || steps.size() + operands > 200)
    throw std::invalid_argument("elementwise: a chain has an operand, a step, and fewer than 200 of both");
  return steps;
}

Compiled compile_chain(const std::vector<Step>& steps, const std::vector<mx::Dtype>& dtypes) {
  Compiled out;
  int first = static_cast<int>(dtypes.size()), all = first + static_cast<int>(steps.size());
  std::vector<Element> types;
  for (auto dtype : dtypes) types.push_back(element_of(dtype));
  for (auto& step : steps) types.push_back(element_of(step.dtype));

  // A cast that changes no number is another name of its operand.
  std::vector<int> same(all), last(all, 0);
  for (int v = 0; v < all; v++) {
    same[v] = v;
    if (v < first || !steps[v - first].known) continue;
    auto& step = steps[v - first];
    if (step.known->operation == O::copy && holds(types[v], types[step.operands[0]]))
      same[v] = same[step.operands[0]];
    for (int operand : step.operands) last[same[operand]] = v;
  }
  last[same[all - 1]] = all;

  std::vector<uint8_t> place(all), free;
  auto take = [&] {
    if (free.empty()) return static_cast<uint8_t>(out.registers++);
    auto r = free.back();
    free.pop_back();
    return r;
  };
  for (int v = 0; v < first; v++) out.operands.push_back(place[v] = take());
  // Constants are set once for all blocks: their registers are never freed.
  for (int v = first; v < all; v++) {
    if (steps[v - first].known) continue;
    out.constants.push_back({steps[v - first].value, place[v] = take()});
  }
  for (int v = first; v < all; v++) {
    auto& step = steps[v - first];
    if (!step.known || same[v] != v) continue;
    uint8_t from[3] = {0, 0, 0};
    bool exact = step.known->chooses;
    for (size_t i = 0; i < step.operands.size(); i++) {
      int operand = step.operands[i], root = same[operand];
      from[i] = place[root];
      bool condition = step.known->operation == O::where && i == 0;
      exact = exact && (types[v] == Element::boolean || condition || holds(types[v], types[operand]));
      bool constant = root >= first && !steps[root - first].known;
      if (last[root] == v && !constant) free.push_back(place[root]), last[root] = -1;
    }
    for (size_t i = step.operands.size(); i < 3; i++) from[i] = from[0];
    place[v] = take();
    exact = exact || v == all - 1;  // the last one is rounded when it is stored
    out.instructions.push_back(
        {step.known->operation, exact ? Element::f32 : types[v], place[v], from[0], from[1], from[2]});
    out.nanoseconds += step.known->nanoseconds;
  }
  out.result = place[same[all - 1]];
  out.nanoseconds += 0.05 * (first + 1);
  return out;
}

Arrays chain_formula(const std::vector<Step>& steps, const Arrays& operands) {
  Arrays values = operands;
  for (auto& step : steps) {
    if (!step.known) {
      values.push_back(mx::array(step.value, step.dtype));
      continue;
    }
    Arrays taken;
    for (int i : step.operands) taken.push_back(values[i]);
    values.push_back(mx::astype(step.known->formula(taken), step.dtype));
  }
  return {values.back()};
}

}  // namespace qgraph
