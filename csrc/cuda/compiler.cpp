#include "cuda/compiler.h"

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda/driver.h"
#include "cuda/embedded_sources.h"

namespace schedulefree::cuda {
namespace {

constexpr const char kProgram[] = "#include \"cuda/kernels.cuh\"\nusing namespace schedulefree;\n";

// Bits that are those of the CPU: no contraction, IEEE division and square root, no flush to zero.
constexpr const char* kOptions[] = {"-std=c++17",      "-default-device",  "--fmad=false",
                                    "--prec-div=true", "--prec-sqrt=true", "--ftz=false"};

// Headers of the C++ library, for which prelude.h stands.
constexpr const char* kStandardHeaders[] = {"cfloat",  "cmath",   "cstddef",
                                            "cstdint", "cstring", "type_traits"};

const std::string& hash_of_sources() {
  static const std::string hash = [] {
    std::string all = kProgram;
    for (const EmbeddedSource& source : embedded_sources) all += source.text;
    for (const char* const option : kOptions) all += option;
    return hash_of(all);
  }();
  return hash;
}

std::string log_of(Handle program) {
  std::size_t size = 0;
  nvrtc().nvrtcGetProgramLogSize(program, &size);
  std::string log(size, '\0');
  nvrtc().nvrtcGetProgramLog(program, log.data());
  return log.c_str();
}

}  // namespace

std::string hash_of(const std::string& bytes) {
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001B3u;
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::string identity_of(const std::string& kernel, const std::string& architecture) {
  return architecture + ", NVRTC " + dotted(nvrtc_version()) + ", sources " + hash_of_sources() + ": " +
         kernel;
}

Binary compile(const std::string& kernel, const std::string& architecture) {
  const Nvrtc& api = nvrtc();
  std::vector<const char*> names, texts;
  for (const EmbeddedSource& source : embedded_sources) {
    names.push_back(source.name);
    texts.push_back(source.text);
  }
  for (const char* const header : kStandardHeaders) {
    names.push_back(header);
    texts.push_back("#include \"cuda/prelude.h\"\n");
  }

  struct Program {
    Handle handle = nullptr;
    ~Program() { nvrtc().nvrtcDestroyProgram.address(&handle); }
  } program;
  api.nvrtcCreateProgram(&program.handle, kProgram, "schedulefree_cpp.cu", static_cast<int>(names.size()),
                         texts.data(), names.data());
  api.nvrtcAddNameExpression(program.handle, kernel.c_str());
  const std::string target = "--gpu-architecture=" + architecture;
  std::vector<const char*> options(std::begin(kOptions), std::end(kOptions));
  options.push_back(target.c_str());
  const int result =
      api.nvrtcCompileProgram.address(program.handle, static_cast<int>(options.size()), options.data());
  if (result != 0) {
    throw std::runtime_error("schedulefree_cpp: NVRTC " + dotted(nvrtc_version()) + " (" + api.path +
                             ") cannot compile " + kernel + " for " + architecture + ": error " +
                             std::to_string(result) + '\n' + log_of(program.handle));
  }
  Binary binary;
  const char* entry = nullptr;
  api.nvrtcGetLoweredName(program.handle, kernel.c_str(), &entry);
  binary.entry = entry;
  std::size_t size = 0;
  api.nvrtcGetCUBINSize(program.handle, &size);
  binary.code.resize(size);
  api.nvrtcGetCUBIN(program.handle, binary.code.data());
  return binary;
}

}  // namespace schedulefree::cuda
