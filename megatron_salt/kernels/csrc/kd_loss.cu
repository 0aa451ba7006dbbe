// The loss on CUDA devices: one block per token, columns over the block's threads.
//
//   pass 1  reads 2 logits per column          row_sums_kernel, then a reduction over the block
//   pass 2  reads 2 logits, writes 1 gradient  gradient_kernel; no reduction, no collective
//
// 10 bytes of device memory per (token, column) in bf16, which is the floor of two passes; with
// `both_passes_kernel` the second read comes from the cache, as far as the rows in flight fit.
// Columns are read 16 bytes at a time where their address allows; a row that starts elsewhere
// (odd W) has a ragged first and last group.
// A sparse teacher's pass 1 and 2 read 1 logit per column, and its ids again for the few vectors of
// columns that have any: right for every K, meant for K of hundreds at most.
// Results do not depend on scheduling: every sum has one order, and the only atomics are an OR and
// a maximum of whole numbers.
// Nothing here waits for the device or allocates; every launch is on the caller's stream.
//
// Compile alone: nvcc -std=c++17 -O3 -fmad=false -arch=sm_90 -cubin kd_loss.cu
//
// Letters: T tokens, W columns of the caller's tensors, C <= W real columns of this rank.

#include "kd_loss.h"

#include "dispatch.h"
#include "tokens.h"

#ifndef SALT_LAUNCH  // tests define it to run the kernels below on the CPU, see tests/cuda_on_cpu.h
#define SALT_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace {

using namespace salt;

constexpr int kVector = 8;  // columns a thread takes at once: 16 bytes of bf16, 32 of fp32
constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMinBlocks = 2;  // of that size on a multiprocessor: 64 registers a thread
constexpr int kMaxWarps = kMaxThreads / kWarp;

// Vectors in flight per thread and tensor: 64 bytes of logits in all, as registers allow.
template <class S, class Z>
constexpr int kUnrollOf = sizeof(S) + sizeof(Z) <= 4 ? 2 : 1;

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Columns before the first 16-byte boundary of a row.
template <class X>
__device__ __forceinline__ int ragged_columns(const X* row) {
  const int bytes = int(reinterpret_cast<uintptr_t>(row) % 16);
  return bytes ? (16 - bytes) / int(sizeof(X)) : 0;
}

// How a row's columns are grouped: group i holds columns first + 8 i to first + 8 i + 7, of which
// those inside [0, count) exist. `first` is <= 0 and aligned in the student's row (or the teacher's
// if its elements are smaller).
struct Groups {
  int first, count;

  template <class S, class Z>
  static __device__ __forceinline__ Groups of(const S* s, const Z* z, int count) {
    int ragged = ragged_columns(s);
    if (sizeof(Z) < sizeof(S) && z != nullptr) ragged = ragged_columns(z);
    return {ragged ? ragged - kVector : 0, count};
  }
};

// Eight columns as they lie in memory; a column that does not exist is -inf.
template <class X>
struct Vector {
  union {
    X elements[kVector];
    Bytes16 chunks[kVector * sizeof(X) / 16];
  };

  // `aligned`: the group's first column lies at a multiple of 16 bytes.
  __device__ __forceinline__ void load(const X* row, int column, int count, bool aligned) {
    if (aligned && column >= 0 && column + kVector <= count) {
      const Bytes16* source = reinterpret_cast<const Bytes16*>(row + column);
#pragma unroll
      for (int i = 0; i < int(sizeof(chunks) / 16); ++i) chunks[i] = source[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool exists = column + i >= 0 && column + i < count;
      if (exists)
        elements[i] = row[column + i];
      else
        from_float(-INFINITY, elements[i]);
    }
  }

  __device__ __forceinline__ void store(X* row, int column, int count, bool aligned) const {
    if (aligned && column >= 0 && column + kVector <= count) {
      Bytes16* target = reinterpret_cast<Bytes16*>(row + column);
#pragma unroll
      for (int i = 0; i < int(sizeof(chunks) / 16); ++i) target[i] = chunks[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column + i >= 0 && column + i < count) row[column + i] = elements[i];
  }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane; lane /= 2) x = larger(x, __shfl_xor_sync(~0u, x, lane));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// Every lane gets the warp's sums. First the maxima, so that centres move once and not five times.
template <TeacherKind kTeacher>
__device__ __forceinline__ void reduce_warp(RowSums& row, const Scales& k) {
  const float s_max = warp_max(row.s_max);
  const float z_max = kTeacher == kDense ? warp_max(row.z_max) : row.z_max;
  move_centre<kTeacher>(row, s_max, z_max, k);
  row.s_sum = warp_sum(row.s_sum);
  if (kTeacher == kDense) {
    row.z_sum = warp_sum(row.z_sum);
    row.gap = warp_sum(row.gap);
  }
  if (kTeacher == kSparse) row.rest = warp_sum(row.rest);
  if (kTeacher != kNone && k.tempered) row.s1_sum = warp_sum(row.s1_sum);
}

// Where the ids of a sparse teacher's token lie. The bit of a vector is that of its columns / 8,
// modulo their number: none set means none there.
struct Kept {
  static constexpr int kWords = 512;
  uint32_t words[kWords];
  int num_kept;  // up to the last one that has a weight

  // By the whole block.
  __device__ __forceinline__ void find(const SaltRows& rows, int64_t token) {
    for (int i = int(threadIdx.x); i < kWords; i += int(blockDim.x)) words[i] = 0;
    if (threadIdx.x == 0) num_kept = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < rows.num_kept; i += blockDim.x) {
      const Entry entry = Entry::of(rows, token, i);
      if (!entry.is_here) continue;
      const unsigned bit = unsigned(entry.column) / kVector;
      atomicOr(&words[bit / 32 % kWords], 1u << bit % 32);
      atomicMax(&num_kept, int(i) + 1);
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool may_have(int column) const {
    const unsigned bit = unsigned(column) / kVector;
    return words[bit / 32 % kWords] >> bit % 32 & 1u;
  }

  // The weights of eight columns, those of repeated ids added up.
  __device__ __forceinline__ void weights(const SaltRows& rows, int64_t token, int column,
                                          float* out) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) out[j] = 0.0f;
    // A row that starts elsewhere than at 16 bytes has vectors that are in two groups.
    if (!may_have(column) && !may_have(column + kVector - 1)) return;
    const int32_t* ids = rows.ids + token * rows.num_kept;
    const unsigned first = unsigned(column) + unsigned(rows.vocab_start);
    for (int i = 0; i < num_kept; ++i) {
      const unsigned lane = unsigned(ids[i]) - first;
      if (lane >= kVector) continue;
      const float weight = rows.targets[token * rows.num_kept + i];
#pragma unroll
      for (unsigned j = 0; j < kVector; ++j)
        if (j == lane) out[j] += weight;
    }
  }
};

// Both rows of a token, a few vectors per thread at a time: function(first column of the thread's
// first vector, columns to its next one, student's logits, teacher's logits), the logits in fp32.
// In place of a sparse teacher's logits: weights, or zeros where `kept` is null.
template <class S, class Z, TeacherKind kTeacher, class Function>
__device__ __forceinline__ void for_each_vector(const SaltRows& rows, int64_t token,
                                                const Kept* kept, Function function) {
  constexpr int kUnroll = kUnrollOf<S, Z>;
  const S* student = Typed<S, Z>{rows}.student(token);
  const Z* teacher = kTeacher == kDense ? Typed<S, Z>{rows}.teacher(token) : nullptr;
  const Groups groups = Groups::of(student, teacher, int(rows.num_columns));
  const bool s_aligned = is_aligned(student + groups.first);
  const bool z_aligned = kTeacher == kDense && is_aligned(teacher + groups.first);
  const int step = int(blockDim.x) * kVector;
  for (int column = groups.first + int(threadIdx.x) * kVector; column < groups.count;
       column += kUnroll * step) {
    Vector<S> s_raw[kUnroll];
    Vector<Z> z_raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      s_raw[u].load(student, column + u * step, groups.count, s_aligned);
      if (kTeacher == kDense) z_raw[u].load(teacher, column + u * step, groups.count, z_aligned);
    }
    float s[kUnroll * kVector], z[kUnroll * kVector];
#pragma unroll
    for (int i = 0; i < kUnroll * kVector; ++i) {
      s[i] = to_float(s_raw[i / kVector].elements[i % kVector]);
      z[i] = kTeacher == kDense ? to_float(z_raw[i / kVector].elements[i % kVector]) : 0.0f;
    }
    if (kTeacher == kSparse && kept) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        kept->weights(rows, token, column + u * step, z + u * kVector);
    }
    function(column, step, s, z);
  }
}

// Pass 1 of one token by the whole block; every thread gets the result.
template <class S, class Z, TeacherKind kTeacher>
__device__ __forceinline__ RowSums sum_row(const SaltRows& rows, int64_t token, const Scales& k,
                                           const Kept* kept, RowSums (&shared)[kMaxWarps]) {
  RowSums row = RowSums::none();
  for_each_vector<S, Z, kTeacher>(rows, token, kept, [&](int, int, const float* s,
                                                         const float* z) {
    add_columns<kUnrollOf<S, Z> * kVector, kTeacher>(row, s, z, k);
  });
  reduce_warp<kTeacher>(row, k);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  if (lane == 0) shared[warp] = row;
  __syncthreads();
  // Every warp adds up the warps' sums in the same order: no second wait is needed.
  row = lane < int(blockDim.x) / kWarp ? shared[lane] : RowSums::none();
  reduce_warp<kTeacher>(row, k);
  if (kTeacher == kSparse) row.gap = warp_sum(sparse_gap(rows, token, row.s_max, k, lane, kWarp));
  return row;
}

// Pass 2 of one token by the whole block. `gradient` may be the student's row: each thread writes
// only columns that it alone has read.
template <class S, class Z, TeacherKind kTeacher, class G>
__device__ __forceinline__ void write_gradient(const SaltRows& rows, int64_t token,
                                               const Kept* kept, const RowGradient& g,
                                               G* gradient, int width) {
  const int count = int(rows.num_columns);
  int first_zero = 0;
  for_row_kind(g, [&](auto kind) {
    constexpr bool kCe = decltype(kind)::kCe, kKd = decltype(kind)::kKd;
    const int64_t label = local_label(rows, token);
    first_zero = count;
    for_each_vector<S, Z, kKd ? kTeacher : kNone>(rows, token, kept, [&](int column, int step,
                                                                         const float* s,
                                                                         const float* z) {
#pragma unroll
      for (int u = 0; u < kUnrollOf<S, Z>; ++u) {
        const int start = column + u * step;
        float out[kVector];
        columns_gradient<kVector, kTeacher, kCe, kKd, decltype(kind)::kTempered>(
            out, s + u * kVector, z + u * kVector, label - start, g);
        Vector<G> result;
#pragma unroll
        for (int i = 0; i < kVector; ++i) from_float(out[i], result.elements[i]);
        result.store(gradient, start, count, is_aligned(gradient + start));
      }
    });
  });
  // Padding; and all of a row whose weights are 0, whose logits are not even read.
  for (int column = first_zero + int(threadIdx.x); column < width; column += int(blockDim.x))
    from_float(0.0f, gradient[column]);
}

template <class S, class Z, TeacherKind kTeacher>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    row_sums_kernel(SaltRows rows, Scales k, float* maxima, float* sums, float* values) {
  __shared__ RowSums shared[kMaxWarps];
  __shared__ Kept kept;
  const int64_t token = blockIdx.x;
  if (kTeacher == kSparse && rows.ghosts) kept.find(rows, token);
  const RowSums row =
      sum_row<S, Z, kTeacher>(rows, token, k, rows.ghosts ? &kept : nullptr, shared);
  if (threadIdx.x != 0) return;
  check_token<kTeacher>(rows, token);
  const float label = Typed<S, Z>{rows}.label(token, row.s_max);
  write_sums<kTeacher>(rows, token, row, label, k, maxima, sums);
  if (values) write_values<kTeacher>(rows, token, row, label, k, values);
}

template <class S, class Z, class G, TeacherKind kTeacher>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    gradient_kernel(SaltRows rows, Scales k, const float* maxima, const float* sums,
                    const float* upstream, G* gradient, int64_t stride, int width) {
  // Last token first: its logits are what pass 1 has left in the cache.
  const int64_t token = rows.num_tokens - 1 - blockIdx.x;
  const RowSums row = read_sums<kTeacher>(rows, token, k, maxima, sums);
  const RowGradient g = gradient_of<kTeacher>(rows, token, row, *upstream, k);
  __shared__ Kept kept;
  if (kTeacher == kSparse && g.kd_scale != 0.0f) kept.find(rows, token);
  write_gradient<S, Z, kTeacher>(rows, token, &kept, g, gradient + token * stride, width);
}

template <class S, class Z, class G, TeacherKind kTeacher>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    both_passes_kernel(SaltRows rows, Scales k, float* values, const float* upstream, G* gradient,
                       int64_t stride, int width) {
  __shared__ RowSums shared[kMaxWarps];
  __shared__ Kept kept;
  const int64_t token = blockIdx.x;
  if (kTeacher == kSparse) kept.find(rows, token);
  const RowSums row =
      sum_row<S, Z, kTeacher>(rows, token, k, rows.ghosts ? &kept : nullptr, shared);
  if (threadIdx.x == 0) {
    check_token<kTeacher>(rows, token);
    const float label = Typed<S, Z>{rows}.label(token, row.s_max);
    write_values<kTeacher>(rows, token, row, label, k, values);
  }
  __syncthreads();  // the label's logit has been read before the gradient may replace it
  const RowGradient g = gradient_of<kTeacher>(rows, token, row, *upstream, k);
  write_gradient<S, Z, kTeacher>(rows, token, &kept, g, gradient + token * stride, width);
}

template <TeacherKind kTeacher>
constexpr int kLanesOf = kTeacher == kSparse ? kWarp : 1;

template <TeacherKind kTeacher>
__global__ void rescale_kernel(SaltRows rows, Scales k, const float* global_maxima, float* maxima,
                               float* sums) {
  // A warp per token where it reads logits of the student's.
  constexpr int kLanes = kLanesOf<kTeacher>;
  const int64_t token = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int lane = int(threadIdx.x) % kLanes;
  if (token >= rows.num_tokens) return;
  float gap = 0.0f;
  if (kTeacher == kSparse)
    gap = warp_sum(sparse_gap(rows, token, global_maxima[token], k, lane, kLanes));
  if (lane == 0) rescale_token<kTeacher>(rows, token, k, global_maxima, gap, maxima, sums);
}

template <TeacherKind kTeacher>
__global__ void finish_kernel(SaltRows rows, Scales k, const float* maxima, const float* sums,
                              float* values) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token < rows.num_tokens) finish_token<kTeacher>(rows, token, k, maxima, sums, values);
}

// Enough threads that each has work, few enough that many blocks share a multiprocessor.
int threads_for(const SaltRows& rows) {
  const int64_t groups = (rows.num_columns + kVector - 1) / kVector;
  int threads = 128;
  while (threads < kMaxThreads && int64_t(threads) * 8 < groups) threads *= 2;
  return threads;
}

constexpr int kTokenThreads = 128;  // of the kernels with one thread per token

unsigned token_blocks(const SaltRows& rows, int lanes = 1) {
  return unsigned((rows.num_tokens * lanes + kTokenThreads - 1) / kTokenThreads);
}

int last_error() { return int(cudaGetLastError()); }

}  // namespace

extern "C" {

const char* salt_error(int code) {
  return code == kErrorDtypes ? kErrorDtypesText : cudaGetErrorString(cudaError_t(code));
}

int salt_probe() {
  cudaFuncAttributes attributes;
  const int code = int(cudaFuncGetAttributes(&attributes, rescale_kernel<kDense>));
  cudaGetLastError();  // the answer is the code; later launches must not see it
  return code;
}

int salt_local_sums(const SaltRows* call, float* maxima, float* sums, float* values) {
  const SaltRows& rows = *call;
  return dispatch_inputs(rows, [&](auto s, auto z, auto teacher) {
    SALT_LAUNCH((row_sums_kernel<decltype(s), decltype(z), teacher()>), unsigned(rows.num_tokens),
                threads_for(rows), rows.stream, rows, scales_of(rows), maxima, sums, values);
    return last_error();
  });
}

int salt_rescale(const SaltRows* call, const float* global_maxima, float* maxima, float* sums) {
  const SaltRows& rows = *call;
  return dispatch_teacher(rows, [&](auto teacher) {
    SALT_LAUNCH((rescale_kernel<teacher()>), token_blocks(rows, kLanesOf<teacher()>),
                kTokenThreads, rows.stream, rows, scales_of(rows), global_maxima, maxima, sums);
    return last_error();
  });
}

int salt_finish(const SaltRows* call, const float* maxima, const float* sums, float* values) {
  const SaltRows& rows = *call;
  return dispatch_teacher(rows, [&](auto teacher) {
    SALT_LAUNCH((finish_kernel<teacher()>), token_blocks(rows), kTokenThreads, rows.stream, rows,
                scales_of(rows), maxima, sums, values);
    return last_error();
  });
}

int salt_gradient(const SaltRows* call, const float* maxima, const float* sums,
                  const float* upstream, void* target, int64_t stride, int64_t width,
                  int32_t dtype) {
  const SaltRows& rows = *call;
  return dispatch_all(rows, dtype, [&](auto s, auto z, auto g, auto teacher) {
    using G = decltype(g);
    SALT_LAUNCH((gradient_kernel<decltype(s), decltype(z), G, teacher()>),
                unsigned(rows.num_tokens), threads_for(rows), rows.stream, rows, scales_of(rows),
                maxima, sums, upstream, static_cast<G*>(target), stride, int(width));
    return last_error();
  });
}

int salt_values_and_gradient(const SaltRows* call, float* values, const float* upstream,
                             void* target, int64_t stride, int64_t width, int32_t dtype) {
  const SaltRows& rows = *call;
  return dispatch_all(rows, dtype, [&](auto s, auto z, auto g, auto teacher) {
    using G = decltype(g);
    SALT_LAUNCH((both_passes_kernel<decltype(s), decltype(z), G, teacher()>),
                unsigned(rows.num_tokens), threads_for(rows), rows.stream, rows, scales_of(rows),
                values, upstream, static_cast<G*>(target), stride, int(width));
    return last_error();
  });
}
}
