// From the dtypes of a call to the types of a template. Host code only.

#pragma once

#include "dtypes.h"
#include "kd_loss.h"

namespace salt {

constexpr int kOk = 0;
constexpr int kErrorDtypes = -1;  // positive codes are CUDA's
constexpr const char* kErrorDtypesText = "no code is compiled for this combination of dtypes";

template <class Function>
int dispatch_one(int32_t dtype, Function function) {
  switch (dtype) {
    case kFp32: return function(float{});
    case kBf16: return function(Bf16{});
    case kFp16: return function(Fp16{});
    default: return kErrorDtypes;
  }
}

// function(student, teacher): without a teacher its type does not matter and is the student's.
template <class Function>
int dispatch_inputs(const SaltRows& rows, Function function) {
  return dispatch_one(rows.student_dtype, [&](auto s) {
    const int32_t teacher = rows.teacher ? rows.teacher_dtype : rows.student_dtype;
    return dispatch_one(teacher, [&](auto z) { return function(s, z); });
  });
}

// function(student, teacher, gradient): the gradient has the student's dtype, or any if that is fp32.
template <class Function>
int dispatch_all(const SaltRows& rows, int32_t gradient, Function function) {
  return dispatch_inputs(rows, [&](auto s, auto z) {
    if (gradient == rows.student_dtype) return function(s, z, s);
    if constexpr (sizeof(s) == sizeof(float)) {
      if (gradient == kBf16) return function(s, z, Bf16{});
      if (gradient == kFp16) return function(s, z, Fp16{});
    }
    return kErrorDtypes;
  });
}

}  // namespace salt
