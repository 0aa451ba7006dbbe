// From a call to the types of a template and the scales of its logits. Host code only.

#pragma once

#include <type_traits>

#include "kd_loss.h"
#include "row_math.h"

namespace salt {

constexpr int kOk = 0;
constexpr int kErrorDtypes = -1;  // positive codes are CUDA's
constexpr const char* kErrorDtypesText = "no code is compiled for this combination of dtypes";

// Without a teacher there is only the CE, which is at temperature 1.
inline Scales scales_of(const SaltRows& rows) {
  const float b = rows.teacher || rows.ids ? rows.student_temperature : 1.0f;
  return {kLog2E / rows.teacher_temperature, kLog2E / b, b != 1.0f};
}

template <class Function>
int dispatch_one(int32_t dtype, Function function) {
  switch (dtype) {
    case kFp32: return function(float{});
    case kBf16: return function(Bf16{});
    case kFp16: return function(Fp16{});
    default: return kErrorDtypes;
  }
}

template <TeacherKind kTeacher>
using Of = std::integral_constant<TeacherKind, kTeacher>;

// function(Of<its kind>) for a call's teacher.
template <class Function>
int dispatch_teacher(const SaltRows& rows, Function function) {
  if (rows.teacher) return function(Of<kDense>{});
  return rows.ids ? function(Of<kSparse>{}) : function(Of<kNone>{});
}

// function(student, teacher, Of<its kind>). Without a teacher's logits its type is the student's.
template <class Function>
int dispatch_inputs(const SaltRows& rows, Function function) {
  return dispatch_one(rows.student_dtype, [&](auto s) {
    if (rows.ids) return function(s, s, Of<kSparse>{});
    if (!rows.teacher) return function(s, s, Of<kNone>{});
    return dispatch_one(rows.teacher_dtype,
                        [&](auto z) { return function(s, z, Of<kDense>{}); });
  });
}

// function(student, teacher, gradient, Of<its kind>). The gradient has the student's dtype, or any
// if that is fp32.
template <class Function>
int dispatch_all(const SaltRows& rows, int32_t gradient, Function function) {
  return dispatch_inputs(rows, [&](auto s, auto z, auto teacher) {
    if (gradient == rows.student_dtype) return function(s, z, s, teacher);
    if constexpr (sizeof(s) == sizeof(float)) {
      if (gradient == kBf16) return function(s, z, Bf16{}, teacher);
      if (gradient == kFp16) return function(s, z, Fp16{}, teacher);
    }
    return kErrorDtypes;
  });
}

}  // namespace salt
