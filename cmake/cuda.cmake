# Decides whether the CUDA kernels are built, and for which architectures.
#   MARQUARDT_CUDA        OFF forbids, ON forces, AUTO builds them when there are .cu files and nvcc is found
#   MARQUARDT_CUDA_ARCHS  list (spaces, commas or semicolons) in CMake's notation: 90-real is SASS for sm_90, 90-virtual
#                         PTX for compute_90, 90 both; sm_90 and compute_90 are understood too
set(MARQUARDT_CUDA_ARCH_LIST "")

function(marquardt_parse_archs text result)
  string(REGEX REPLACE "[ ,;]+" ";" names "${text}")
  set(archs "")
  foreach(name IN LISTS names)
    if(name STREQUAL "")
      continue()
    elseif(name MATCHES "^sm_([0-9]+[af]?)$")
      list(APPEND archs "${CMAKE_MATCH_1}-real")
    elseif(name MATCHES "^compute_([0-9]+[af]?)$")
      list(APPEND archs "${CMAKE_MATCH_1}-virtual")
    elseif(name MATCHES "^[0-9]+[af]?(-real|-virtual)?$")
      list(APPEND archs "${name}")
    else()
      message(FATAL_ERROR "MARQUARDT_CUDA_ARCHS: \"${name}\" is no architecture; examples: 90 90-real 100-virtual sm_80")
    endif()
  endforeach()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

if(MARQUARDT_CUDA STREQUAL "OFF")
  set(MARQUARDT_CUDA_SOURCES "")
elseif(NOT MARQUARDT_CUDA_SOURCES)
  if(MARQUARDT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MARQUARDT_CUDA=1, but this source tree has no CUDA kernels (csrc/*/*.cu)")
  endif()
else()
  find_program(MARQUARDT_NVCC NAMES "$ENV{CUDACXX}" nvcc
               HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(MARQUARDT_NVCC)
    set(ENV{CUDACXX} "${MARQUARDT_NVCC}")
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      unset(CMAKE_CUDA_COMPILER CACHE) # asked again next time
      message(FATAL_ERROR "${MARQUARDT_NVCC} does not compile a test program (an unsupported host compiler? "
                          "CUDAHOSTCXX names another). MARQUARDT_CUDA=0 builds the CPU kernels alone.")
    endif()
    set(CMAKE_CUDA_ARCHITECTURES OFF) # the target names them, once the compiler's version is known
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
      message(FATAL_ERROR "the CUDA kernels need nvcc 12.1 or newer (launches that carry 8 KiB), found ${CMAKE_CUDA_COMPILER_VERSION}. "
                          "MARQUARDT_CUDA=0 builds the CPU kernels alone.")
    endif()
    set(wanted "${MARQUARDT_CUDA_ARCHS}")
    if(wanted STREQUAL "")
      if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
        set(wanted "80-real 90-real 80-virtual 90-virtual") # this nvcc does not know Blackwell
      else()
        set(wanted "80-real 90-real 100-real 80-virtual 100-virtual")
      endif()
    endif()
    marquardt_parse_archs("${wanted}" MARQUARDT_CUDA_ARCH_LIST)
    message(NOTICE "CUDA kernels: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${MARQUARDT_CUDA_ARCH_LIST}")
  elseif(MARQUARDT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MARQUARDT_CUDA=1, but no nvcc was found (PATH, CUDACXX, CUDA_HOME, /usr/local/cuda)")
  else()
    message(NOTICE "CUDA kernels: none (nvcc was not found)")
    set(MARQUARDT_CUDA_SOURCES "")
  endif()
endif()

function(marquardt_configure_cuda target)
  target_compile_definitions(${target} PRIVATE MARQUARDT_WITH_CUDA=1)
  # The static runtime needs no libcudart when the library loads, so it loads on machines without CUDA.
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${MARQUARDT_CUDA_ARCH_LIST}" CUDA_RUNTIME_LIBRARY Static)
  # No contraction, as for the host: the maps then give the same bits on both; hot loops name their fused operations.
  target_compile_options(${target} PRIVATE
                         $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -fmad=false -Xfatbin=-compress-all
                         -Xcompiler=-Wall,-fno-math-errno,-ffp-contract=off>)
  if(MARQUARDT_LINEINFO) # source lines for a profiler; they triple the library, and name the directory it was built in
    set_source_files_properties(${MARQUARDT_CUDA_SOURCES} PROPERTIES COMPILE_OPTIONS -lineinfo)
  endif()
  if(MARQUARDT_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>)
  endif()
endfunction()
