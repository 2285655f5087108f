// A kernel's machine code, from the sources that the library carries. Plain C++ without torch.
#pragma once

#include <string>

namespace schedulefree::cuda {

// One kernel for one architecture.
struct Binary {
  std::string entry;  // its symbol
  std::string code;   // a cubin
};

// What the machine code of a kernel depends on, in words: architecture, NVRTC, sources and options, and name.
std::string identity_of(const std::string& kernel, const std::string& architecture);

// Compiles the kernel that a C++ expression names (KernelId::name()) for an architecture such as "sm_90".
//
// Throws std::runtime_error with NVRTC's own words where it refuses, as for an architecture that it does not
// know.
Binary compile(const std::string& kernel, const std::string& architecture);

// The 64 bits of FNV-1a in hexadecimal: names and damage, no secrets.
std::string hash_of(const std::string& bytes);

}  // namespace schedulefree::cuda
