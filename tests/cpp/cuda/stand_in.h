// A driver and an NVRTC that run kernels on the host (kernels_on_host.h): what is launched runs at once, on
// fibers. Memory on a device is memory of its own on the host; the calls that a capture forbids fail during
// one.
#pragma once

#include <map>
#include <set>
#include <string>

#include "cuda/driver.h"
#include "cuda/kernels_on_host.h"

namespace schedulefree::stand_in {

struct Machine {
  int driver_version = 13000, nvrtc_major = 13, nvrtc_minor = 0, gpus = 2;
  bool capturing = false;  // the streams that are asked about
  bool others_capture =
      false;             // another stream, in torch's mode: what could disturb it fails, but in relaxed mode
  std::string failing;   // a function that fails
  int failing_call = 1;  // at which of its calls from now on
  FindKernel find_kernel = nullptr;

  std::map<std::string, int> calls;     // since begin()
  std::map<cuda::Address, int> memory;  // that is not freed, and its device
  std::set<cuda::Handle> streams;       // that are not destroyed
  int modules = 0;                      // that are not unloaded
  int last_code = 0;                    // of an injected error
};
Machine& machine();

// Puts a new driver and a new NVRTC into use, which no cache of the library knows yet, and a machine as it is
// declared, with the kernels of a library beside the test: "kernels", or one with a planted fault.
void begin(const std::string& kernels = "kernels");

}  // namespace schedulefree::stand_in
