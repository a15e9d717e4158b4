# XLA's FFI headers, from the jaxlib of the building interpreter; jax itself is not imported.
# Sets JAX_QGEMM_FFI_INCLUDE_DIR and checks the version: a handler loads only into a runtime whose
# minor version is at least that of its headers, so they must be the oldest supported jaxlib's.
set(JAX_QGEMM_FFI_MINOR_MAX 3) # jaxlib 0.10

if(NOT JAX_QGEMM_FFI_INCLUDE_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(next(iter(u.find_spec('jaxlib').submodule_search_locations)))"
    OUTPUT_VARIABLE jaxlib_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "jax_qgemm: jaxlib is not installed for ${Python_EXECUTABLE}; "
                        "its headers are needed to build (pip install 'jaxlib==0.10.*').")
  endif()
  set(JAX_QGEMM_FFI_INCLUDE_DIR "${jaxlib_dir}/include")
endif()

set(c_api "${JAX_QGEMM_FFI_INCLUDE_DIR}/xla/ffi/api/c_api.h")
if(NOT EXISTS "${c_api}")
  message(FATAL_ERROR "jax_qgemm: no XLA FFI headers: ${c_api} does not exist.")
endif()
foreach(part MAJOR MINOR)
  file(STRINGS "${c_api}" line REGEX "^#define XLA_FFI_API_${part} [0-9]+")
  string(REGEX REPLACE "^#define XLA_FFI_API_${part} ([0-9]+).*" "\\1" JAX_QGEMM_FFI_${part} "${line}")
endforeach()
message(STATUS "jax_qgemm: XLA FFI ${JAX_QGEMM_FFI_MAJOR}.${JAX_QGEMM_FFI_MINOR} "
               "from ${JAX_QGEMM_FFI_INCLUDE_DIR}")
if(JAX_QGEMM_FFI_MINOR GREATER JAX_QGEMM_FFI_MINOR_MAX AND NOT JAX_QGEMM_ALLOW_NEWER_FFI)
  message(
    FATAL_ERROR
      "jax_qgemm: the FFI headers have version ${JAX_QGEMM_FFI_MAJOR}.${JAX_QGEMM_FFI_MINOR}, but builds that "
      "run with every supported jaxlib need ${JAX_QGEMM_FFI_MAJOR}.${JAX_QGEMM_FFI_MINOR_MAX} (jaxlib 0.10). "
      "Build against jaxlib==0.10.*, or set JAX_QGEMM_ALLOW_NEWER_FFI=ON for a build that runs only here.")
endif()
