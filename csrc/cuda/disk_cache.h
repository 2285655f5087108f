// Compiled kernels on disk, and which GPUs have proved them. Plain C++ without torch.
//
// In $SCHEDULEFREE_CPP_CACHE, else $XDG_CACHE_HOME/schedulefree_cpp, else ~/.cache/schedulefree_cpp. A folder
// or file of another user, or one that others may write, is not read; a damaged file is as one that is not
// there; what cannot be written costs the next process its time. Files take their names when they are whole,
// so that processes may share a folder.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/compiler.h"

namespace schedulefree::cuda {

// The folder, whether or not it is there; empty where the environment tells of none.
std::string cache_folder();

// Why the folder is not used; empty where it is, or where it is not there yet.
std::string cache_problem();

std::optional<Binary> read_cached(const std::string& identity);
void write_cached(const std::string& identity, const Binary& binary);

// A proof is of the code itself: for other code of the same identity it does not count.
bool has_proof(const std::string& identity, const Binary& binary, const std::string& gpu);
void write_proof(const std::string& identity, const Binary& binary, const std::string& gpu);

struct CachedKernel {
  std::string identity;
  std::vector<std::string> proofs;  // the GPUs
};
std::vector<CachedKernel> cached_kernels();

}  // namespace schedulefree::cuda
