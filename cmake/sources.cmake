# Collects csrc/<engine>/*.cpp; a file's name says for which instruction set it is compiled:
#   *_avx512.cpp, *_avx2.cpp   their own flags, x86-64 only
#   *_baseline.cpp, the rest   what every processor of the platform has
#
# An inline function that several files instantiate is kept once, from the first object that the linker sees. Files for
# wider instruction sets therefore come last: code that runs everywhere never picks up their copy.
file(GLOB marquardt_cpp CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/*/*.cpp")
file(GLOB MARQUARDT_CUDA_SOURCES CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/*/*.cu")
list(FILTER marquardt_cpp EXCLUDE REGEX "/csrc/emulation/")
list(FILTER MARQUARDT_CUDA_SOURCES EXCLUDE REGEX "/csrc/emulation/")

set(marquardt_avx2 ${marquardt_cpp})
list(FILTER marquardt_avx2 INCLUDE REGEX "_avx2\\.cpp$")
set(marquardt_avx512 ${marquardt_cpp})
list(FILTER marquardt_avx512 INCLUDE REGEX "_avx512\\.cpp$")
list(FILTER marquardt_cpp EXCLUDE REGEX "_avx(2|512)\\.cpp$")
if(NOT marquardt_cpp)
  message(FATAL_ERROR "no sources under ${CMAKE_CURRENT_SOURCE_DIR}/csrc")
endif()

set(MARQUARDT_SOURCES ${marquardt_cpp})
set(MARQUARDT_ISA "baseline")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2_flags -mavx2 -mfma -mf16c)
  set(avx512_flags -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512)
  set_source_files_properties(${marquardt_avx2} PROPERTIES COMPILE_OPTIONS "${avx2_flags}")
  set_source_files_properties(${marquardt_avx512} PROPERTIES COMPILE_OPTIONS "${avx512_flags}")
  list(APPEND MARQUARDT_SOURCES ${marquardt_avx2} ${marquardt_avx512})
  string(APPEND MARQUARDT_ISA " avx2 avx512")
endif()
