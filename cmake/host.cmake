# The CPU kernels. One object library per instruction set: the dispatcher chooses at run time, so no
# other file may be compiled with these flags. The generic objects are linked first: of an inline function
# that several files emit, the linker keeps the first copy, and that one must run on every CPU.
set(JAX_QGEMM_HOST_INSTRUCTION_SETS generic)
set(host_flags_avx2 -mavx2 -mfma -mf16c)
set(host_flags_avx512 ${host_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)

file(GLOB host_sources CONFIGURE_DEPENDS cuda/host/*.cc)
set(host_isa_objects "")
foreach(isa avx2 avx512)
  set(sources ${host_sources})
  list(FILTER sources INCLUDE REGEX "_${isa}\\.cc$")
  list(FILTER host_sources EXCLUDE REGEX "_${isa}\\.cc$")
  if(sources AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    add_library(jax_qgemm_host_${isa} OBJECT ${sources})
    target_compile_options(jax_qgemm_host_${isa} PRIVATE ${host_flags_${isa}})
    target_link_libraries(jax_qgemm_host_${isa} PRIVATE jax_qgemm_options)
    list(APPEND host_isa_objects jax_qgemm_host_${isa})
    list(APPEND JAX_QGEMM_HOST_INSTRUCTION_SETS ${isa})
    string(TOUPPER ${isa} isa_upper)
    target_compile_definitions(jax_qgemm_options INTERFACE JAX_QGEMM_HOST_${isa_upper}=1)
  endif()
endforeach()

file(GLOB cpu_handlers CONFIGURE_DEPENDS cuda/ffi/*_cpu.cc)
add_library(jax_qgemm_host OBJECT ${host_sources} ${cpu_handlers})
target_link_libraries(jax_qgemm_host PRIVATE jax_qgemm_options)
set(host_objects jax_qgemm_host ${host_isa_objects})
