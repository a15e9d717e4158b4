# Chooses the CUDA compiler, or none. Sets JAX_QGEMM_CUDA_ENABLED, JAX_QGEMM_ARCHITECTURES (normalized),
# JAX_QGEMM_SM90A (build the Hopper-only sources).
set(choices auto on wheels off)
if(NOT JAX_QGEMM_CUDA IN_LIST choices)
  list(JOIN choices ", " choices)
  message(FATAL_ERROR "jax_qgemm: JAX_QGEMM_CUDA is '${JAX_QGEMM_CUDA}'; expected one of ${choices}.")
endif()

# Only CUDACXX and the PATH count: a toolkit that CMake would find elsewhere was not asked for.
function(jax_qgemm_find_nvcc out)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(found NAMES "$ENV{CUDACXX}" NO_CACHE)
    if(NOT found)
      message(FATAL_ERROR "jax_qgemm: CUDACXX is '$ENV{CUDACXX}', which is no program.")
    endif()
  else()
    find_program(found NAMES nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
  endif()
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

# The wheels nvidia-cuda-nvcc, -crt, nvidia-nvvm, -runtime and -cccl share one root, nvidia/cu13.
function(jax_qgemm_find_nvcc_wheel out)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; print(next(iter(u.find_spec('nvidia.cu13').submodule_search_locations)))"
    OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status ERROR_QUIET)
  if(NOT status EQUAL 0 OR NOT EXISTS "${root}/bin/nvcc")
    message(FATAL_ERROR "jax_qgemm: JAX_QGEMM_CUDA=wheels, but the compiler wheels (nvidia-cuda-nvcc==13.0.* "
                        "and its companions, see pyproject.toml) are not installed for ${Python_EXECUTABLE}.")
  endif()
  set(${out} "${root}" PARENT_SCOPE)
endfunction()

set(JAX_QGEMM_CUDA_ENABLED OFF)
set(nvcc "")
if(JAX_QGEMM_CUDA STREQUAL "wheels")
  jax_qgemm_find_nvcc_wheel(root)
  set(nvcc "${root}/bin/nvcc")
  # The wheels keep their libraries in lib, while nvcc.profile points to lib64.
  string(APPEND CMAKE_CUDA_FLAGS " -L${root}/lib")
elseif(NOT JAX_QGEMM_CUDA STREQUAL "off")
  jax_qgemm_find_nvcc(nvcc)
  if(NOT nvcc AND JAX_QGEMM_CUDA STREQUAL "on")
    message(FATAL_ERROR "jax_qgemm: JAX_QGEMM_CUDA=on, but there is neither CUDACXX nor nvcc on the PATH. "
                        "JAX_QGEMM_CUDA=wheels takes the compiler from PyPI.")
  endif()
endif()

if(NOT nvcc)
  message(STATUS "jax_qgemm: CUDA off (JAX_QGEMM_CUDA=${JAX_QGEMM_CUDA})")
  return()
endif()

set(JAX_QGEMM_CUDA_ENABLED ON)
set(CMAKE_CUDA_COMPILER "${nvcc}")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
# Each target sets its own; without a value here CMake would detect a default by running a program.
set(CMAKE_CUDA_ARCHITECTURES OFF)

set(JAX_QGEMM_ARCHITECTURES "")
set(JAX_QGEMM_SM90A OFF)
string(REPLACE "," ";" requested "${JAX_QGEMM_CUDA_ARCHITECTURES}")
foreach(arch IN LISTS requested)
  if(arch MATCHES "^([0-9]+[af]?)$")
    list(APPEND JAX_QGEMM_ARCHITECTURES "${arch}-real")
  elseif(arch MATCHES "^[0-9]+[af]?-(real|virtual)$")
    list(APPEND JAX_QGEMM_ARCHITECTURES "${arch}")
  else()
    message(FATAL_ERROR "jax_qgemm: '${arch}' in JAX_QGEMM_CUDA_ARCHITECTURES; "
                        "expected numbers such as 80, 90a or 90-virtual.")
  endif()
  string(REGEX MATCH "^[0-9]+" number "${arch}")
  if(number LESS 80)
    message(FATAL_ERROR "jax_qgemm: architecture '${arch}' is older than 80 (Ampere), which is the minimum.")
  endif()
  if(arch MATCHES "^90a?(-real)?$")
    set(JAX_QGEMM_SM90A ON)
  endif()
endforeach()

enable_language(CUDA)
message(STATUS "jax_qgemm: CUDA on: ${nvcc} ${CMAKE_CUDA_COMPILER_VERSION}, "
               "architectures ${JAX_QGEMM_ARCHITECTURES}")
