#include "build_info.h"

#include "cpu/isa_dispatch.h"

extern "C" {

const char* schedulefree_cpp_version() { return SCHEDULEFREE_VERSION; }

const char* schedulefree_cpp_compiler() { return SCHEDULEFREE_COMPILER; }

const char* schedulefree_cpp_min_torch() { return SCHEDULEFREE_MIN_TORCH; }

const char* schedulefree_cpp_cpu_isa() { return schedulefree::active_isa().name; }

}  // extern "C"
