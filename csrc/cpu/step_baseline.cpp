#define SCHEDULEFREE_ISA baseline
#include "step_kernel-inl.h"
