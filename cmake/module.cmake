# The CUDA objects and the one extension module, jax_qgemm/_native: module.cc is compiled by the host
# compiler and sees the handlers only as extern "C" symbols.
set(cuda_objects "")
if(JAX_QGEMM_CUDA_ENABLED)
  file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/ffi/*_cuda.cc cuda/ffi/*.cu cuda/kernels/*.cu)
  add_library(jax_qgemm_cuda OBJECT ${cuda_sources})
  set_target_properties(jax_qgemm_cuda PROPERTIES CUDA_ARCHITECTURES "${JAX_QGEMM_ARCHITECTURES}")
  target_link_libraries(jax_qgemm_cuda PRIVATE jax_qgemm_options)
  list(APPEND cuda_objects jax_qgemm_cuda)

  file(GLOB sm90_sources CONFIGURE_DEPENDS cuda/kernels/sm90/*.cu)
  if(sm90_sources AND JAX_QGEMM_SM90A)
    add_library(jax_qgemm_cuda_sm90a OBJECT ${sm90_sources})
    set_target_properties(jax_qgemm_cuda_sm90a PROPERTIES CUDA_ARCHITECTURES 90a-real)
    target_link_libraries(jax_qgemm_cuda_sm90a PRIVATE jax_qgemm_options)
    target_compile_definitions(jax_qgemm_options INTERFACE JAX_QGEMM_WITH_SM90A=1)
    list(APPEND cuda_objects jax_qgemm_cuda_sm90a)
  endif()
endif()

configure_file(cmake/build_config.h.in generated/build_config.h @ONLY)

execute_process(COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
                OUTPUT_VARIABLE nanobind_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(nanobind CONFIG REQUIRED)

nanobind_add_module(_native STABLE_ABI NB_STATIC NOMINSIZE NB_SUPPRESS_WARNINGS cuda/ffi/module.cc)
target_link_libraries(_native PRIVATE jax_qgemm_options ${cuda_objects} ${host_objects})
if(JAX_QGEMM_CUDA_ENABLED)
  # The host compiler links, and not every CMake tells it where the static CUDA runtime lies.
  target_link_directories(_native PRIVATE ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES}
                          ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES})
endif()
install(TARGETS _native LIBRARY DESTINATION jax_qgemm)
