// For functions that nvcc compiles for the GPU as well.
#pragma once

#if defined(__CUDACC__)
#  define SKERRY_ANYWHERE __host__ __device__
#else
#  define SKERRY_ANYWHERE
#endif
