// One token of a call: where its numbers lie, and what happens to them between the passes. For both
// compilers, like row_math.h. Letters: T tokens.

#pragma once

#include "kd_loss.h"
#include "row_math.h"

#if defined(__CUDACC__)
#include <assert.h>
#endif

namespace salt {

// On a GPU nobody looks at labels and weights before the launch: that would mean to wait for them.
// On the CPU they have been looked at.
template <TeacherKind kTeacher>
SALT_FN void check_token(const SaltRows& rows, int64_t token) {
#if defined(__CUDACC__)
  const int64_t label = rows.labels[token];
  assert(label >= 0 && label < rows.vocab_size && "kd_loss: a label lies outside the vocabulary");
  if (kTeacher == kNone)
    assert(rows.kd_weights[token] == 0.0f && "kd_loss: kd_weight_T is not 0 without a teacher");
#else
  (void)rows, (void)token;
#endif
}

// The label's column on this rank; outside [0, num_columns) where another rank has it.
SALT_FN int64_t local_label(const SaltRows& rows, int64_t token) {
  return rows.labels[token] - rows.vocab_start;
}

SALT_FN bool owns_label(const SaltRows& rows, int64_t token) {
  const int64_t local = local_label(rows, token);
  return local >= 0 && local < rows.num_columns;
}

// One of a sparse teacher's K weights, and its column, if that is one of this rank's.
struct Entry {
  float weight;
  int64_t column;
  bool is_here;

  SALT_FN static Entry of(const SaltRows& rows, int64_t token, int64_t i) {
    const int64_t at = token * rows.num_kept + i, id = rows.ids[at], column = id - rows.vocab_start;
    const float weight = rows.targets[at];
    const bool taught = weight > 0.0f;
#if defined(__CUDACC__)
    assert(!(weight < 0.0f) && "kd_loss: a sparse teacher has a weight below 0");
    assert((!taught || (id >= 0 && id < rows.vocab_size)) &&
           "kd_loss: a sparse teacher has an id outside the vocabulary");
#endif
    return {weight, column, taught && column >= 0 && column < rows.num_columns};
  }
};

// A student's logit where only few are wanted, so that no kernel is needed for each dtype.
SALT_FN float student_logit(const SaltRows& rows, int64_t token, int64_t column) {
  const int64_t at = token * rows.student_stride + column;
  if (rows.student_dtype == kFp32) return static_cast<const float*>(rows.student)[at];
  if (rows.student_dtype == kBf16) return to_float(static_cast<const Bf16*>(rows.student)[at]);
  return to_float(static_cast<const Fp16*>(rows.student)[at]);
}

// A sparse teacher's gap on this rank, of its entries first, first + step, and so on.
SALT_FN float sparse_gap(const SaltRows& rows, int64_t token, float s_max, const Scales& k,
                         int64_t first, int64_t step) {
  float gap = 0.0f;
  for (int64_t i = first; i < rows.num_kept; i += step) {
    const Entry entry = Entry::of(rows, token, i);
    if (!entry.is_here) continue;
    const float d = student_logit(rows, token, entry.column) - s_max;
    gap += entry.weight * (logf(entry.weight) - d * (k.student / kLog2E));
  }
  return gap;
}

template <TeacherKind kTeacher>
SALT_FN Target target_of(const SaltRows& rows, int64_t token) {
  if (kTeacher != kSparse) return {0.0f, 0.0f};
  return {rows.masses[token], rows.ghosts ? rows.ghosts[token] : 0.0f};
}

// A call with types in place of dtypes.
template <class S, class Z>
struct Typed {
  const SaltRows& rows;

  SALT_FN const S* student(int64_t token) const {
    return static_cast<const S*>(rows.student) + token * rows.student_stride;
  }
  SALT_FN const Z* teacher(int64_t token) const {
    return static_cast<const Z*>(rows.teacher) + token * rows.teacher_stride;
  }

  // s_y - s_max where this rank has the label's column, else 0.
  SALT_FN float label(int64_t token, float s_max) const {
    if (!owns_label(rows, token)) return 0.0f;
    return to_float(student(token)[local_label(rows, token)]) - s_max;
  }
};

// `maxima` and `sums` as kd_loss.h lays them out.
template <TeacherKind kTeacher>
SALT_FN void write_sums(const SaltRows& rows, int64_t token, const RowSums& row, float label,
                        const Scales& k, float* maxima, float* sums) {
  const int64_t T = rows.num_tokens;
  maxima[token] = row.s_max;
  sums[token] = row.s_sum;
  sums[T + token] = label;
  if (kTeacher == kNone) return;
  if (kTeacher == kSparse) {
    sums[2 * T + token] = row.gap;
    if (rows.ghosts) sums[3 * T + token] = row.rest;
    if (k.tempered) sums[(rows.ghosts ? 4 : 3) * T + token] = row.s1_sum;
    return;
  }
  maxima[T + token] = row.z_max;
  sums[2 * T + token] = row.z_sum;
  sums[3 * T + token] = row.gap;
  if (k.tempered) sums[4 * T + token] = row.s1_sum;
}

template <TeacherKind kTeacher>
SALT_FN RowSums read_sums(const SaltRows& rows, int64_t token, const Scales& k,
                          const float* maxima, const float* sums) {
  const int64_t T = rows.num_tokens;
  RowSums row = RowSums::none();
  row.s_max = maxima[token];
  row.s_sum = sums[token];
  if (kTeacher == kNone) return row;
  if (kTeacher == kSparse) {
    row.gap = sums[2 * T + token];
    if (rows.ghosts) row.rest = sums[3 * T + token];
    if (k.tempered) row.s1_sum = sums[(rows.ghosts ? 4 : 3) * T + token];
    return row;
  }
  row.z_max = maxima[T + token];
  row.z_sum = sums[2 * T + token];
  row.gap = sums[3 * T + token];
  if (k.tempered) row.s1_sum = sums[4 * T + token];
  return row;
}

template <TeacherKind kTeacher>
SALT_FN void write_values(const SaltRows& rows, int64_t token, const RowSums& row, float label,
                          const Scales& k, float* values) {
  const RowValues v =
      finish_row<kTeacher>(row, label, target_of<kTeacher>(rows, token), rows.ce_weights[token],
                           rows.kd_weights[token], k);
  values[token] = v.loss;
  values[rows.num_tokens + token] = v.ce;
  values[2 * rows.num_tokens + token] = v.kl;
}

template <TeacherKind kTeacher>
SALT_FN RowGradient gradient_of(const SaltRows& rows, int64_t token, const RowSums& row,
                                float upstream, const Scales& k) {
  const float kd_weight = kTeacher != kNone ? rows.kd_weights[token] : 0.0f;
  return RowGradient::of(row, target_of<kTeacher>(rows, token), rows.ce_weights[token], kd_weight,
                         upstream, k);
}

// Between MAX and SUM over the ranks. `gap`: a sparse teacher's, about the global maximum.
template <TeacherKind kTeacher>
SALT_FN void rescale_token(const SaltRows& rows, int64_t token, const Scales& k,
                           const float* global_maxima, float gap, float* maxima, float* sums) {
  const int64_t T = rows.num_tokens;
  RowSums row = read_sums<kTeacher>(rows, token, k, maxima, sums);
  const float s_max = global_maxima[token];
  const float z_max = kTeacher == kDense ? global_maxima[T + token] : row.z_max;
  const float label = owns_label(rows, token) ? sums[T + token] + (row.s_max - s_max) : 0.0f;
  move_centre<kTeacher>(row, s_max, z_max, k);
  if (kTeacher == kSparse) row.gap = gap;
  write_sums<kTeacher>(rows, token, row, label, k, maxima, sums);
}

// After SUM over the ranks.
template <TeacherKind kTeacher>
SALT_FN void finish_token(const SaltRows& rows, int64_t token, const Scales& k,
                          const float* maxima, const float* sums, float* values) {
  const RowSums row = read_sums<kTeacher>(rows, token, k, maxima, sums);
  write_values<kTeacher>(rows, token, row, sums[rows.num_tokens + token], k, values);
}

}  // namespace salt
