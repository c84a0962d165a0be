// Rotary positions.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "../module.h"
#include "../primitive.h"
#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/simd/simd.h"
#include "mlx/fast.h"

namespace qgraph {
namespace {

using Optional = std::optional<mx::array>;
using Floats = std::vector<float>;
using Speeds = std::shared_ptr<const Floats>;

struct Turn {
  int dims;
  bool traditional;
  std::optional<float> base;  // or the last input says the frequencies
  float scale;
  std::optional<int> offset;  // or the second input does
  bool operator==(const Turn&) const = default;
};

// Speeds of the pairs for a base: MLX's, by its own exponential. At position 1e5 a last bit of a speed is a
// hundredth of a turn, and a model may be run by this kernel and by MLX's rope in turns.
Speeds speeds_of(float base, int half) {
  struct Known {
    float base;
    int half;
    Speeds speeds;
  };
  static thread_local Known known{};  // a model asks for the same ones in every layer
  if (known.speeds && known.base == base && known.half == half) return known.speeds;
  Floats speeds(half);
  float step = std::log(base) / static_cast<float>(half);
  for (int i = 0; i < half; i++) {
    mx::simd::Simd<float, 1> power(static_cast<float>(-i) * step);
    speeds[i] = mx::simd::exp(power).value;
  }
  known = {base, half, std::make_shared<const Floats>(std::move(speeds))};
  return known.speeds;
}

// A vector of numbers that are read when the kernel runs: before, they may not be computed yet.
struct Numbers {
  const void* data;
  mx::Dtype dtype;
  int64_t count, stride;

  explicit Numbers(const mx::array& a)
      : data(a.data<void>()), dtype(a.dtype()), count(a.size()), stride(a.ndim() ? a.strides(0) : 0) {}

  template <class T, class F> Floats each(const F& f) const {
    Floats all(count);
    for (int64_t i = 0; i < count; i++) all[i] = f(static_cast<const T*>(data)[i * stride]);
    return all;
  }
  // Integers as MLX adds them to positions: those of other sizes than 32 bits become int32.
  template <class T> Floats integers() const {
    return each<T>([](T a) { return static_cast<float>(static_cast<int32_t>(a)); });
  }
  Floats integers() const {
    switch (dtype.val()) {
      case mx::Dtype::Val::uint8: return integers<uint8_t>();
      case mx::Dtype::Val::int8: return integers<int8_t>();
      case mx::Dtype::Val::uint16: return integers<uint16_t>();
      case mx::Dtype::Val::int16: return integers<int16_t>();
      case mx::Dtype::Val::uint32: return each<uint32_t>([](uint32_t a) { return static_cast<float>(a); });
      case mx::Dtype::Val::uint64: return integers<uint64_t>();
      case mx::Dtype::Val::int64: return integers<int64_t>();
      default: return integers<int32_t>();
    }
  }
  Floats reciprocals() const {
    return each<float>([](float a) { return 1.0f / a; });
  }
};

// (batch, heads, length) of x, and their strides; false where the axes of the heads are no single axis.
bool axes_of(const mx::array& x, Rows& rows) {
  int n = static_cast<int>(x.ndim());
  if (x.strides(-1) != 1 && x.shape(-1) != 1) return false;
  int64_t heads = 1, stride = 0;
  for (int i = n - 3; i > 0; i--) {
    if (x.shape(i) == 1) continue;
    if (heads == 1) stride = x.strides(i);
    else if (x.strides(i) != heads * stride) return false;
    heads *= x.shape(i);
  }
  int64_t sizes[] = {x.shape(0), heads, x.shape(-2), 1};
  int64_t strides[] = {x.strides(0), stride, x.strides(-2), 0};
  std::copy(sizes, sizes + 4, rows.sizes);
  std::copy(strides, strides + 4, rows.strides);
  rows.columns = x.shape(-1);
  return true;
}

// Memory for `out` without gaps, its axes in the order in which those of x lie: (batch, length, heads)
// where x is a transposed view, so that rows are written as they are read.
void allocate_as(const mx::array& x, mx::array& out) {
  std::vector<int> order(x.ndim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end() - 1, [&](int a, int b) { return x.strides(a) > x.strides(b); });
  mx::Strides strides(x.ndim());
  int64_t stride = 1;
  for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
    strides[*axis] = stride;
    stride *= x.shape(*axis);
  }
  auto [size, row, column] = mx::check_contiguity(x.shape(), strides);
  mx::array::Flags flags{};
  flags.contiguous = true, flags.row_contiguous = row, flags.col_contiguous = column;
  out.set_data(mx::allocator::malloc(out.nbytes()), size, strides, flags);
}

class RopePrimitive : public Native {
 public:
  static mx::array make(Turn how, Arrays inputs, mx::Stream s) {
    auto shape = inputs[0].shape();
    auto dtype = inputs[0].dtype();
    auto primitive = std::make_shared<RopePrimitive>(s, formula(how, dtype, s), how);
    return mx::array(std::move(shape), dtype, std::move(primitive), std::move(inputs));
  }

  RopePrimitive(mx::Stream stream, Formula formula, Turn how) : Native(stream, std::move(formula)), how_(how) {
    if (how.base) speeds_ = speeds_of(*how.base, how.dims / 2);
  }
  const char* name() const override { return "QgraphRope"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto* rope = dynamic_cast<const RopePrimitive*>(&other);
    return rope && rope->how_ == how_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {in[0].shape()}; }

  // The gradient in x turns the other way.
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    if (argnums != std::vector<int>{0}) return Native::vjp(primals, cotangents, argnums, outputs);
    Turn back = how_;
    back.scale = -how_.scale;
    Arrays inputs = primals;
    inputs[0] = mx::astype(cotangents[0], primals[0].dtype(), stream());
    return {make(back, std::move(inputs), stream())};
  }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    if (out.size() == 0) return allocate(out);
    const mx::array& x = in[0];
    Rope call{};
    call.rows.type = type_of(x.dtype());
    if (axes_of(x, call.rows)) {
      call.rows.x = x.data<void>();
      bool dense = x.flags().contiguous && x.data_size() == x.size();
      if (dense && mx::is_donatable(x, out)) out.copy_shared_buffer(x);
      else allocate_as(x, out);
    } else {
      mx::array copy = row_major(x);
      axes_of(copy, call.rows);
      call.rows.x = copy.data<void>();
      allocate(out);
    }
    Rows y{};
    axes_of(out, y);
    std::copy(y.strides, y.strides + 3, call.y_strides);
    call.rows.y = out.data<void>();
    call.dims = how_.dims, call.traditional = how_.traditional, call.scale = how_.scale;
    std::optional<Numbers> offsets, frequencies;
    if (!how_.offset) offsets.emplace(in[1]);
    if (!how_.base) frequencies.emplace(in.back());
    call.offset_step = offsets && offsets->count > 1;
    float offset = static_cast<float>(how_.offset.value_or(0));
    dispatch(in, out, [call, offsets, frequencies, offset, speeds = speeds_]() {
      Rope c = call;
      Floats starts = offsets ? offsets->integers() : Floats{offset};
      Floats given = frequencies ? frequencies->reciprocals() : Floats{};
      c.speeds = frequencies ? given.data() : speeds->data();
      c.offsets = starts.data();
      kernels().rope(c);
    });
  }

 private:
  static Formula formula(Turn how, mx::Dtype dtype, mx::Stream s) {
    return [=](const Arrays& in) -> Arrays {
      auto x = mx::astype(in[0], mx::float32, s);
      Optional frequencies;
      if (!how.base) frequencies = in.back();
      auto turned = [&](const auto& offset) {
        return mx::fast::rope(x, how.dims, how.traditional, how.base, how.scale, offset, frequencies, s);
      };
      return {mx::astype(how.offset ? turned(*how.offset) : turned(in[1]), dtype, s)};
    };
  }

  Turn how_;
  Speeds speeds_;  // null where the last input says the frequencies
};

using Offset = std::variant<int, mx::array>;

mx::array rope(const mx::array& x, int dims, bool traditional, std::optional<float> base, float scale,
               const Offset& offset, const Optional& freqs) {
  type_of(x.dtype());
  if (x.ndim() < 3) throw std::invalid_argument("rope: x has fewer than 3 axes");
  if (dims <= 0 || dims % 2 || dims > x.shape(-1))
    throw std::invalid_argument("rope: dims must be even and from 2 to the last axis of x, " +
                                std::to_string(x.shape(-1)) + "; it is " + std::to_string(dims));
  if (base.has_value() == freqs.has_value())
    throw std::invalid_argument("rope: needs either a base or frequencies");
  if (freqs && (freqs->ndim() != 1 || freqs->shape(0) != dims / 2))
    throw std::invalid_argument("rope: there must be dims / 2 frequencies, " + std::to_string(dims / 2));
  Arrays inputs{x};
  Turn how{dims, traditional, base, scale, std::nullopt};
  if (auto* given = std::get_if<mx::array>(&offset)) {
    if (!mx::issubdtype(given->dtype(), mx::integer))
      throw std::invalid_argument("rope: the offset is no integer");
    if (given->ndim() > 1 || (given->size() != 1 && static_cast<int>(given->size()) != x.shape(0)))
      throw std::invalid_argument("rope: there must be one offset, or one for each of " +
                                  std::to_string(x.shape(0)) + " batches");
    inputs.push_back(*given);
  } else {
    how.offset = std::get<int>(offset);
  }
  auto stream = current_stream();
  if (freqs) inputs.push_back(mx::astype(*freqs, mx::float32, stream));
  return RopePrimitive::make(how, std::move(inputs), stream);
}

}  // namespace

void bind_rope(nb::module_& m) {
  using namespace nb::literals;
  m.def("rope", &rope, "x"_a, "dims"_a, nb::kw_only(), "traditional"_a, "base"_a.none(), "scale"_a,
        "offset"_a, "freqs"_a = nb::none());
}

}  // namespace qgraph
