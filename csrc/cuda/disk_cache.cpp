#include "cuda/disk_cache.h"

#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <system_error>

namespace schedulefree::cuda {
namespace {

namespace fs = std::filesystem;

constexpr const char kMagic[] = "schedulefree_cpp kernel 1";

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : "";
}

// Empty where this is a folder or a file of ours, or of root's, that nobody else may write.
std::string problem_of(const std::string& path, mode_t kind) {
  struct stat status{};
  if (lstat(path.c_str(), &status) != 0) return "it cannot be read";
  if ((status.st_mode & S_IFMT) != kind) return kind == S_IFDIR ? "it is no folder" : "it is no file";
  if (status.st_uid != geteuid() && status.st_uid != 0) return "it belongs to another user";
  return (status.st_mode & (S_IWGRP | S_IWOTH)) != 0 ? "others may write it" : "";
}

std::string file_of(const std::string& identity, const std::string& ending) {
  return cache_folder() + '/' + hash_of(identity) + ending;
}

std::string proof_ending(const std::string& gpu) { return '.' + hash_of(gpu) + ".proof"; }

// Empty where there is no file that may be trusted. In a folder that only we may write nobody exchanges it.
std::string read_file(const std::string& path) {
  if (!cache_problem().empty() || !problem_of(path, S_IFREG).empty()) return "";
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Whole or not at all.
void write_file(const std::string& path, const std::string& bytes) {
  const std::string folder = cache_folder();
  std::error_code error;
  if (folder.empty()) return;
  if (fs::create_directories(folder, error)) fs::permissions(folder, fs::perms::owner_all, error);
  if (!cache_problem().empty()) return;
  std::string temporary = path + ".XXXXXX";
  const int made = mkstemp(temporary.data());  // readable by us alone
  if (made < 0) return;
  close(made);
  std::ofstream file(temporary, std::ios::binary);
  file << bytes;
  file.close();
  if (file) fs::rename(temporary, path, error);
  if (!file || error) fs::remove(temporary, error);
}

// Takes a line from the front of `bytes`.
std::string take_line(std::string& bytes) {
  const std::size_t end = std::min(bytes.find('\n'), bytes.size());
  const std::string line = bytes.substr(0, end);
  bytes.erase(0, end + 1);
  return line;
}

std::string checksum_of(const Binary& binary) { return hash_of(binary.entry + '\n' + binary.code); }

}  // namespace

std::string cache_folder() {
  const std::string chosen = variable("SCHEDULEFREE_CPP_CACHE"), caches = variable("XDG_CACHE_HOME");
  if (!chosen.empty()) return chosen;
  if (!caches.empty()) return caches + "/schedulefree_cpp";
  const passwd* const user = getpwuid(geteuid());
  std::string home = variable("HOME");
  if (home.empty() && user != nullptr) home = user->pw_dir;
  return home.empty() ? "" : home + "/.cache/schedulefree_cpp";
}

std::string cache_problem() {
  const std::string folder = cache_folder();
  if (folder.empty()) return "there is no home folder";
  std::error_code error;
  const bool absent = fs::status(folder, error).type() == fs::file_type::not_found;
  return absent ? "" : problem_of(fs::canonical(folder, error).string(), S_IFDIR);
}

std::optional<Binary> read_cached(const std::string& identity) {
  std::string bytes = read_file(file_of(identity, ".kernel"));
  if (take_line(bytes) != kMagic || take_line(bytes) != identity) return std::nullopt;
  const std::string checksum = take_line(bytes);
  Binary binary;
  binary.entry = take_line(bytes);
  binary.code = std::move(bytes);
  if (checksum != checksum_of(binary)) return std::nullopt;
  return binary;
}

void write_cached(const std::string& identity, const Binary& binary) {
  write_file(file_of(identity, ".kernel"), std::string(kMagic) + '\n' + identity + '\n' +
                                               checksum_of(binary) + '\n' + binary.entry + '\n' +
                                               binary.code);
}

bool has_proof(const std::string& identity, const Binary& binary, const std::string& gpu) {
  return read_file(file_of(identity, proof_ending(gpu))) == checksum_of(binary) + '\n' + gpu + '\n';
}

void write_proof(const std::string& identity, const Binary& binary, const std::string& gpu) {
  write_file(file_of(identity, proof_ending(gpu)), checksum_of(binary) + '\n' + gpu + '\n');
}

std::vector<CachedKernel> cached_kernels() {
  std::map<std::string, CachedKernel> kernels;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(cache_folder(), error)) {
    std::string bytes = read_file(entry.path().string());
    const std::string key = entry.path().filename().string().substr(0, 16), first = take_line(bytes);
    if (first == kMagic) kernels[key].identity = take_line(bytes);
    if (entry.path().extension() == ".proof") kernels[key].proofs.push_back(take_line(bytes));
  }
  std::vector<CachedKernel> result;
  for (auto& [key, kernel] : kernels) {
    if (!kernel.identity.empty()) result.push_back(std::move(kernel));
  }
  return result;
}

}  // namespace schedulefree::cuda
