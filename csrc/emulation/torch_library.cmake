# libmarquardt_emulated.so: the torch library whose CPU operators run through the emulated CUDA kernels. Tests that are
# given it (MARQUARDT_LIBRARY) prove those kernels with CPU tensors: the CPU plays the device, and no CPU kernel is in it.
if(NOT EXISTS "${MARQUARDT_TORCH_DIR}/include/torch/csrc/stable/library.h")
  return()
endif()

file(GLOB torch_library_sources CONFIGURE_DEPENDS "${MARQUARDT_CSRC}/core/*.cpp" "${MARQUARDT_CSRC}/frame/*.cpp"
     "${MARQUARDT_CSRC}/library/*.cpp" "${MARQUARDT_CSRC}/select/*.cpp")
list(FILTER torch_library_sources EXCLUDE REGEX "/(frame|select)/(cpu[^/]*|cuda_plan)\\.cpp$") # the plan is among the objects
add_library(marquardt_emulated MODULE EXCLUDE_FROM_ALL limits.cpp ${torch_library_sources}
            $<TARGET_OBJECTS:frame_objects_plain> $<TARGET_OBJECTS:machine_objects_plain>)
emulation_configure(marquardt_emulated plain)
target_include_directories(marquardt_emulated SYSTEM PRIVATE "${MARQUARDT_TORCH_DIR}/include")
target_compile_definitions(marquardt_emulated PRIVATE TORCH_TARGET_VERSION=0x020b000000000000
                                                      MARQUARDT_VERSION="${MARQUARDT_VERSION}")
target_link_directories(marquardt_emulated PRIVATE "${MARQUARDT_TORCH_DIR}/lib")
target_link_options(marquardt_emulated PRIVATE LINKER:--no-undefined)
target_link_libraries(marquardt_emulated PRIVATE -Wl,--no-as-needed torch_cpu c10 torch)
set_target_properties(marquardt_emulated PROPERTIES PREFIX lib SUFFIX .so SKIP_BUILD_RPATH ON DEFINE_SYMBOL "")
