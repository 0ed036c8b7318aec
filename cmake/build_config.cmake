# Writes build_config.h, what the library can tell about its own making.
set(MARQUARDT_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_RELEASE} -std=c++20" MARQUARDT_CXX_FLAGS)
if(MARQUARDT_CUDA_SOURCES)
  set(MARQUARDT_CUDA_COMPILER "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  list(JOIN MARQUARDT_CUDA_ARCH_LIST " " MARQUARDT_CUDA_ARCHS_BUILT)
else()
  set(MARQUARDT_CUDA_COMPILER "none")
  set(MARQUARDT_CUDA_ARCHS_BUILT "none")
endif()

# The commit of this tree, not of a repository that merely contains it.
set(MARQUARDT_COMMIT "unknown")
find_package(Git QUIET)
if(Git_FOUND AND EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.git")
  execute_process(COMMAND "${GIT_EXECUTABLE}" rev-parse --short=12 HEAD WORKING_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}"
                  OUTPUT_VARIABLE MARQUARDT_COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
                  RESULT_VARIABLE git_failed)
  if(git_failed)
    set(MARQUARDT_COMMIT "unknown") # a repository without a commit answers "HEAD"
  endif()
endif()
configure_file("${CMAKE_CURRENT_LIST_DIR}/build_config.h.in" "${CMAKE_CURRENT_BINARY_DIR}/generated/build_config.h")
