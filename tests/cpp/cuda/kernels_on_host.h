// The kernels of csrc/cuda/kernels.cuh as functions of the host (kernels_on_host.cpp), in a library of their
// own: one is made of the sources as they are, and one for each fault that is planted in them.
#pragma once

// Runs `blocks` blocks of a kernel by the C++ expression that names it, with the addresses of its arguments.
using RunKernel = void (*)(unsigned blocks, void** arguments);

// The entry of each library. Null for a kernel that it does not have.
using FindKernel = RunKernel (*)(const char* name);
