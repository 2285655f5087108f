#define SCHEDULEFREE_ISA avx2
#include "step_kernel-inl.h"
