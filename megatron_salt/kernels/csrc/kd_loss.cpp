// The loss on the CPU: rows over OpenMP threads, columns over vector lanes.
//
// A row is read in blocks that stay in the first-level cache. No [T, W] array is made; the second
// pass writes the gradient, which is the caller's. The result does not depend on the number of
// threads. Compile: see ../build.py.

#include "kd_loss.h"

#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "tokens.h"

namespace {

using namespace salt;

constexpr int kBlock = 1024;  // columns; three fp32 blocks are 12 KiB

struct Block {
  alignas(64) float values[kBlock];
};

// The block's columns as fp32; those from `count` on are -inf. Points into the row where it can.
template <class X>
inline const float* load(const X* source, int64_t count, Block& buffer) {
  if (count == kBlock) {
    if constexpr (std::is_same_v<X, float>) return source;
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) buffer.values[i] = to_float(source[i]);
    return buffer.values;
  }
  for (int64_t i = 0; i < count; ++i) buffer.values[i] = to_float(source[i]);
  for (int64_t i = count; i < kBlock; ++i) buffer.values[i] = -INFINITY;
  return buffer.values;
}

template <class X>
inline void store(const float* values, int64_t count, X* target) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) from_float(values[i], target[i]);
}

inline int64_t block_at(int64_t column, int64_t num_columns) {
  return num_columns - column < kBlock ? num_columns - column : kBlock;
}

// A sparse teacher's weights of one token by column, those of repeated ids added up, zeros between
// and behind them. Takes the time of K, not of C: the thread's array is all zeros between tokens.
class Spread {
 public:
  Spread(const SaltRows& rows, int64_t token) : rows_(rows), token_(token) { fill(false); }
  ~Spread() { fill(true); }
  const float* from(int64_t column) const { return values_ + column; }

 private:
  void fill(bool clear) {
    static thread_local std::vector<float> values;
    const size_t size = rows_.ids ? size_t(rows_.num_columns) + kBlock : 0;
    if (values.size() < size) values.resize(size, 0.0f);
    values_ = values.data();
    for (int64_t i = 0; i < rows_.num_kept; ++i) {
      const Entry entry = Entry::of(rows_, token_, i);
      if (!entry.is_here) continue;
      float& value = values_[entry.column];
      value = clear ? 0.0f : value + entry.weight;
    }
  }
  const SaltRows& rows_;
  const int64_t token_;
  float* values_;
};

// Pass 1 of one token.
template <class S, class Z, TeacherKind kTeacher>
RowSums sum_row(const SaltRows& rows, int64_t token, const Spread& spread, const Scales& k) {
  constexpr bool kLogits = kTeacher == kDense;
  const S* student = Typed<S, Z>{rows}.student(token);
  const Z* teacher = kLogits ? Typed<S, Z>{rows}.teacher(token) : nullptr;
  Block s_buffer, z_buffer;
  RowSums row = RowSums::none();
  for (int64_t column = 0; column < rows.num_columns; column += kBlock) {
    const int64_t count = block_at(column, rows.num_columns);
    const float* s = load(student + column, count, s_buffer);
    const float* z = kLogits ? load(teacher + column, count, z_buffer) : s;
    if (kTeacher == kSparse && rows.ghosts)
      add_columns<kBlock, kSparse>(row, s, spread.from(column), k);
    else
      add_columns<kBlock, kLogits ? kDense : kNone>(row, s, z, k);
  }
  if (kTeacher == kSparse) row.gap = sparse_gap(rows, token, row.s_max, k, 0, 1);
  return row;
}

// Pass 2 of one token. `gradient` may be the student's row.
template <class S, class Z, TeacherKind kTeacher, class G>
void write_gradient(const SaltRows& rows, int64_t token, const Spread& spread,
                    const RowGradient& g, G* gradient, int64_t width) {
  int64_t written = 0;
  for_row_kind(g, [&](auto kind) {
    constexpr bool kCe = decltype(kind)::kCe, kKd = decltype(kind)::kKd;
    const S* student = Typed<S, Z>{rows}.student(token);
    constexpr bool kLogits = kKd && kTeacher == kDense;
    const Z* teacher = kLogits ? Typed<S, Z>{rows}.teacher(token) : nullptr;
    const int64_t label = local_label(rows, token);
    Block s_buffer, z_buffer, out;
    while (written < rows.num_columns) {
      const int64_t count = block_at(written, rows.num_columns);
      const float* s = load(student + written, count, s_buffer);
      const float* z = s;
      if (kKd) z = kLogits ? load(teacher + written, count, z_buffer) : spread.from(written);
      columns_gradient<kBlock, kTeacher, kCe, kKd, decltype(kind)::kTempered>(
          out.values, s, z, label - written, g);
      store(out.values, count, gradient + written);
      written += count;
    }
  });
  // Padding; and all of a row whose weights are 0, whose logits are not even read.
  for (; written < width; ++written) from_float(0.0f, gradient[written]);
}

template <class Function>
void for_each_token(const SaltRows& rows, Function function) {
#pragma omp parallel for num_threads(rows.num_threads) schedule(static) if (rows.num_threads > 1)
  for (int64_t token = 0; token < rows.num_tokens; ++token) function(token);
}

}  // namespace

extern "C" {

const char* salt_error(int code) {
  return code == kErrorDtypes ? kErrorDtypesText : "unknown error code";
}

int salt_probe() { return kOk; }

int salt_local_sums(const SaltRows* call, float* maxima, float* sums, float* values) {
  const SaltRows& rows = *call;
  const Scales k = scales_of(rows);
  return dispatch_inputs(rows, [&](auto s, auto z, auto teacher) {
    using S = decltype(s);
    using Z = decltype(z);
    for_each_token(rows, [&](int64_t token) {
      const RowSums row = sum_row<S, Z, teacher()>(rows, token, Spread(rows, token), k);
      const float label = Typed<S, Z>{rows}.label(token, row.s_max);
      write_sums<teacher()>(rows, token, row, label, k, maxima, sums);
      if (values) write_values<teacher()>(rows, token, row, label, k, values);
    });
    return kOk;
  });
}

int salt_rescale(const SaltRows* call, const float* global_maxima, float* maxima, float* sums) {
  const SaltRows& rows = *call;
  const Scales k = scales_of(rows);
  return dispatch_teacher(rows, [&](auto teacher) {
    for_each_token(rows, [&](int64_t token) {
      const float gap = rows.ids ? sparse_gap(rows, token, global_maxima[token], k, 0, 1) : 0.0f;
      rescale_token<teacher()>(rows, token, k, global_maxima, gap, maxima, sums);
    });
    return kOk;
  });
}

int salt_finish(const SaltRows* call, const float* maxima, const float* sums, float* values) {
  return dispatch_teacher(*call, [&](auto teacher) {
    for (int64_t token = 0; token < call->num_tokens; ++token)
      finish_token<teacher()>(*call, token, scales_of(*call), maxima, sums, values);
    return kOk;
  });
}

int salt_gradient(const SaltRows* call, const float* maxima, const float* sums,
                  const float* upstream, void* target, int64_t stride, int64_t width,
                  int32_t dtype) {
  const SaltRows& rows = *call;
  const Scales k = scales_of(rows);
  return dispatch_all(rows, dtype, [&](auto s, auto z, auto g, auto teacher) {
    using G = decltype(g);
    for_each_token(rows, [&](int64_t token) {
      const RowSums row = read_sums<teacher()>(rows, token, k, maxima, sums);
      write_gradient<decltype(s), decltype(z), teacher()>(
          rows, token, Spread(rows, token), gradient_of<teacher()>(rows, token, row, *upstream, k),
          static_cast<G*>(target) + token * stride, width);
    });
    return kOk;
  });
}

int salt_values_and_gradient(const SaltRows* call, float* values, const float* upstream,
                             void* target, int64_t stride, int64_t width, int32_t dtype) {
  const SaltRows& rows = *call;
  const Scales k = scales_of(rows);
  return dispatch_all(rows, dtype, [&](auto s, auto z, auto g, auto teacher) {
    using S = decltype(s);
    using Z = decltype(z);
    using G = decltype(g);
    for_each_token(rows, [&](int64_t token) {
      const Spread spread(rows, token);
      const RowSums row = sum_row<S, Z, teacher()>(rows, token, spread, k);
      const float label = Typed<S, Z>{rows}.label(token, row.s_max);
      write_values<teacher()>(rows, token, row, label, k, values);
      write_gradient<S, Z, teacher()>(
          rows, token, spread, gradient_of<teacher()>(rows, token, row, *upstream, k),
          static_cast<G*>(target) + token * stride, width);
    });
    return kOk;
  });
}
}
