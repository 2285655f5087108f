#include "cuda/disk_cache.h"

#include <dirent.h>
#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace schedulefree::cuda {
namespace {

constexpr const char kMagic[] = "schedulefree_cpp kernel 1";
constexpr std::size_t kMostBytes = std::size_t{16} << 20;  // of a file: a kernel has about 100 KB

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr ? value : "";
}

// Empty where this is a folder or a file of ours that nobody else may write.
std::string problem_of(const struct stat& status) {
  if (status.st_uid != geteuid()) return "it belongs to another user";
  if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) return "others may write it";
  return "";
}

std::string file_of(const std::string& identity, const std::string& ending) {
  return cache_folder() + '/' + hash_of(identity) + ending;
}

std::string proof_ending(const std::string& gpu) { return '.' + hash_of(gpu) + ".proof"; }

// Closes a descriptor.
struct Descriptor {
  int number;
  explicit Descriptor(int number) : number(number) {}
  ~Descriptor() {
    if (number >= 0) close(number);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
};

// Empty where there is no file that may be trusted.
std::string read_file(const std::string& path) {
  if (!cache_problem().empty()) return "";
  const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  struct stat status{};
  if (file.number < 0 || fstat(file.number, &status) != 0 || !S_ISREG(status.st_mode) ||
      !problem_of(status).empty() || static_cast<std::size_t>(status.st_size) > kMostBytes)
    return "";
  std::string bytes(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = read(file.number, bytes.data() + done, bytes.size() - done);
    if (got <= 0) return "";
    done += static_cast<std::size_t>(got);
  }
  return bytes;
}

void make_folders(const std::string& path) {
  for (std::size_t slash = path.find('/', 1); slash != std::string::npos; slash = path.find('/', slash + 1))
    mkdir(path.substr(0, slash).c_str(), 0700);
  mkdir(path.c_str(), 0700);
}

// Whole or not at all.
void write_file(const std::string& path, const std::string& bytes) {
  if (cache_folder().empty()) return;
  make_folders(cache_folder());
  if (!cache_problem().empty()) return;
  std::string temporary = path + ".XXXXXX";
  const Descriptor file(mkostemp(temporary.data(), O_CLOEXEC));
  if (file.number < 0) return;
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t put = write(file.number, bytes.data() + done, bytes.size() - done);
    if (put <= 0) break;
    done += static_cast<std::size_t>(put);
  }
  if (done != bytes.size() || rename(temporary.c_str(), path.c_str()) != 0) unlink(temporary.c_str());
}

// Takes a line from the front of `bytes`.
std::string take_line(std::string& bytes) {
  const std::size_t end = bytes.find('\n');
  if (end == std::string::npos) return "";
  const std::string line = bytes.substr(0, end);
  bytes.erase(0, end + 1);
  return line;
}

std::string checksum_of(const Binary& binary) { return hash_of(binary.entry + '\n' + binary.code); }

}  // namespace

std::string cache_folder() {
  std::string folder = variable("SCHEDULEFREE_CPP_CACHE");
  if (!folder.empty()) return folder;
  folder = variable("XDG_CACHE_HOME");
  if (!folder.empty()) return folder + "/schedulefree_cpp";
  folder = variable("HOME");
  if (folder.empty()) {
    const passwd* const user = getpwuid(geteuid());
    if (user != nullptr && user->pw_dir != nullptr) folder = user->pw_dir;
  }
  return folder.empty() ? "" : folder + "/.cache/schedulefree_cpp";
}

std::string cache_problem() {
  const std::string folder = cache_folder();
  if (folder.empty()) return "there is no home folder";
  struct stat status{};
  if (stat(folder.c_str(), &status) != 0) return errno == ENOENT ? "" : std::strerror(errno);
  return S_ISDIR(status.st_mode) ? problem_of(status) : "it is no folder";
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
  std::string bytes = read_file(file_of(identity, proof_ending(gpu)));
  return take_line(bytes) == checksum_of(binary) && take_line(bytes) == gpu;
}

void write_proof(const std::string& identity, const Binary& binary, const std::string& gpu) {
  write_file(file_of(identity, proof_ending(gpu)), checksum_of(binary) + '\n' + gpu + '\n');
}

std::vector<CachedKernel> cached_kernels() {
  std::map<std::string, CachedKernel> kernels;
  DIR* const folder = opendir(cache_folder().c_str());
  if (folder == nullptr) return {};
  while (const dirent* const entry = readdir(folder)) {
    const std::string name = entry->d_name, key = name.substr(0, name.find('.'));
    std::string bytes = read_file(cache_folder() + '/' + name);
    const std::string first = take_line(bytes), second = take_line(bytes);
    if (name == key + ".kernel" && first == kMagic) kernels[key].identity = second;
    if (name.size() > 6 && name.rfind(".proof") == name.size() - 6) kernels[key].proofs.push_back(second);
  }
  closedir(folder);
  std::vector<CachedKernel> result;
  for (auto& [key, kernel] : kernels) {
    if (!kernel.identity.empty()) result.push_back(std::move(kernel));
  }
  std::sort(result.begin(), result.end(),
            [](const CachedKernel& l, const CachedKernel& r) { return l.identity < r.identity; });
  return result;
}

}  // namespace schedulefree::cuda
