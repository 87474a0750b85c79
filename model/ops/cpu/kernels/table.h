// The table through which Python calls the functions of a unit, built from their C++ types.
//
// To add a function, write it and add one line to functions.h: Python reads its name and argument
// types from the table, and recorded calls are repeated through its `replay`.
#pragma once

#include "types.h"

struct Function {
  const char* name;
  const char* types;  // one letter per argument: see type_letter
  void* address;
  void (*replay)(const int64_t* arguments);  // calls the function with recorded arguments
};

// One unit's functions. bindings.py reads this structure.
struct Kernels {
  const Function* functions;
  int64_t count;
  int64_t int16_weights;  // whether bf16 weights are stored as 16-bit integers with scales
};

extern HIDDEN const Kernels avx2_kernels, avx_vnni_kernels, vnni_kernels, avx512_kernels,
    portable_kernels;

namespace {

template <typename T>
constexpr char type_letter() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  if constexpr (std::is_same_v<T, int64_t>) return 'q';
  if constexpr (std::is_same_v<T, int32_t>) return 'i';
  if constexpr (std::is_same_v<T, bool>) return '?';
  if constexpr (std::is_same_v<T, float>) return 'f';
  return 0;
}

// A recorded argument takes 8 bytes, of which it fills the first.
template <typename T>
T recorded_argument(const int64_t* slot) {
  T value;
  memcpy(&value, slot, sizeof value);
  return value;
}

template <auto function>
struct Binding;

template <typename... T, void (*function)(T...)>
struct Binding<function> {
  static_assert(((type_letter<T>() != 0) && ...), "an argument has a type that Python cannot pass");
  static constexpr char types[] = {type_letter<T>()..., 0};

  static void replay(const int64_t* arguments) {
    replay(arguments, std::index_sequence_for<T...>());
  }

  template <size_t... I>
  static void replay(const int64_t* arguments, std::index_sequence<I...>) {
    function(recorded_argument<T>(arguments + I)...);
  }
};

}  // namespace

// A macro and not a function, because the table must be a constant: computing it when the library
// is loaded would execute AVX-512 code on processors without AVX-512.
#define NATIVE_FUNCTION(function) \
  { #function, Binding<function>::types, (void*)function, Binding<function>::replay }
