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
list(FILTER cuda_headers EXCLUDE REGEX "/(driver|paged_attention_inputs)\\.h$")  # of the host alone
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu)
foreach(source ${cuda_sources})
  get_filename_component(stem ${source} NAME_WE)
  set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/${stem}.fatbin)
  # Kept sets are exact: no fused multiply-adds where the definition rounds twice.
  set(exact $<$<STREQUAL:${stem},sample>:-fmad=false>)
  add_custom_command(OUTPUT ${fatbin}
    COMMAND ${SKERRY_NVCC} -fatbin -std=c++17 -O3 ${exact} --threads 2 ${targets} -o ${fatbin} ${source}
    DEPENDS ${source} ${cuda_headers} COMMENT "CUDA ${stem} for ${archs}" VERBATIM COMMAND_EXPAND_LISTS)
  list(APPEND SKERRY_CUDA_KERNELS ${fatbin})
endforeach()
add_custom_target(skerry_cuda ALL DEPENDS ${SKERRY_CUDA_KERNELS})
# What is in them, for who must know it without a GPU (cuda_library.py).
execute_process(COMMAND ${SKERRY_NVCC} --version OUTPUT_VARIABLE said COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" said "${said}")
list(JOIN archs ", " sms)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda_kernels.json
  "{\"sms\": [${sms}], \"ptx\": ${newest}, \"cuda\": \"${CMAKE_MATCH_1}\"}\n")
install(FILES ${SKERRY_CUDA_KERNELS} ${CMAKE_CURRENT_BINARY_DIR}/cuda_kernels.json DESTINATION skerry/kernels)

get_filename_component(cuda_root ${SKERRY_NVCC} REALPATH)
get_filename_component(cuda_root ${cuda_root} DIRECTORY)
find_path(SKERRY_CUDA_INCLUDE cuda_fp16.h HINTS ${cuda_root}/../include ${cuda_root}/../targets/x86_64-linux/include
  /usr/local/cuda/include)
add_library(skerry_emulator OBJECT cuda/emulator.cpp ${cuda_sources})
set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-ffp-contract=off")
target_include_directories(skerry_emulator SYSTEM PUBLIC ${SKERRY_CUDA_INCLUDE})
target_compile_definitions(skerry_emulator PUBLIC SKERRY_CUDA_EMULATED)
# Fibers jump between stacks; kernels look at shared memory as whatever it holds, as nvcc lets them.
target_compile_options(skerry_emulator PRIVATE -O2 -U_FORTIFY_SOURCE -fno-strict-aliasing -Wno-unknown-pragmas)
target_link_libraries(skerry_emulator PRIVATE skerry_options)
nanobind_add_module(_emulated NB_STATIC bind_emulated.cpp)
target_link_libraries(_emulated PRIVATE skerry_emulator skerry_options)
install(TARGETS _emulated LIBRARY DESTINATION skerry/kernels)

# The custom ops of a GPU on ONNX Runtime's CPU provider, for tests of whole graphs.
if(TARGET skerry_ort)
  add_library(skerry_ort_emulated SHARED ort/library_emulated.cpp ort/paged_attention_cuda.cpp cuda/driver_emulated.cpp)
  target_include_directories(skerry_ort_emulated SYSTEM PRIVATE ${SKERRY_ORT_INCLUDE})
  target_link_libraries(skerry_ort_emulated PRIVATE skerry_emulator skerry_kernels skerry_options)
  install(TARGETS skerry_ort_emulated LIBRARY DESTINATION skerry/kernels)
endif()
