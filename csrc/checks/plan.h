// From lists of tensors to step_args.h.
#pragma once

#include <vector>

#include "checks/tensor_facts.h"

namespace schedulefree {

// What the tensors of a list are to their parameters. A list of y stands first, the others in this order.
enum class Role { kY, kYLo, kGrad, kZ, kZLo, kMoment, kScale, kMean };

struct ListSpec {
  const char* name;
  const TensorList* list;
  Stream TensorArgs::* stream;
  Role role;
  bool written;
  bool optional;
};

// Which parameters an operator takes, fewer from one to the next.
enum class Formats {
  kAny,
  kStepped,     // no 16 bits alone
  kWholeState,  // whose z has no low half
  kWhole        // and neither has y
};

// One entry for every parameter, with the tensors of all lists that are there, each checked for device,
// dtype, shape, memory of its own, and whatever its parameter's format needs.
StepPlan make_plan(const char* op, Backend backend, const std::vector<ListSpec>& lists, Formats formats);

}  // namespace schedulefree
