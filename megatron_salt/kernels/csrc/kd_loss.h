// The interface of both libraries, kd_loss.cpp (CPU) and kd_loss.cu (CUDA): plain C, so that it
// needs no header of PyTorch and no rebuild for another version of it. Called from compiled.py,
// which has checked shapes, strides, dtypes and devices.
//
// Letters: T tokens, W vocabulary columns of the caller's tensors, C <= W real ones of this rank.
// Pointers are to the library's device. The CPU library ignores `stream` and uses `num_threads`.

#pragma once

#include <stdint.h>

extern "C" {

struct SaltRows {
  const void* student;      // [T, >= C], columns adjacent
  const void* teacher;      // [T, >= C], columns adjacent; null without a teacher
  const int64_t* labels;    // [T], ids in the whole vocabulary
  const float* ce_weights;  // [T]
  const float* kd_weights;  // [T]
  const int32_t* ids;       // [T, K] of a sparse teacher; null without one
  const float* targets;     // [T, K], their weights; an id of weight 0 may be anything
  const float* masses;      // [T], sums of the weights
  const float* ghosts;      // [T], the weight of all other tokens together; null without any
  int64_t student_stride;   // elements from one row to the next
  int64_t teacher_stride;
  int64_t num_tokens;   // T
  int64_t num_columns;  // C
  int64_t num_kept;     // K
  int64_t vocab_start;  // id of the first column
  int64_t vocab_size;
  float teacher_temperature;
  float student_temperature;
  int32_t student_dtype;  // 0 fp32, 1 bf16, 2 fp16
  int32_t teacher_dtype;
  int32_t num_threads;
  void* stream;
};

// Per token and in this order, so that each variant uses the first of them:
//   maxima [2, T]: student; teacher
//   sums   [5, T]: s_sum, label; z_sum, gap; s1_sum (see row_math.h)
// With a sparse teacher, which has no maximum:
//   sums   [3 to 5, T]: s_sum, label; gap; rest if there are ghosts; s1_sum if b != 1
// `values` [3, T]: loss, ce, kl.

// Every function returns 0, or a code for salt_error.
const char* salt_error(int code);
// Whether this library's code can run on the current device.
int salt_probe();

// Pass 1: maxima and sums of this rank's columns. With `values` (one rank alone) the result too.
int salt_local_sums(const SaltRows* rows, float* maxima, float* sums, float* values);
// Between MAX and SUM over the ranks: express `sums` about `global_maxima`. Sets maxima to those.
int salt_rescale(const SaltRows* rows, const float* global_maxima, float* maxima, float* sums);
// After SUM over the ranks.
int salt_finish(const SaltRows* rows, const float* maxima, const float* sums, float* values);
// Pass 2. `upstream`: the scalar that multiplies the loss. Columns from C to `width` get 0.
// `gradient` may be `student`.
int salt_gradient(const SaltRows* rows, const float* maxima, const float* sums,
                  const float* upstream, void* gradient, int64_t gradient_stride, int64_t width,
                  int32_t gradient_dtype);
// Both passes of one rank alone, row by row: the second one finds the row in the cache, if it fits.
int salt_values_and_gradient(const SaltRows* rows, float* values, const float* upstream,
                             void* gradient, int64_t gradient_stride, int64_t width,
                             int32_t gradient_dtype);
}
