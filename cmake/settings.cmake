# A setting comes from -D, else from the environment variable of the same name, else its default. It is
# not cached, so that each configure run of a kept build directory follows the environment.
function(jax_qgemm_setting name default)
  if("${${name}}" STREQUAL "")
    set(${name} "$ENV{${name}}")
  endif()
  if("${${name}}" STREQUAL "")
    set(${name} "${default}")
  endif()
  set(${name} "${${name}}" PARENT_SCOPE)
endfunction()

# auto (on if a compiler is found), on (or fail), wheels (the compiler from PyPI), off
jax_qgemm_setting(JAX_QGEMM_CUDA auto)
# separated by ; or , and a bare number means machine code alone (-real)
jax_qgemm_setting(JAX_QGEMM_CUDA_ARCHITECTURES "80;86;89;90a;90-virtual")
# build against FFI headers newer than jaxlib 0.10's; the result then needs that jaxlib or a later one
jax_qgemm_setting(JAX_QGEMM_ALLOW_NEWER_FFI OFF)
