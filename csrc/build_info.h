// What the operator library says of itself, and how it loads its CUDA half: plain C, so that any caller can
// link to it.
#pragma once

#if defined(_WIN32)
#define SCHEDULEFREE_EXPORT __declspec(dllexport)
#else
#define SCHEDULEFREE_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// The package version this library was built as, such as "0.1.0".
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_version();

// The compiler that built it, such as "GNU 12.2.0".
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_compiler();

// The oldest torch it runs with, such as "2.10".
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_min_torch();

// The instruction set of its CPU kernels: "baseline", "avx2" or "avx512". Throws std::runtime_error when
// SCHEDULEFREE_CPU_ISA asks for one that this processor does not have.
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_cpu_isa();

// What was built for CUDA, such as "nvcc 13.0.88 for 80-real 90", or "not built: " and the reason.
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_cuda_build();

// Loads the CUDA kernels, libschedulefree_cpp_cuda.so, from beside this library. Needs a torch with CUDA in
// the process. Returns null when they are loaded, else why they are not; what failed once is not tried again.
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_load_cuda();

}  // extern "C"
