// Files of Python's torch.save, written and read without Python.
//
// torch's own torch::pickle_save marks every dict in a way that torch.load(weights_only=True) refuses, and
// torch::pickle_load cannot read the OrderedDict that Module.state_dict() returns.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/ivalue.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace schedulefree::detail {

// The dtypes that files hold, by the names that they have there.
inline constexpr std::pair<const char*, at::ScalarType> kStorages[] = {
    {"torch FloatStorage", at::kFloat},
    {"torch DoubleStorage", at::kDouble},
    {"torch HalfStorage", at::kHalf},
    {"torch BFloat16Storage", at::kBFloat16},
    {"torch LongStorage", at::kLong},
    {"torch IntStorage", at::kInt},
    {"torch ShortStorage", at::kShort},
    {"torch CharStorage", at::kChar},
    {"torch ByteStorage", at::kByte},
    {"torch BoolStorage", at::kBool},
    {"torch ComplexFloatStorage", at::kComplexFloat},
    {"torch ComplexDoubleStorage", at::kComplexDouble},
};

// Contiguous, on the CPU and without a share in larger storage. Throws for a tensor that files do not hold.
inline at::Tensor for_file(const at::Tensor& t, const std::string& name) {
  const bool known = std::any_of(std::begin(kStorages), std::end(kStorages),
                                 [&](const auto& storage) { return storage.second == t.scalar_type(); });
  TORCH_CHECK_VALUE(known && t.layout() == at::kStrided, "Invalid ", name, ": a tensor of dtype ",
                    t.scalar_type(), " and layout ", t.layout(), " cannot be written");
  const at::Tensor own = t.detach().cpu().contiguous().resolve_conj().resolve_neg();
  return own.storage().nbytes() == own.nbytes() ? own : own.clone();
}

inline c10::IValue for_file(const c10::IValue& value, const std::string& name) {
  if (value.isTensor()) return for_file(value.toTensor(), name);
  if (value.isGenericDict()) {
    c10::impl::GenericDict dict(c10::AnyType::get(), c10::AnyType::get());
    for (const auto& entry : value.toGenericDict()) {
      const std::string key =
          entry.key().isString() ? entry.key().toStringRef() : std::to_string(entry.key().toInt());
      dict.insert(entry.key(), for_file(entry.value(), key));
    }
    return dict;
  }
  if (value.isList()) {
    c10::impl::GenericList list(c10::AnyType::get());
    for (const c10::IValue& item : value.toListRef()) list.push_back(for_file(item, name));
    return list;
  }
  if (value.isTuple()) {
    std::vector<c10::IValue> items;
    for (const c10::IValue& item : value.toTupleRef().elements()) items.push_back(for_file(item, name));
    return c10::ivalue::Tuple::create(std::move(items));
  }
  return value;
}

// Has the disk hold what was written to a file, or the names in a folder. Returns whether it does.
inline bool flush_to_disk(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  const bool flushed = ::fsync(file) == 0;
  return ::close(file) == 0 && flushed;
}

// Writes a value of dicts, lists and tuples over tensors, numbers, strings and None. All tensors must be on
// the CPU. The file at `path` is replaced only when the new one is complete and on disk; a process that is
// killed meanwhile leaves a file of that name with ".partial" at its end.
inline void write_pickle(const std::string& path, const c10::IValue& value) {
  std::string data;
  torch::jit::Pickler pickler([&](const char* begin, std::size_t size) { data.append(begin, size); }, nullptr,
                              nullptr, nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(value);
  pickler.stop();

  const std::string partial = path + '.' + std::to_string(std::random_device()()) + ".partial";
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  TORCH_CHECK(file.is_open(), "schedulefree: cannot open ", partial, " for writing");
  {
    caffe2::serialize::PyTorchStreamWriter writer([&](const void* begin, std::size_t size) {
      file.write(static_cast<const char*>(begin), static_cast<std::streamsize>(size));
      return size;  // what went wrong is seen below, where it can be said
    });
    writer.writeRecord("data.pkl", data.data(), data.size());
    const std::string byteorder = "little";
    writer.writeRecord("byteorder", byteorder.data(), byteorder.size());
    std::size_t key = 0;
    for (const at::Tensor& tensor : pickler.tensorData()) {
      const c10::Storage& storage = tensor.storage();
      writer.writeRecord("data/" + std::to_string(key++), storage.data(), storage.nbytes());
    }
    writer.writeEndOfFile();
  }
  file.close();
  const std::size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const bool written =
      !file.fail() && flush_to_disk(partial) && std::rename(partial.c_str(), path.c_str()) == 0;
  if (!written) std::remove(partial.c_str());
  TORCH_CHECK(written, "schedulefree: writing ", path, " failed");
  flush_to_disk(folder);  // the new name; file systems that cannot do so have it anyway
}

// The CRC-32 of zip files, eight bytes at a time.
inline std::uint32_t crc32(const void* data, std::size_t size) {
  static const auto tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> all{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
      all[0][i] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k)
      for (std::size_t i = 0; i < 256; ++i) all[k][i] = all[k - 1][i] >> 8 ^ all[0][all[k - 1][i] & 255];
    return all;
  }();
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  std::uint32_t crc = ~0u;
  for (; size >= 8; size -= 8, bytes += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, bytes, 8);
    eight ^= crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= tables[7 - k][eight >> (8 * k) & 255];
  }
  for (; size > 0; --size, ++bytes) crc = crc >> 8 ^ tables[0][(crc ^ *bytes) & 255];
  return ~crc;
}

struct Record {
  at::DataPtr data;
  std::size_t size = 0;
};

// All entries of a zip file as torch.save writes it, each checked against its checksum. torch's own reader
// checks none, and inflates what a few bytes ask for. Here no entry is compressed, so that together they are
// no larger than the file. Throws what is wrong as a std::runtime_error.
class ArchiveReader {
 public:
  static std::unordered_map<std::string, Record> read(const std::string& path) {
    struct stat status;
    require(::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode), "there is no such file");
    return ArchiveReader(path, static_cast<std::uint64_t>(status.st_size)).records();
  }

 private:
  ArchiveReader(const std::string& path, std::uint64_t size) : file_(path, std::ios::binary), size_(size) {
    require(file_.is_open(), "it cannot be opened");
  }

  static void require(bool ok, const std::string& problem) {
    if (!ok) throw std::runtime_error(problem);
  }

  template <class T>
  static std::uint64_t number(const std::string& bytes, std::size_t at) {
    require(at + sizeof(T) <= bytes.size(), "its directory is damaged");
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    return value;
  }

  void read(std::uint64_t at, void* to, std::uint64_t n) {
    require(at <= size_ && n <= size_ - at, "it ends too early");
    file_.seekg(static_cast<std::streamoff>(at));
    file_.read(static_cast<char*>(to), static_cast<std::streamsize>(n));
    require(file_.good(), "it cannot be read to its end");
  }

  std::string read(std::uint64_t at, std::uint64_t n) {
    require(n <= size_, "it ends too early");
    std::string bytes(n, '\0');
    read(at, bytes.data(), n);
    return bytes;
  }

  // The central directory: behind the entries, found from the end of the file.
  std::string directory() {
    const std::uint64_t tail_size = std::min<std::uint64_t>(size_, 22 + 0xFFFF), tail_at = size_ - tail_size;
    const std::string tail = read(tail_at, tail_size);
    const std::size_t end = tail.rfind("PK\5\6");
    require(end != std::string::npos && end + 22 + number<std::uint16_t>(tail, end + 20) <= tail.size(),
            "it is no zip file, or its end is missing");
    std::uint64_t size = number<std::uint32_t>(tail, end + 12), at = number<std::uint32_t>(tail, end + 16);
    if (end >= 20 && tail.compare(end - 20, 4, "PK\6\7") == 0) {
      const std::string large = read(number<std::uint64_t>(tail, end - 12), 56);
      size = number<std::uint64_t>(large, 40), at = number<std::uint64_t>(large, 48);
    }
    return read(at, size);
  }

  std::unordered_map<std::string, Record> records() {
    std::unordered_map<std::string, Record> records;
    const std::string entries = directory();
    std::uint64_t total = 0;
    for (std::size_t at = 0; at < entries.size();) {
      const auto name_size = number<std::uint16_t>(entries, at + 28),
                 extra_size = number<std::uint16_t>(entries, at + 30);
      const std::size_t name_at = at + 46, extra = name_at + name_size, end = extra + extra_size;
      require(entries.compare(at, 4, "PK\1\2") == 0 && end <= entries.size(), "its directory is damaged");
      const std::string full_name = entries.substr(name_at, name_size);
      std::uint64_t stored = number<std::uint32_t>(entries, at + 20),
                    size = number<std::uint32_t>(entries, at + 24),
                    begin = number<std::uint32_t>(entries, at + 42);
      for (std::size_t field = extra; field + 4 <= end;
           field += 4 + number<std::uint16_t>(entries, field + 2))
        if (number<std::uint16_t>(entries, field) == 1) {  // what does not fit into 32 bits, in this order
          std::size_t next = field + 4;
          for (std::uint64_t* const value : {&size, &stored, &begin})
            if (*value == 0xFFFFFFFFu) *value = number<std::uint64_t>(entries, next), next += 8;
        }
      const auto flags = number<std::uint16_t>(entries, at + 8),
                 method = number<std::uint16_t>(entries, at + 10);
      require(method == 0 && (flags & 1) == 0 && stored == size,
              "its entry " + full_name + " is compressed or encrypted, which torch.save never does");
      total += size;
      require(size <= size_ && total <= size_, "its entries are larger than the file");

      const std::string local = read(begin, 30);
      require(local.compare(0, 4, "PK\3\4") == 0, "its directory is damaged");
      Record record{at::getCPUAllocator()->allocate(size), size};
      read(begin + 30 + number<std::uint16_t>(local, 26) + number<std::uint16_t>(local, 28),
           record.data.get(), size);
      require(crc32(record.data.get(), size) == number<std::uint32_t>(entries, at + 16),
              "its entry " + full_name +
                  " is damaged: it does not have the checksum that was saved with it (or none was, by "
                  "torch.serialization.set_crc32_options(False))");
      const std::string name = full_name.substr(full_name.find('/') + 1);  // behind the archive's own
      require(records.emplace(name, std::move(record)).second, "it holds " + name + " twice");
      at = end + number<std::uint16_t>(entries, at + 32);
    }
    return records;
  }

  std::ifstream file_;
  const std::uint64_t size_;
};

// Reads what torch.load(weights_only=True) accepts: nothing that is read can run anything.
class PickleReader {
 public:
  // Tensors come to the CPU. Throws c10::Error for a file of another kind, a damaged one, and for values
  // other than those of write_pickle().
  static c10::IValue read(const std::string& path) {
    std::unordered_map<std::string, Record> records;
    try {
      records = ArchiveReader::read(path);
    } catch (const std::runtime_error& error) {
      TORCH_CHECK(false, "schedulefree: ", path,
                  " cannot be read as a file of torch.save (in its zip format, which is the default): ",
                  error.what());
    }
    return PickleReader(path, std::move(records)).run();
  }

 private:
  struct Node;

  // A value. What has parts, and what stands for a Python object until it is put to use, has a node.
  struct Item {
    c10::IValue value;
    std::shared_ptr<Node> node;
  };

  struct Node {
    std::size_t values = 1;             // in it, each counted wherever it stands
    int depth = 0;                      // of what it has in it
    bool whole = false;                 // part of something, and so complete
    bool plain = true;                  // neither a Python object nor with one in it
    std::vector<Item> items;            // of a tuple
    std::vector<std::uint64_t> hashes;  // of a dict's keys
    std::string name;                   // of torch's own function or class
    c10::Storage storage;
    at::ScalarType dtype = at::kFloat;
  };

  // Printing or saving takes time for every value wherever it stands, so sharing may not make many of few.
  static constexpr std::size_t kValuesPerByte = 64;
  static constexpr int kDepth = 100;

  PickleReader(const std::string& path, std::unordered_map<std::string, Record> records)
      : path_(path), records_(std::move(records)) {
    const auto pickle = records_.find("data.pkl"), order = records_.find("byteorder"),
               version = records_.find("version");
    require(pickle != records_.end(), "it has no data.pkl");
    data_ = std::move(pickle->second);
    const auto text = [](const Record& record) {
      return std::string(static_cast<const char*>(record.data.get()), record.size);
    };
    require(order == records_.end() || text(order->second) == "little",
            "it was written on a machine with another order of bytes");
    const std::uint64_t number = version == records_.end()
                                     ? caffe2::serialize::kMinSupportedFileFormatVersion
                                     : std::strtoull(text(version->second).c_str(), nullptr, 10);
    require(number >= caffe2::serialize::kMinSupportedFileFormatVersion &&
                number <= caffe2::serialize::kMaxSupportedFileFormatVersion,
            "it has a version that is not known");
  }

  void require(bool ok, const char* problem) const {
    TORCH_CHECK(ok, "schedulefree: ", path_, " cannot be read: ", problem);
  }
  void require(bool ok) const { require(ok, "its pickle is damaged"); }

  // ---- the bytes of the pickle ----------------------------------------------------------------------

  const char* take(std::size_t n) {
    require(n <= data_.size - at_, "its pickle ends too early");
    const char* const begin = static_cast<const char*>(data_.data.get()) + at_;
    at_ += n;
    return begin;
  }

  template <class T>
  T take() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }

  std::string take_line() {
    std::string line;
    for (char c = take<char>(); c != '\n'; c = take<char>()) line.push_back(c);
    return line;
  }

  std::string take_text() {
    const std::size_t size = take<std::uint32_t>();
    return std::string(take(size), size);
  }

  // Little-endian two's complement of any length.
  std::int64_t take_long() {
    const std::size_t n = take<std::uint8_t>();
    require(n <= sizeof(std::int64_t), "an integer has more than 64 bits");
    const char* const bytes = take(n);
    std::int64_t value = n > 0 && (bytes[n - 1] & 0x80) ? -1 : 0;
    std::memcpy(&value, bytes, n);
    return value;
  }

  double take_big_endian_double() {
    std::uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) bits = bits << 8 | take<std::uint8_t>();
    double value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // ---- the stack ------------------------------------------------------------------------------------

  void push(c10::IValue value) { stack_.push_back({std::move(value), nullptr}); }
  void push_container(c10::IValue value) { stack_.push_back({std::move(value), std::make_shared<Node>()}); }

  Item pop() {
    require(!stack_.empty() && (marks_.empty() || marks_.back() < stack_.size()));
    Item item = std::move(stack_.back());
    stack_.pop_back();
    return item;
  }

  const Item& top() const {
    require(!stack_.empty());
    return stack_.back();
  }

  std::vector<Item> pop_to_mark() {
    require(!marks_.empty());
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<Item> items(std::make_move_iterator(begin), std::make_move_iterator(stack_.end()));
    stack_.erase(begin, stack_.end());
    marks_.pop_back();
    return items;
  }

  std::vector<Item> pop_many(std::size_t n) {
    std::vector<Item> items(n);
    while (n > 0) items[--n] = pop();
    return items;
  }

  // Counts what becomes part of a container. A list or dict that is part of another takes nothing more, as no
  // pickler of plain values asks for: so none contains itself, and every count is final.
  void join(Node& into, const std::vector<Item>& items) const {
    for (const Item& item : items) {
      into.values += item.node ? item.node->values : 1;
      require(into.values <= kValuesPerByte * data_.size, "its values are shared too often");
      if (!item.node) continue;
      into.depth = std::max(into.depth, item.node->depth + 1);
      require(into.depth < kDepth, "its values are nested too deeply");
      into.plain = into.plain && item.node->plain;
      item.node->whole = true;
    }
    require(!into.whole,
            "its values are nested too deeply: a list or dict is part of itself, or changed where it is part "
            "of another");
  }

  void push_tuple(std::vector<Item> items) {
    auto node = std::make_shared<Node>();
    join(*node, items);
    std::vector<c10::IValue> values;
    for (const Item& item : items) values.push_back(item.value);
    node->items = std::move(items);
    stack_.push_back({c10::ivalue::Tuple::create(std::move(values)), std::move(node)});
  }

  void require_plain(const Item& item) const {
    require(!item.node || item.node->plain, "it holds a Python object, where a plain value was expected");
  }

  // c10's dicts double their memory until every key is near the slot that its hash asks for, to which a few
  // chosen keys never come. Those that are spread over 64 slots for each need no more.
  void require_spread(std::vector<std::uint64_t> slots) const {
    unsigned bits = 6;
    while ((slots.size() << 6) > (std::size_t{1} << bits)) ++bits;
    for (std::uint64_t& slot : slots) slot = (slot * 11400714819323198485u) >> (64 - bits);
    std::sort(slots.begin(), slots.end());
    std::uint64_t next = 0;
    for (const std::uint64_t slot : slots) {
      next = std::max(next, slot);
      require(next - slot < bits, "a dict has keys whose hashes collide");
      ++next;
    }
  }

  void set_items(const std::vector<Item>& items) {
    require(top().value.isGenericDict() && items.size() % 2 == 0);
    join(*top().node, items);
    require_plain(top());
    auto dict = top().value.toGenericDict();
    for (std::size_t i = 0; i < items.size(); i += 2) {
      const c10::IValue& key = items[i].value;
      require(key.isString() || key.isInt(), "a dict has keys other than strings and integers");
      top().node->hashes.push_back(c10::detail::DictKeyHash()(key));
    }
    require_spread(top().node->hashes);
    for (std::size_t i = 0; i < items.size(); i += 2)
      dict.insert_or_assign(items[i].value, items[i + 1].value);
  }

  void append(const std::vector<Item>& items) {
    require(top().value.isList());
    join(*top().node, items);
    require_plain(top());
    auto list = top().value.toList();
    for (const Item& item : items) list.push_back(item.value);
  }

  void push_remembered(std::uint32_t id) {
    const auto it = memo_.find(id);
    require(it != memo_.end());
    stack_.push_back(it->second);
  }

  // ---- names and tensors ----------------------------------------------------------------------------

  const std::vector<Item>& elements(const Item& tuple, std::size_t at_least) const {
    require(tuple.value.isTuple() && tuple.node->items.size() >= at_least);
    return tuple.node->items;
  }

  const std::string& name_of(const Item& item) const {
    require(item.node && !item.node->name.empty());
    return item.node->name;
  }

  std::vector<std::int64_t> integers(const Item& tuple) const {
    std::vector<std::int64_t> values;
    for (const Item& item : elements(tuple, 0)) {
      const bool fits = item.value.isInt() && item.value.toInt() >= 0;
      require(fits, "a tensor has sizes or strides that are no integers >= 0");
      values.push_back(item.value.toInt());
    }
    return values;
  }

  void push_name() {
    const std::string module = take_line();
    push_container({});
    top().node->name = module + " " + take_line();
    top().node->plain = false;
  }

  // ('storage', class, key, location, number of elements), where tensors share a storage by its key
  void push_storage(const Item& id) {
    const auto& parts = elements(id, 5);
    require(parts[0].value.isString() && parts[0].value.toStringRef() == "storage" &&
            parts[2].value.isString());
    const std::string key = parts[2].value.toStringRef();
    Item& item = storages_[key];
    if (!item.node) {
      const std::string& name = name_of(parts[1]);
      const auto* const known = std::find_if(std::begin(kStorages), std::end(kStorages),
                                             [&](const auto& pair) { return name == pair.first; });
      TORCH_CHECK(known != std::end(kStorages), "schedulefree: ", path_,
                  " cannot be read: it holds tensors of ", name);
      const auto record = records_.find("data/" + key);
      require(record != records_.end(), "it lacks the contents of a tensor");
      item.node = std::make_shared<Node>();
      item.node->plain = false;
      item.node->dtype = known->second;
      item.node->storage =
          c10::Storage(c10::Storage::use_byte_size_t(), record->second.size, std::move(record->second.data));
    }
    stack_.push_back(item);
  }

  // (storage, offset, sizes, strides, requires_grad, hooks): torch/_utils.py
  at::Tensor tensor(const std::vector<Item>& args) const {
    require(args.size() >= 4 && args[0].node && args[0].node->storage && args[1].value.isInt() &&
            args[1].value.toInt() >= 0);
    const c10::Storage& storage = args[0].node->storage;
    const at::TensorOptions options(args[0].node->dtype);
    const auto sizes = integers(args[2]), strides = integers(args[3]);
    require(sizes.size() == strides.size());
    const std::int64_t offset = args[1].value.toInt();
    // Either throws where its result overflows: a view may repeat elements without end.
    const std::size_t elements = at::detail::computeStorageNbytesContiguous(sizes, 1);
    const std::size_t needed =
        at::detail::computeStorageNbytes(sizes, strides, options.dtype().itemsize(), offset);
    require(needed <= storage.nbytes(), "a tensor reaches beyond its storage");
    return at::empty({0}, options).set_(storage, elements == 0 ? 0 : offset, sizes, strides);
  }

  void call(const Item& function, const Item& tuple) {
    const std::string& name = name_of(function);
    const std::vector<Item>& args = elements(tuple, 0);
    if (name == "collections OrderedDict" && args.empty())
      return push_container(c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get()));
    if (name == "torch._utils _rebuild_tensor_v2") return push(tensor(args));
    const bool is_parameter =
        name == "torch._utils _rebuild_parameter" && !args.empty() && args[0].value.isTensor();
    if (is_parameter || (name == "torch Size" && args.size() == 1)) return stack_.push_back(args[0]);
    TORCH_CHECK(false, "schedulefree: ", path_, " cannot be read: it holds ", name,
                ", where tensors, numbers, strings, tuples, lists and dicts were expected");
  }

  // ---- the machine: opcodes of pickle protocol 2, as in Python's pickletools ------------------------

  using Opcode = void (*)(PickleReader&);

  static const std::unordered_map<std::uint8_t, Opcode>& opcodes() {
    using R = PickleReader&;
    static const std::unordered_map<std::uint8_t, Opcode> all = {
        {0x80, [](R r) { r.require(r.take<std::uint8_t>() == 2, kProtocol); }},
        {'(', [](R r) { r.marks_.push_back(r.stack_.size()); }},
        {'N', [](R r) { r.push({}); }},
        {0x88, [](R r) { r.push(true); }},
        {0x89, [](R r) { r.push(false); }},
        {'J', [](R r) { r.push(std::int64_t{r.take<std::int32_t>()}); }},
        {'K', [](R r) { r.push(std::int64_t{r.take<std::uint8_t>()}); }},
        {'M', [](R r) { r.push(std::int64_t{r.take<std::uint16_t>()}); }},
        {0x8a, [](R r) { r.push(r.take_long()); }},
        {'G', [](R r) { r.push(r.take_big_endian_double()); }},
        {'X', [](R r) { r.push(r.take_text()); }},
        {'}',
         [](R r) { r.push_container(c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get())); }},
        {'s', [](R r) { r.set_items(r.pop_many(2)); }},
        {'u', [](R r) { r.set_items(r.pop_to_mark()); }},
        {']', [](R r) { r.push_container(c10::impl::GenericList(c10::AnyType::get())); }},
        {'a', [](R r) { r.append(r.pop_many(1)); }},
        {'e', [](R r) { r.append(r.pop_to_mark()); }},
        {')', [](R r) { r.push_tuple({}); }},
        {0x85, [](R r) { r.push_tuple(r.pop_many(1)); }},
        {0x86, [](R r) { r.push_tuple(r.pop_many(2)); }},
        {0x87, [](R r) { r.push_tuple(r.pop_many(3)); }},
        {'t', [](R r) { r.push_tuple(r.pop_to_mark()); }},
        {'q', [](R r) { r.memo_[r.take<std::uint8_t>()] = r.top(); }},
        {'r', [](R r) { r.memo_[r.take<std::uint32_t>()] = r.top(); }},
        {'h', [](R r) { r.push_remembered(r.take<std::uint8_t>()); }},
        {'j', [](R r) { r.push_remembered(r.take<std::uint32_t>()); }},
        {'c', [](R r) { r.push_name(); }},
        {'Q', [](R r) { r.push_storage(r.pop()); }},
        {'R',
         [](R r) {
           const auto both = r.pop_many(2);
           r.call(both[0], both[1]);
         }},
        // an attribute of an OrderedDict, such as the versions of modules
        {'b',
         [](R r) {
           r.pop();
           r.require(r.top().value.isGenericDict());
         }},
    };
    return all;
  }

  c10::IValue run() {
    for (auto code = take<std::uint8_t>(); code != '.'; code = take<std::uint8_t>()) {
      const auto opcode = opcodes().find(code);
      TORCH_CHECK(opcode != opcodes().end(), "schedulefree: ", path_, " cannot be read: opcode ",
                  static_cast<int>(code), " does not belong to what torch.save writes by default");
      opcode->second(*this);
    }
    const Item result = pop();
    require_plain(result);
    return result.value;
  }

  static constexpr const char* kProtocol = "it was pickled by another protocol than 2, that of torch.save";

  const std::string& path_;
  std::unordered_map<std::string, Record> records_;
  Record data_;
  std::size_t at_ = 0;
  std::vector<Item> stack_;
  std::vector<std::size_t> marks_;
  std::map<std::uint32_t, Item> memo_;
  std::unordered_map<std::string, Item> storages_;
};

}  // namespace schedulefree::detail
