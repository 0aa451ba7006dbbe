// The mathematics of one row (one token) of the distillation loss, for both compilers.
//
// nvcc compiles it into the kernels of kd_loss.cu, the C++ compiler into the loops of kd_loss.cpp;
// so the formulas that a GPU runs are the ones that the CPU tests check. With student logits s,
// teacher logits z, label y, temperatures a (teacher) and b (student), and everything taken in
// powers of two (k_z = log2(e) / a, k_s = log2(e) / b):
//
//   pass 1   s_max = max s, z_max = max z            dz = (z - z_max) k_z,  ds = (s - s_max) k_s
//            z_sum = sum 2^dz     s_sum = sum 2^ds   gap = ln(2) sum 2^dz (dz - ds)
//            s1_sum = sum 2^((s - s_max) log2(e))    only where b != 1
//   result   KL = gap / z_sum + ln(s_sum / z_sum)               CE = ln s1_sum - (s_y - s_max)
//   pass 2   dL/ds = w_ce (q1 - onehot) + w_kd / b (q - p)      p = 2^dz / z_sum,  q = 2^ds / s_sum
//
// A sparse teacher has weights t of some columns and, maybe, g of all others together (a ghost);
// m = sum t, all K of them. In place of the teacher's numbers:
//
//   pass 1   gap = sum t (ln t - (s - s_max) / b)   rest = sum 2^ds where t = 0 (no difference)
//   result   KL = gap + m ln s_sum  [+ g (ln g - ln(rest / s_sum))]
//   pass 2   q - p becomes (m + g) q - t, and where t = 0 there is g 2^ds / rest to take off
//
// Logits are centred on their raw maximum before they are scaled or added: a difference of two
// floats is exact where it matters, so neither large logits nor temperatures cost digits. A running
// maximum moves the centre (`move_centre`); so do the ranks of a tensor-parallel group.
//
// Products and sums are never contracted by the compiler (-ffp-contract=off, -fmad=false); mad()
// says where one rounding is wanted. In q - p a contraction would leave a rounding error where both
// are equal, and a student that equals its teacher would not be at rest.
//
// inf and nan: z = -inf has no probability and contributes nothing. A maximum ignores nan, the sums
// do not, so what uses that row's logits becomes nan.

#pragma once

#include "dtypes.h"

#if defined(__CUDACC__)
#define SALT_UNROLL _Pragma("unroll")
#define SALT_SIMD(reduction)
#else
#define SALT_UNROLL
#define SALT_PRAGMA(text) _Pragma(#text)
#define SALT_SIMD(reduction) SALT_PRAGMA(omp simd reduction)
#endif

namespace salt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// a * b + c with one rounding, where the machine has it.
SALT_FN float mad(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^x for x <= 0 (0 below -126), nan for nan, exactly 1 for 0; to about the last place.
SALT_FN float exp2_of(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  // Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
  const float kRound = 12582912.0f;
  const float clamped = x < -127.0f ? -127.0f : x;  // keeps nan
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);  // in [-0.5, 0.5], exact
  float y = 1.5353362e-4f;                       // minimax polynomial of 2^f, 2e-9 relative
  y = mad(y, f, 1.3398874e-3f);
  y = mad(y, f, 9.6184369e-3f);
  y = mad(y, f, 5.5503324e-2f);
  y = mad(y, f, 2.4022648e-1f);
  y = mad(y, f, 6.9314718e-1f);
  y = mad(y, f, 1.0f);
  const uint32_t power = (to_bits(shifted) - 0x4b400000u + 127u) << 23;  // of 2^n, -126 <= n
  return x < -126.0f ? 0.0f : y * from_bits(power);
#endif
}

// Where a row (or a part of it without a single real logit) is centred.
SALT_FN float centre(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

SALT_FN float larger(float a, float b) { return b > a ? b : a; }  // ignores a nan in b

enum TeacherKind { kNone, kDense, kSparse };

struct Scales {
  float teacher;  // log2(e) / a
  float student;  // log2(e) / b
  bool tempered;  // b != 1: the CE needs a sum of its own
};

// What pass 1 knows of the columns that it has seen.
struct RowSums {
  float s_max, z_max, s_sum, z_sum, gap, s1_sum, rest;

  SALT_FN static RowSums none() { return {-INFINITY, -INFINITY, 0, 0, 0, 0, 0}; }
};

// Express the sums about new maxima, which are not below the old ones. A sparse teacher's gap is
// not among them: it is taken when the maximum is known.
template <TeacherKind kTeacher>
SALT_FN void move_centre(RowSums& row, float s_max, float z_max, const Scales& k) {
  const float s_step = centre(row.s_max) - centre(s_max);
  // A part without a real logit has sums of 0 and may lie above its new centre (2^x = inf).
  const bool has_s = row.s_max > -INFINITY, has_z = row.z_max > -INFINITY;
  const float s_scale = has_s ? exp2_of(s_step * k.student) : 0.0f;
  if (kTeacher == kDense) {
    const float z_step = centre(row.z_max) - centre(z_max);
    const float z_scale = has_z ? exp2_of(z_step * k.teacher) : 0.0f;
    const float shift =
        has_z ? row.z_sum * kLn2 * (z_step * k.teacher - s_step * k.student) : 0.0f;
    // What has no weight any more may be shifted by inf (a part full of masked logits of -3e38).
    row.gap = z_scale != 0.0f ? z_scale * (row.gap + shift) : 0.0f;
    row.z_sum *= z_scale;
  }
  if (kTeacher == kSparse) row.rest *= s_scale;
  row.s_sum *= s_scale;
  if (k.tempered) row.s1_sum *= has_s ? exp2_of(s_step * kLog2E) : 0.0f;
  row.s_max = s_max;
  row.z_max = z_max;
}

// Pass 1 over N columns. Columns that do not exist hold -inf in both arrays. `z` are a dense
// teacher's logits or a sparse one's weights.
template <int N, TeacherKind kTeacher>
SALT_FN void add_columns(RowSums& row, const float* s, const float* z, const Scales& k) {
  float s_max = row.s_max, z_max = row.z_max;
  SALT_UNROLL
  SALT_SIMD(reduction(max : s_max))
  for (int i = 0; i < N; ++i) s_max = larger(s_max, s[i]);
  if (kTeacher == kDense) {
    SALT_UNROLL
    SALT_SIMD(reduction(max : z_max))
    for (int i = 0; i < N; ++i) z_max = larger(z_max, z[i]);
  }
  if (s_max != row.s_max || z_max != row.z_max) move_centre<kTeacher>(row, s_max, z_max, k);

  const float s_centre = centre(s_max), z_centre = centre(z_max);
  float s_sum = 0, z_sum = 0, gap = 0, rest = 0;
  SALT_UNROLL
  SALT_SIMD(reduction(+ : s_sum, z_sum, gap, rest))
  for (int i = 0; i < N; ++i) {
    const float ds = (s[i] - s_centre) * k.student;
    const float e = exp2_of(ds);
    s_sum += e;
    if (kTeacher == kSparse) rest += z[i] > 0.0f ? 0.0f : e;
    if (kTeacher == kDense) {
      const float dz = (z[i] - z_centre) * k.teacher;
      const float p = exp2_of(dz);
      z_sum += p;
      gap += p > 0.0f ? p * (dz - ds) : 0.0f;  // 0 * (-inf) would be nan
    }
  }
  row.s_sum += s_sum;
  row.z_sum += z_sum;
  row.gap += kLn2 * gap;
  if (kTeacher == kSparse) row.rest += rest;
  if (k.tempered) {
    float s1_sum = 0;
    SALT_UNROLL
    SALT_SIMD(reduction(+ : s1_sum))
    for (int i = 0; i < N; ++i) s1_sum += exp2_of((s[i] - s_centre) * kLog2E);
    row.s1_sum += s1_sum;
  }
}

// What a sparse teacher asks of a row besides the weights of its columns.
struct Target {
  float mass, ghost;
};

// A token's values in nats. `label` is s_y - s_max.
struct RowValues {
  float ce, kl, loss;
};

template <TeacherKind kTeacher>
SALT_FN RowValues finish_row(const RowSums& row, float label, const Target& target,
                             float ce_weight, float kd_weight, const Scales& k) {
  RowValues values;
  values.ce = logf(k.tempered ? row.s1_sum : row.s_sum) - label;
  values.kl = 0.0f;
  if (kTeacher == kDense) values.kl = row.gap / row.z_sum + logf(row.s_sum / row.z_sum);
  if (kTeacher == kSparse) {
    values.kl = row.gap + target.mass * logf(row.s_sum);
    if (target.ghost > 0.0f)
      values.kl += target.ghost * (logf(target.ghost) - logf(row.rest / row.s_sum));
  }
  // A zero weight contributes exactly nothing, even where the value is inf or nan.
  values.loss = ce_weight != 0.0f ? ce_weight * values.ce : 0.0f;
  if (kd_weight != 0.0f) values.loss += kd_weight * values.kl;
  return values;
}

// What pass 2 needs of a row.
struct RowGradient {
  float s_max, z_max, s_inverse, z_inverse, s1_inverse;  // inverses of the sums
  float ce_scale, kd_scale;                              // weights times what is upstream
  float inside, outside;  // of a sparse teacher: factors of 2^ds where t > 0, and where t = 0
  Scales k;

  SALT_FN static RowGradient of(const RowSums& row, const Target& target, float ce_weight,
                                float kd_weight, float upstream, const Scales& k) {
    RowGradient g;
    g.s_max = row.s_max;
    g.z_max = row.z_max;
    g.s_inverse = 1.0f / row.s_sum;
    g.z_inverse = 1.0f / row.z_sum;
    g.s1_inverse = k.tempered ? 1.0f / row.s1_sum : g.s_inverse;
    g.inside = (target.mass + target.ghost) * g.s_inverse;
    g.outside = g.inside - (row.rest > 0.0f ? target.ghost / row.rest : 0.0f);
    g.ce_scale = ce_weight * upstream;
    g.kd_scale = kd_weight * upstream * (k.student / kLog2E);
    // A zero weight stays exactly that, whatever is upstream.
    if (ce_weight == 0.0f) g.ce_scale = 0.0f;
    if (kd_weight == 0.0f) g.kd_scale = 0.0f;
    g.k = k;
    return g;
  }
};

// dL/ds of one column. kCe and kKd say whether the row's weights are other than 0. `z` as in
// add_columns.
template <TeacherKind kTeacher, bool kCe, bool kKd, bool kTempered>
SALT_FN float column_gradient(float s, float z, float onehot, const RowGradient& g) {
  const float d = s - g.s_max;
  float gradient = 0.0f, q = 0.0f;
  if (kKd && kTeacher == kSparse) {
    const float e = exp2_of(d * g.k.student);
    q = e * g.s_inverse;
    gradient = g.kd_scale * (e * (z > 0.0f ? g.inside : g.outside) - z);
  } else if (kKd) {
    q = exp2_of(d * g.k.student) * g.s_inverse;
    const float p = exp2_of((z - g.z_max) * g.k.teacher) * g.z_inverse;
    gradient = g.kd_scale * (q - p);
  }
  if (kCe) {
    const float q1 = kKd && !kTempered ? q : exp2_of(d * kLog2E) * g.s1_inverse;
    gradient = mad(g.ce_scale, q1 - onehot, gradient);
  }
  return gradient;
}

// Pass 2 over N columns. `label`: index of the label among them, anything else if it is elsewhere.
template <int N, TeacherKind kTeacher, bool kCe, bool kKd, bool kTempered>
SALT_FN void columns_gradient(float* out, const float* s, const float* z, int64_t label,
                              const RowGradient& g) {
  SALT_UNROLL
  SALT_SIMD()
  for (int i = 0; i < N; ++i)
    out[i] = column_gradient<kTeacher, kCe, kKd, kTempered>(s[i], kKd ? z[i] : 0.0f, 0.0f, g);
  if (kCe && label >= 0 && label < N) {
    SALT_UNROLL
    for (int i = 0; i < N; ++i)  // an index known at compile time keeps arrays in registers
      if (i == label)
        out[i] = column_gradient<kTeacher, kCe, kKd, kTempered>(s[i], kKd ? z[i] : 0.0f, 1.0f, g);
  }
}

// What a row needs, as a type.
template <bool ce, bool kd, bool t>
struct Kind {
  static constexpr bool kCe = ce, kKd = kd, kTempered = t;
};

// function(Kind) for the row's kind; nothing for a row whose weights are both 0.
template <class Function>
SALT_FN void for_row_kind(const RowGradient& g, Function function) {
  const bool ce = g.ce_scale != 0.0f, kd = g.kd_scale != 0.0f;
  if (ce && kd && g.k.tempered)
    function(Kind<true, true, true>{});
  else if (ce && kd)
    function(Kind<true, true, false>{});
  else if (ce)
    function(Kind<true, false, false>{});
  else if (kd)
    function(Kind<false, true, false>{});
}

}  // namespace salt
