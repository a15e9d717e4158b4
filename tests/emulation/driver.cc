// The driver's functions that launchers ask for, with its own conditions.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

namespace {

int size_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
      return 8;
  }
  __builtin_trap();
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  constexpr uint64_t kMaxSize = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
  bool valid = rank == 2 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && reinterpret_cast<uintptr_t>(map) % 64 == 0;
  valid &= strides[0] % 16 == 0 && strides[0] < kMaxStride;
  const int element_bytes = size_of(type);
  const cuuint32_t box_bytes = box[0] * static_cast<cuuint32_t>(element_bytes);
  valid &= box_bytes % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || box_bytes <= 128);
  for (int i = 0; i < 2; ++i) {
    valid &= sizes[i] > 0 && sizes[i] <= kMaxSize && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
  }
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(base),
          static_cast<int64_t>(sizes[0]),
          static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(strides[0]),
          static_cast<int>(box[0]),
          static_cast<int>(box[1]),
          element_bytes,
          swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned,
                                             cudaDriverEntryPointQueryResult* found) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) __builtin_trap();
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
