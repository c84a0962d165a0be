#include "packed.h"

#include <cstring>
#include <limits>

namespace qgraph {

namespace {

// nvfp4's global scale is divided by the largest values of its two formats, 448 (e4m3) and 6 (e2m1).
constexpr float GLOBAL_SCALE_DIVISOR = 448 * 6;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

int64_t product(const mx::Shape& shape, size_t from, size_t to) {
  int64_t n = 1;
  for (size_t i = from; i < to; i++) n *= shape[i];
  return n;
}

}  // namespace

Scheme scheme(const std::string& mode, int bits, int group) {
  if (mode == "affine") {
    if ((bits < 1 || bits > 8 || bits == 7) || (group != 32 && group != 64 && group != 128))
      refuse("affine packs 1, 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128");
    return {Mode::affine, mode, bits, group};
  }
  if (mode == "mxfp4" && bits == 4 && group == 32) return {Mode::mxfp4, mode, bits, group};
  if (mode == "mxfp8" && bits == 8 && group == 32) return {Mode::mxfp8, mode, bits, group};
  if (mode == "nvfp4" && bits == 4 && group == 16) return {Mode::nvfp4, mode, bits, group};
  refuse("no packing '" + mode + "' of " + std::to_string(bits) + " bits in groups of " + std::to_string(group));
}

mx::Shape logical_shape(const Scheme& s, const mx::array& w) {
  auto shape = w.shape();
  shape.back() = static_cast<int>(static_cast<int64_t>(shape.back()) * 32 / s.bits);
  return shape;
}

Arrays components(
    const Scheme& s,
    const mx::array& w,
    const mx::array& scales,
    const std::optional<mx::array>& biases,
    const std::optional<mx::array>& global_scale) {
  if (w.ndim() < 2 || w.dtype() != mx::uint32) refuse("packed words are uint32 matrices");
  auto shape = logical_shape(s, w);
  shape.back() /= s.group;
  if (static_cast<int64_t>(w.shape(-1)) * 32 != static_cast<int64_t>(shape.back()) * s.group * s.bits)
    refuse("packed words of " + std::to_string(w.shape(-1)) + " columns hold no whole groups");
  if (scales.shape() != shape) refuse("the scales do not have one entry a group of the packed words");
  if ((s.mode == Mode::affine) != biases.has_value()) refuse("biases belong to affine packing, and to no other");
  Arrays all{w};
  if (s.mode == Mode::affine) {
    if (biases->shape() != shape) refuse("the biases do not have one entry a group of the packed words");
    if (!mx::issubdtype(scales.dtype(), mx::floating)) refuse("affine scales are floats");
    bool same = scales.dtype() == biases->dtype() && scales.dtype() != mx::float64;
    all.push_back(same ? scales : mx::astype(scales, mx::float32));
    all.push_back(same ? *biases : mx::astype(*biases, mx::float32));
  } else {
    if (scales.dtype() != mx::uint8) refuse("the scales of " + s.name + " are bytes");
    all.push_back(scales);
  }
  if (global_scale) {
    if (s.mode != Mode::nvfp4 || global_scale->size() != 1 || global_scale->dtype() != mx::float32)
      refuse("a global scale is one float32 number, for nvfp4 only");
    all.push_back(*global_scale);
  }
  return all;
}

Stack::Stack(const Scheme& s, const Arrays& c, bool has_global) {
  bool affine = s.mode == Mode::affine;
  auto shape = logical_shape(s, c[0]);
  first = {
      c[0].data<uint32_t>(),
      c[1].data<void>(),
      affine ? c[2].data<void>() : nullptr,
      affine ? type_of(c[1].dtype()) : Type::f32,
      s.mode,
      s.bits,
      s.group,
      1.0f,
      shape[shape.size() - 2],
      shape.back(),
  };
  global = has_global ? c.back().data<float>() : nullptr;
}

Packed Stack::at(int64_t index) const {
  Packed p = first;
  int64_t groups = index * p.rows * p.groups();
  int size = p.mode == Mode::affine ? size_of(p.scales_type) : 1;
  p.words += index * p.rows * (p.row_bytes() / 4);
  p.scales = static_cast<const char*>(p.scales) + groups * size;
  if (p.biases) p.biases = static_cast<const char*>(p.biases) + groups * size;
  if (global) p.global = *global / GLOBAL_SCALE_DIVISOR;
  return p;
}

mx::array dequantized(const Scheme& s, const Arrays& c, bool has_global) {
  bool affine = s.mode == Mode::affine;
  auto wide = [](const mx::array& a) { return mx::astype(a, mx::float32); };
  auto biases = affine ? std::optional<mx::array>(wide(c[2])) : std::nullopt;
  auto out = mx::dequantize(
      c[0], affine ? wide(c[1]) : c[1], biases, s.group, s.bits, s.name, std::nullopt, mx::float32);
  return has_global ? mx::multiply(out, mx::divide(c.back(), mx::array(GLOBAL_SCALE_DIVISOR))) : out;
}

std::vector<int64_t> offsets(const mx::Shape& shape, const mx::Shape& to, int64_t unit) {
  std::vector<int64_t> strides(to.size(), 0);
  int64_t stride = unit;
  for (size_t i = shape.size(), j = to.size(); i-- > 0;) {
    if (shape[i] != 1) strides[j - 1] = stride;
    stride *= shape[i], j--;
  }
  std::vector<int64_t> out(product(to, 0, to.size()), 0);
  int64_t period = 1;
  for (size_t j = to.size(); j-- > 0; period *= to[j])
    for (size_t n = 0; n < out.size(); n++) out[n] += static_cast<int64_t>(n) / period % to[j] * strides[j];
  return out;
}

namespace {

template <class T> std::vector<int64_t> copied(const void* data, int64_t size) {
  auto* p = static_cast<const T*>(data);
  return std::vector<int64_t>(p, p + size);
}

}  // namespace

std::vector<int64_t> integers(const void* data, mx::Dtype dtype, int64_t size) {
  switch (dtype.val()) {
    case mx::Dtype::Val::bool_:
    case mx::Dtype::Val::uint8: return copied<uint8_t>(data, size);
    case mx::Dtype::Val::uint16: return copied<uint16_t>(data, size);
    case mx::Dtype::Val::uint32: return copied<uint32_t>(data, size);
    case mx::Dtype::Val::int8: return copied<int8_t>(data, size);
    case mx::Dtype::Val::int16: return copied<int16_t>(data, size);
    case mx::Dtype::Val::int32: return copied<int32_t>(data, size);
    case mx::Dtype::Val::int64: return copied<int64_t>(data, size);
    case mx::Dtype::Val::uint64: {
      std::vector<int64_t> out = copied<int64_t>(data, size);
      for (auto& i : out)
        if (i < 0) i = std::numeric_limits<int64_t>::max();  // beyond every axis, not counted from its end
      return out;
    }
    default: refuse("indices are integers");
  }
}

}  // namespace qgraph
