// The loss on the CPU: rows over OpenMP threads, columns over vector lanes.
//
// A row is read in blocks that stay in the first-level cache. No [T, W] array is made; the second
// pass writes the gradient, which is the caller's. The result does not depend on the number of
// threads. Compile: see ../build.py.

#include "kd_loss.h"

#include <type_traits>

#include "dispatch.h"
#include "row_math.h"

namespace {

using namespace salt;

constexpr int kBlock = 1024;  // columns; three fp32 blocks are 12 KiB

struct Block {
  alignas(64) float values[kBlock];
};

// The block's columns as fp32; those from `count` on are -inf. Points into the row where it can.
template <class T>
inline const float* load(const T* source, int64_t count, Block& buffer) {
  if (count == kBlock) {
    if constexpr (std::is_same_v<T, float>) return source;
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) buffer.values[i] = to_float(source[i]);
    return buffer.values;
  }
  for (int64_t i = 0; i < count; ++i) buffer.values[i] = to_float(source[i]);
  for (int64_t i = count; i < kBlock; ++i) buffer.values[i] = -INFINITY;
  return buffer.values;
}

template <class T>
inline void store(const float* values, int64_t count, T* target) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) from_float(values[i], target[i]);
}

Scales scales_of(const SaltRows& rows) {
  return {kLog2E / rows.teacher_temperature, kLog2E / rows.student_temperature,
          rows.teacher != nullptr && rows.student_temperature != 1.0f};
}

template <class S, class Z>
struct Typed {
  const SaltRows& rows;

  const S* student(int64_t token) const {
    return static_cast<const S*>(rows.student) + token * rows.student_stride;
  }
  const Z* teacher(int64_t token) const {
    return static_cast<const Z*>(rows.teacher) + token * rows.teacher_stride;
  }
};

template <class S, class Z, bool kTeacher>
RowSums sum_row(const SaltRows& rows, int64_t token, const Scales& k, float* label) {
  const S* student = Typed<S, Z>{rows}.student(token);
  const Z* teacher = kTeacher ? Typed<S, Z>{rows}.teacher(token) : nullptr;
  Block s_buffer, z_buffer;
  RowSums row;
  for (int64_t column = 0; column < rows.num_columns; column += kBlock) {
    const int64_t left = rows.num_columns - column, count = left < kBlock ? left : kBlock;
    const float* s = load(student + column, count, s_buffer);
    const float* z = kTeacher ? load(teacher + column, count, z_buffer) : s;
    add_columns<kBlock, kTeacher>(row, s, z, k);
  }
  const int64_t local = rows.labels[token] - rows.vocab_start;
  const bool owned = local >= 0 && local < rows.num_columns;
  *label = owned ? to_float(student[local]) - row.s_max : 0.0f;
  return row;
}

template <class S, class Z, class G, bool kCe, bool kKd>
void write_gradient(const SaltRows& rows, int64_t token, const RowGradient& g, G* gradient) {
  const S* student = Typed<S, Z>{rows}.student(token);
  const Z* teacher = kKd ? Typed<S, Z>{rows}.teacher(token) : nullptr;
  const int64_t label = rows.labels[token] - rows.vocab_start;
  Block s_buffer, z_buffer, out;
  for (int64_t column = 0; column < rows.num_columns; column += kBlock) {
    const int64_t left = rows.num_columns - column, count = left < kBlock ? left : kBlock;
    const float* s = load(student + column, count, s_buffer);
    const float* z = kKd ? load(teacher + column, count, z_buffer) : s;
    columns_gradient<kBlock, kCe, kKd>(out.values, s, z, label - column, g);
    store(out.values, count, gradient + column);
  }
}

template <class S, class Z, class G>
void gradient_row(const SaltRows& rows, int64_t token, const RowGradient& g, G* gradient,
                  int64_t width) {
  // A zero weight sends exactly nothing and its logits are not read.
  const bool ce = g.ce_scale != 0.0f, kd = g.kd_scale != 0.0f;
  if (ce && kd)
    write_gradient<S, Z, G, true, true>(rows, token, g, gradient);
  else if (ce)
    write_gradient<S, Z, G, true, false>(rows, token, g, gradient);
  else if (kd)
    write_gradient<S, Z, G, false, true>(rows, token, g, gradient);
  const int64_t first_zero = ce || kd ? rows.num_columns : 0;
  for (int64_t column = first_zero; column < width; ++column) from_float(0.0f, gradient[column]);
}

template <class Function>
void for_each_token(const SaltRows& rows, Function function) {
#pragma omp parallel for num_threads(rows.num_threads) schedule(static) if (rows.num_threads > 1)
  for (int64_t token = 0; token < rows.num_tokens; ++token) function(token);
}

void write_sums(const RowSums& row, float label, int64_t token, int64_t T, const Scales& k,
                bool teacher, float* maxima, float* sums) {
  maxima[token] = row.s_max;
  sums[token] = row.s_sum;
  sums[T + token] = label;
  if (!teacher) return;
  maxima[T + token] = row.z_max;
  sums[2 * T + token] = row.z_sum;
  sums[3 * T + token] = row.gap;
  if (k.tempered) sums[4 * T + token] = row.s1_sum;
}

RowSums read_sums(const SaltRows& rows, const float* maxima, const float* sums, int64_t token,
                  const Scales& k) {
  const int64_t T = rows.num_tokens;
  RowSums row;
  if (maxima) row.s_max = maxima[token];
  row.s_sum = sums[token];
  if (!rows.teacher) return row;
  if (maxima) row.z_max = maxima[T + token];
  row.z_sum = sums[2 * T + token];
  row.gap = sums[3 * T + token];
  if (k.tempered) row.s1_sum = sums[4 * T + token];
  return row;
}

void write_values(const SaltRows& rows, const RowSums& row, float label, int64_t token,
                  const Scales& k, float* values) {
  const float ce_weight = rows.ce_weights[token], kd_weight = rows.kd_weights[token];
  const RowValues v = rows.teacher ? finish_row<true>(row, label, ce_weight, kd_weight, k)
                                   : finish_row<false>(row, label, ce_weight, kd_weight, k);
  values[token] = v.loss;
  values[rows.num_tokens + token] = v.ce;
  values[2 * rows.num_tokens + token] = v.kl;
}

RowGradient gradient_of(const SaltRows& rows, const RowSums& row, int64_t token, float upstream,
                        const Scales& k) {
  const float kd_weight = rows.teacher ? rows.kd_weights[token] : 0.0f;
  return RowGradient::of(row, rows.ce_weights[token], kd_weight, upstream, k);
}

template <class S, class Z>
void local_sums(const SaltRows& rows, float* maxima, float* sums, float* values) {
  const Scales k = scales_of(rows);
  for_each_token(rows, [&](int64_t token) {
    float label;
    const RowSums row = rows.teacher ? sum_row<S, Z, true>(rows, token, k, &label)
                                     : sum_row<S, Z, false>(rows, token, k, &label);
    write_sums(row, label, token, rows.num_tokens, k, rows.teacher != nullptr, maxima, sums);
    if (values) write_values(rows, row, label, token, k, values);
  });
}

template <class S, class Z, class G>
void gradient(const SaltRows& rows, const float* maxima, const float* sums, const float* upstream,
              void* target, int64_t stride, int64_t width) {
  const Scales k = scales_of(rows);
  for_each_token(rows, [&](int64_t token) {
    const RowSums row = read_sums(rows, maxima, sums, token, k);
    const RowGradient g = gradient_of(rows, row, token, *upstream, k);
    gradient_row<S, Z>(rows, token, g, static_cast<G*>(target) + token * stride, width);
  });
}

template <class S, class Z, class G>
void values_and_gradient(const SaltRows& rows, float* values, const float* upstream, void* target,
                         int64_t stride, int64_t width) {
  const Scales k = scales_of(rows);
  for_each_token(rows, [&](int64_t token) {
    float label;
    const RowSums row = rows.teacher ? sum_row<S, Z, true>(rows, token, k, &label)
                                     : sum_row<S, Z, false>(rows, token, k, &label);
    write_values(rows, row, label, token, k, values);
    const RowGradient g = gradient_of(rows, row, token, *upstream, k);
    gradient_row<S, Z>(rows, token, g, static_cast<G*>(target) + token * stride, width);
  });
}

}  // namespace

extern "C" {

const char* salt_error(int code) {
  return code == kErrorDtypes ? kErrorDtypesText : "unknown error code";
}

int salt_local_sums(const SaltRows* rows, float* maxima, float* sums, float* values) {
  return dispatch_inputs(*rows, [&](auto s, auto z) {
    local_sums<decltype(s), decltype(z)>(*rows, maxima, sums, values);
    return kOk;
  });
}

int salt_rescale(const SaltRows* rows, const float* global_maxima, float* maxima, float* sums) {
  const Scales k = scales_of(*rows);
  const int64_t T = rows->num_tokens;
  for (int64_t token = 0; token < T; ++token) {
    RowSums row = read_sums(*rows, maxima, sums, token, k);
    const float s_max = global_maxima[token];
    const float z_max = rows->teacher ? global_maxima[T + token] : row.z_max;
    const int64_t local = rows->labels[token] - rows->vocab_start;
    const bool owned = local >= 0 && local < rows->num_columns;
    const float label = owned ? sums[T + token] + (row.s_max - s_max) : 0.0f;
    move_centre(row, s_max, z_max, k);
    write_sums(row, label, token, T, k, rows->teacher != nullptr, maxima, sums);
  }
  return kOk;
}

int salt_finish(const SaltRows* rows, const float* sums, float* values) {
  const Scales k = scales_of(*rows);
  for (int64_t token = 0; token < rows->num_tokens; ++token) {
    const RowSums row = read_sums(*rows, nullptr, sums, token, k);
    write_values(*rows, row, sums[rows->num_tokens + token], token, k, values);
  }
  return kOk;
}

int salt_gradient(const SaltRows* rows, const float* maxima, const float* sums,
                  const float* upstream, void* target, int64_t stride, int64_t width,
                  int32_t dtype) {
  return dispatch_all(*rows, dtype, [&](auto s, auto z, auto g) {
    gradient<decltype(s), decltype(z), decltype(g)>(*rows, maxima, sums, upstream, target, stride,
                                                    width);
    return kOk;
  });
}

int salt_values_and_gradient(const SaltRows* rows, float* values, const float* upstream,
                             void* target, int64_t stride, int64_t width, int32_t dtype) {
  return dispatch_all(*rows, dtype, [&](auto s, auto z, auto g) {
    values_and_gradient<decltype(s), decltype(z), decltype(g)>(*rows, values, upstream, target,
                                                               stride, width);
    return kOk;
  });
}
}
