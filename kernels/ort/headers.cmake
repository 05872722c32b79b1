# ONNX Runtime's C headers: its Python wheel carries none. A packaged copy (scripts/ort_headers.sh puts Debian's under
# build/ort/include), else the upstream release, each file by hash. Sets SKERRY_ORT_INCLUDE.
# Built against API 21 on purpose: the API is versioned, so the library runs on every later runtime.
find_path(SKERRY_ORT_INCLUDE onnxruntime_cxx_api.h
  PATHS ${CMAKE_SOURCE_DIR}/build/ort/include /usr/include/onnxruntime /usr/local/include/onnxruntime
  PATH_SUFFIXES onnxruntime onnxruntime/core/session)
if(NOT SKERRY_ORT_INCLUDE AND SKERRY_ORT STREQUAL "FOUND")
  set(SKERRY_ORT OFF)
  message(STATUS "ONNX Runtime headers: none found, so its library of ops is left out")
  return()
endif()
if(NOT SKERRY_ORT_INCLUDE)
  set(fetched ${CMAKE_BINARY_DIR}/ort/include)
  set(upstream https://raw.githubusercontent.com/microsoft/onnxruntime/v1.21.0/include/onnxruntime/core/session)
  foreach(pair
      onnxruntime_c_api.h=7783e9664bdb0b1b36145b5c8587dd1bc9a399aa000edf2e3dd03003cafc6882
      onnxruntime_cxx_api.h=b3b27d6a6fced0725e3f188379cca008b1d7a456997684756374d4b388f2cf05
      onnxruntime_cxx_inline.h=7f448e994c732eacd9e49900365fefa8f1ac998a6d6eb78e5f4aab1b8d9d8900
      onnxruntime_float16.h=6c4db3d1954b266c4febe413351af86cac922e3448538e7e452e51d646e56a4a)
    string(REPLACE "=" ";" pair ${pair})
    list(GET pair 0 name)
    list(GET pair 1 hash)
    file(DOWNLOAD ${upstream}/${name} ${fetched}/${name} EXPECTED_HASH SHA256=${hash} STATUS status)
    list(GET status 0 code)
    if(NOT code EQUAL 0)
      message(FATAL_ERROR "ONNX Runtime headers: no packaged copy found and ${name} could not be fetched. "
        "Install libonnxruntime-dev or set -DSKERRY_ORT_INCLUDE=<directory of onnxruntime_cxx_api.h>.")
    endif()
  endforeach()
  set(SKERRY_ORT_INCLUDE ${fetched} CACHE PATH "ONNX Runtime headers" FORCE)
endif()
message(STATUS "ONNX Runtime headers: ${SKERRY_ORT_INCLUDE}")
