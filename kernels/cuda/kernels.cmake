# GPU kernels. With nvcc each .cu becomes a fat binary beside _native, and all of them together the module _emulated, which
# runs them on this machine's processor for tests. Without nvcc neither is built, and nothing else misses them.
find_program(SKERRY_NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT SKERRY_NVCC)
  message(STATUS "CUDA: no nvcc found, so there are no GPU kernels in this build")
  return()
endif()
set(SKERRY_CUDA_ARCHS "75;80;90" CACHE STRING "Compute capabilities: numbers, or 'all' that this nvcc knows")
set(archs ${SKERRY_CUDA_ARCHS})
if(archs STREQUAL "all")
  execute_process(COMMAND ${SKERRY_NVCC} --list-gpu-arch OUTPUT_VARIABLE listed COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+" archs "${listed}")
endif()
list(SORT archs COMPARE NATURAL)
list(GET archs -1 newest)
set(targets)
foreach(arch ${archs})
  list(APPEND targets -gencode arch=compute_${arch},code=sm_${arch})
endforeach()
list(APPEND targets -gencode arch=compute_${newest},code=compute_${newest})  # for devices that come after it

set(SKERRY_CUDA_KERNELS)
file(GLOB cuda_headers CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.h ${CMAKE_CURRENT_SOURCE_DIR}/include/*.h)
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
foreach(source ${cuda_sources})
  get_filename_component(stem ${source} NAME_WE)
  set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/${stem}.fatbin)
  # Kept sets are exact and sums have one order, so products are contracted nowhere unless the source says fmaf.
  add_custom_command(OUTPUT ${fatbin}
    COMMAND ${SKERRY_NVCC} -fatbin -std=c++17 -O3 -fmad=false --threads 2 ${targets} -o ${fatbin} ${source}
    DEPENDS ${source} ${cuda_headers} COMMENT "CUDA ${stem} for ${archs}" VERBATIM)
  list(APPEND SKERRY_CUDA_KERNELS ${fatbin})
endforeach()
add_custom_target(skerry_cuda ALL DEPENDS ${SKERRY_CUDA_KERNELS})
install(FILES ${SKERRY_CUDA_KERNELS} DESTINATION skerry/kernels)

get_filename_component(cuda_root ${SKERRY_NVCC} REALPATH)
get_filename_component(cuda_root ${cuda_root} DIRECTORY)
find_path(SKERRY_CUDA_INCLUDE cuda_fp16.h HINTS ${cuda_root}/../include ${cuda_root}/../targets/x86_64-linux/include
  /usr/local/cuda/include)
nanobind_add_module(_emulated NB_STATIC bind_emulated.cpp cuda/emulator.cpp ${cuda_sources})
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-ffp-contract=off")
target_include_directories(_emulated SYSTEM PRIVATE ${SKERRY_CUDA_INCLUDE})
target_compile_definitions(_emulated PRIVATE SKERRY_CUDA_EMULATED)
target_compile_options(_emulated PRIVATE -O2 -U_FORTIFY_SOURCE)  # fibers jump between stacks
target_link_libraries(_emulated PRIVATE skerry_options)
install(TARGETS _emulated LIBRARY DESTINATION skerry/kernels)
