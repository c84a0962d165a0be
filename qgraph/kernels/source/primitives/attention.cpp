// scaled_dot_product_attention with MLX's meaning.
#include <cstring>

#include "../module.h"
#include "../primitive.h"
#include "mlx/fast.h"

namespace qgraph {
namespace {

using Optional = std::optional<mx::array>;

struct Scoring {
  float scale;
  bool causal, mask, sinks;

  bool operator==(const Scoring&) const = default;
};

std::string text(const mx::Shape& shape) {
  std::string s;
  for (int n : shape) s += (s.empty() ? "(" : ", ") + std::to_string(n);
  return s + ")";
}

void check(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument("scaled_dot_product_attention: " + sentence);
}

mx::Shape result_shape(const mx::array& q, const mx::array& v) {
  return {q.shape(0), q.shape(1), q.shape(2), v.shape(3)};
}

void check_shapes(const mx::array& q, const mx::array& k, const mx::array& v) {
  std::string shapes = text(q.shape()) + ", " + text(k.shape()) + ", " + text(v.shape());
  check(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, "q, k and v must have four axes; they are " + shapes);
  check(k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0), "q, k and v of unequal batches: " + shapes);
  check(k.shape(1) == v.shape(1) && k.shape(2) == v.shape(2), "k and v differ in heads or keys: " + shapes);
  check(q.shape(3) == k.shape(3), "q and k differ in their last axis: " + shapes);
  check(k.shape(1) ? q.shape(1) % k.shape(1) == 0 : q.shape(1) == 0,
        "the heads of q must be a multiple of those of k and v: " + shapes);
}

// In f32: MLX sums in the dtype of its inputs on a CPU.
Formula formula(Scoring how, mx::Dtype dtype) {
  return [=](const Arrays& in) -> Arrays {
    auto wide = [](const mx::array& x) { return x.dtype() == mx::bool_ ? x : mx::astype(x, mx::float32); };
    Optional mask, sinks;
    if (how.mask) mask = wide(in[3]);
    if (how.sinks) sinks = in.back();
    auto mode = how.causal ? "causal" : how.mask ? "array" : "";
    auto y = mx::fast::scaled_dot_product_attention(
        wide(in[0]), wide(in[1]), wide(in[2]), how.scale, mode, mask, sinks);
    return {mx::astype(y, dtype)};
  };
}

class AttentionPrimitive : public Native {
 public:
  AttentionPrimitive(mx::Stream s, Scoring how, mx::Dtype dtype) : Native(s, formula(how, dtype)), how_(how) {}

  const char* name() const override { return "QgraphAttention"; }
  bool is_equivalent(const mx::Primitive& o) const override {
    auto* p = dynamic_cast<const AttentionPrimitive*>(&o);
    return p && p->how_ == how_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& in) override { return {result_shape(in[0], in[2])}; }

 protected:
  void run(const Arrays& in, mx::array& out) override {
    lay_out(out);
    if (out.size() == 0) return;
    auto q = rows(in[0]), k = rows(in[1]), v = rows(in[2]);
    if (k.shape(2) == 0)
      return dispatch(in, out, [y = out.data<char>(), n = out.nbytes()] {
        std::memset(const_cast<char*>(y), 0, n);
      });
    Attention a{};
    a.q = q.data<void>(), a.k = k.data<void>(), a.v = v.data<void>();
    a.type = type_of(q.dtype());
    a.y = const_cast<void*>(static_cast<const void*>(out.data<void>()));
    for (int i = 0; i < 3; i++) {
      a.q_strides[i] = q.strides(i), a.k_strides[i] = k.strides(i), a.v_strides[i] = v.strides(i);
      a.y_strides[i] = out.strides(i);
    }
    a.batch = q.shape(0), a.heads = q.shape(1), a.queries = q.shape(2), a.dims = q.shape(3);
    a.kv_heads = k.shape(1), a.keys = k.shape(2), a.v_dims = v.shape(3);
    a.scale = how_.scale, a.causal = how_.causal;
    if (how_.mask) put_mask(in[3], a);
    if (how_.sinks) a.sinks = row_major(in.back()).data<float>();
    dispatch(in, out, [a] { kernels().attention(a); });
  }

 private:
  // Memory in the order (batch, length, heads, dims), which a model transposes to next.
  static void lay_out(mx::array& out) {
    int64_t heads = out.shape(1), length = out.shape(2), dims = out.shape(3);
    if (heads == 1 || length == 1 || out.size() == 0) return allocate(out);
    mx::Strides strides = {length * heads * dims, dims, heads * dims, 1};
    mx::array::Flags flags{};
    flags.contiguous = true;
    out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), strides, flags);
  }

  mx::array rows(const mx::array& x) { return x.strides(3) == 1 || x.shape(3) == 1 ? x : row_major(x); }

  static void put_mask(const mx::array& mask, Attention& a) {
    a.mask = mask.data<void>();
    a.mask_is_bool = mask.dtype() == mx::bool_;
    if (!a.mask_is_bool) a.mask_type = type_of(mask.dtype());
    int missing = 4 - static_cast<int>(mask.ndim());
    for (int i = 0; i < 4; i++)  // an axis that is missing or of size 1 is broadcast
      a.mask_strides[i] = i < missing || mask.shape(i - missing) == 1 ? 0 : mask.strides(i - missing);
  }

  Scoring how_;
};

// The mask as the kernel takes it: bool, or a float that fits the result's dtype.
mx::array fitted(const mx::array& mask, const mx::array& q, const mx::array& k, mx::Dtype dtype) {
  check(mask.ndim() <= 4, "the mask has more than four axes: " + text(mask.shape()));
  mx::Shape scores = {q.shape(0), q.shape(1), q.shape(2), k.shape(2)};
  check(mx::broadcast_shapes(mask.shape(), scores) == scores,
        "the mask " + text(mask.shape()) + " does not fit the scores " + text(scores));
  if (mask.dtype() == mx::bool_) return mask;
  check(mx::promote_types(mask.dtype(), dtype) == dtype, "the mask's dtype must promote to the result's");
  return mx::issubdtype(mask.dtype(), mx::floating) ? mask : mx::astype(mask, dtype);
}

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    const std::optional<std::variant<std::string, mx::array>>& mask, const Optional& sinks) {
  check_shapes(q, k, v);
  auto dtype = mx::promote_types(mx::promote_types(q.dtype(), k.dtype()), v.dtype());
  type_of(dtype);
  Arrays in = {q, k, v};
  for (auto& x : in)
    if (x.dtype() != dtype) x = mx::astype(x, dtype);
  Scoring how{scale, false, false, false};
  if (mask && std::holds_alternative<std::string>(*mask)) {
    check(std::get<std::string>(*mask) == "causal", "the mask must be 'causal' or an array");
    how.causal = true;
  } else if (mask) {
    how.mask = true;
    in.push_back(fitted(std::get<mx::array>(*mask), q, k, dtype));
  }
  if (sinks) {
    check(sinks->ndim() == 1 && sinks->shape(0) == q.shape(1), "sinks must have one number a head of q");
    how.sinks = true;
    in.push_back(sinks->dtype() == mx::float32 ? *sinks : mx::astype(*sinks, mx::float32));
  }
  auto primitive = std::make_shared<AttentionPrimitive>(current_stream(), how, dtype);
  return mx::array(result_shape(q, v), dtype, primitive, in);
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("scaled_dot_product_attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::kw_only(),
        nb::arg("scale"), nb::arg("mask") = nb::none(), nb::arg("sinks") = nb::none());
}

}  // namespace qgraph
