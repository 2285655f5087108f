// The sources of the kernels, as CMake has put them into the library (cmake/EmbedSources.cmake).
#pragma once

namespace schedulefree::cuda {

struct EmbeddedSource {
  const char* name;  // as it is included
  const char* text;
};

inline constexpr EmbeddedSource embedded_sources[] = {
#include "embedded_sources.inc"
};

}  // namespace schedulefree::cuda
