// What launches need of torch, on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace schedulefree::stand_in {

class TorchOnHost : public cuda::Torch {
 public:
  cuda::Handle stream(int device) override { return streams_ + device; }
  void* allocate(int, std::size_t bytes) override {
    memory_.emplace_back(bytes / sizeof(std::uint64_t) + 1);
    return memory_.back().data();
  }

 private:
  char streams_[8] = {};
  std::vector<std::vector<std::uint64_t>> memory_;
};

}  // namespace schedulefree::stand_in
