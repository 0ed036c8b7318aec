// The element types the kernels read and write, and the names people know them by.
#pragma once

#include <cstdint>

namespace marquardt {

enum class DType : uint8_t { f32, f64, bf16, f16 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
  }
  return "unknown";
}

}  // namespace marquardt
