// What the operator library says of itself, and of its CUDA kernels: plain C, so that any caller can link to
// it.
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

// Registers the CUDA operators, whose kernels are compiled when they are first used. Needs a torch with CUDA
// in the process, and NVRTC. Returns null when they are registered, else why they are not; what failed once
// is not tried again.
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_load_cuda();

// What is known of CUDA here, a line "name\tvalue" each: driver, GPUs, NVRTC, the folder with compiled
// kernels, and how many are there and were proved on which GPU. Valid until this thread calls it again.
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_cuda_report();

// Compiles the kernels that training commonly needs and keeps them on disk, for an architecture such as
// "sm_90" or, where that is empty, for the GPUs of this machine. Calls `progress` with a line for each.
// Returns null, or why it stopped; valid until this thread calls it again.
SCHEDULEFREE_EXPORT const char* schedulefree_cpp_compile_kernels(const char* architecture,
                                                                 void (*progress)(const char* line));

// Has `log` called with a line of text when this process has compiled its first CUDA kernel, from the thread
// that compiled it.
SCHEDULEFREE_EXPORT void schedulefree_cpp_set_log(void (*log)(const char* line));

}  // extern "C"
