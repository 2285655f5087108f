#define SCHEDULEFREE_ISA avx512
#include "step_kernel-inl.h"
