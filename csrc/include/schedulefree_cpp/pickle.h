// Files of Python's torch.save, written and read without Python.
//
// torch's own torch::pickle_save marks every dict in a way that torch.load(weights_only=True) refuses, and
// torch::pickle_load cannot read the OrderedDict that Module.state_dict() returns.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <caffe2/serialize/inline_container.h>
#include <fcntl.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <torch/custom_class.h>

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <string_view>
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

// Reads what torch.load(weights_only=True) accepts: nothing that is read can run anything.
class PickleReader {
 public:
  // Tensors come to the CPU. Throws c10::Error for a file of another kind, a damaged one, and for values
  // other than those of write_pickle().
  static c10::IValue read(const std::string& path) {
    std::unique_ptr<caffe2::serialize::PyTorchStreamReader> archive;
    try {
      archive = std::make_unique<caffe2::serialize::PyTorchStreamReader>(path);
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, "schedulefree: ", path,
                  " cannot be read as a file of torch.save (in its zip format, which is the default): ",
                  error.what_without_backtrace());
    }
    PickleReader reader(path, *archive);
    c10::IValue value = reader.run();
    reader.require_plain(value, 0);
    return value;
  }

 private:
  // What a tensor's storage and torch's own names are until they have been put to use.
  struct TypedStorage : torch::CustomClassHolder {
    TypedStorage(c10::Storage storage, at::ScalarType dtype) : storage(std::move(storage)), dtype(dtype) {}
    c10::Storage storage;
    at::ScalarType dtype;
  };
  struct Global : torch::CustomClassHolder {
    explicit Global(std::string name) : name(std::move(name)) {}
    std::string name;
  };

  PickleReader(const std::string& path, caffe2::serialize::PyTorchStreamReader& archive)
      : path_(path), archive_(archive) {
    require(archive_.hasRecord("data.pkl"), "it has no data.pkl");
    std::tie(data_, size_) = archive_.getRecord("data.pkl");
    if (archive_.hasRecord("byteorder")) {
      const auto [order, length] = archive_.getRecord("byteorder");
      require(std::string_view(static_cast<const char*>(order.get()), length) == "little",
              "it was written on a machine with another order of bytes");
    }
  }

  void require(bool ok, const char* problem) const {
    TORCH_CHECK(ok, "schedulefree: ", path_, " cannot be read: ", problem);
  }

  // No name that was never put to use, and nothing that contains itself.
  void require_plain(const c10::IValue& value, int depth) const {
    require(!value.isCapsule(), "it holds a Python object, where a plain value was expected");
    require(depth < 100, "its values are nested too deeply");
    if (value.isGenericDict())
      for (const auto& entry : value.toGenericDict()) require_plain(entry.value(), depth + 1);
    if (value.isList())
      for (const c10::IValue& item : value.toListRef()) require_plain(item, depth + 1);
    if (value.isTuple())
      for (const c10::IValue& item : value.toTupleRef().elements()) require_plain(item, depth + 1);
  }

  // ---- the bytes of the pickle ----------------------------------------------------------------------

  const char* take(std::size_t n) {
    require(n <= size_ - at_, "its pickle ends too early");
    const char* const begin = static_cast<const char*>(data_.get()) + at_;
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

  void push(c10::IValue value) { stack_.push_back(std::move(value)); }

  c10::IValue pop() {
    require(!stack_.empty() && (marks_.empty() || marks_.back() < stack_.size()), "its pickle is damaged");
    c10::IValue value = std::move(stack_.back());
    stack_.pop_back();
    return value;
  }

  const c10::IValue& top() const {
    require(!stack_.empty(), "its pickle is damaged");
    return stack_.back();
  }

  std::vector<c10::IValue> pop_to_mark() {
    require(!marks_.empty(), "its pickle is damaged");
    const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<c10::IValue> values(std::make_move_iterator(begin), std::make_move_iterator(stack_.end()));
    stack_.erase(begin, stack_.end());
    marks_.pop_back();
    return values;
  }

  std::vector<c10::IValue> pop_many(std::size_t n) {
    std::vector<c10::IValue> values(n);
    while (n > 0) values[--n] = pop();
    return values;
  }

  static void push_tuple(std::vector<c10::IValue>& stack, std::vector<c10::IValue> values) {
    stack.emplace_back(c10::ivalue::Tuple::create(std::move(values)));
  }

  void set_items(const std::vector<c10::IValue>& items) {
    require(top().isGenericDict() && items.size() % 2 == 0, "its pickle is damaged");
    auto dict = top().toGenericDict();
    for (std::size_t i = 0; i < items.size(); i += 2) {
      require(items[i].isString() || items[i].isInt(), "a dict has keys other than strings and integers");
      dict.insert_or_assign(items[i], items[i + 1]);
    }
  }

  void append(const std::vector<c10::IValue>& items) {
    require(top().isList(), "its pickle is damaged");
    auto list = top().toList();
    for (const c10::IValue& item : items) list.push_back(item);
  }

  const c10::IValue& remembered(std::uint32_t id) const {
    const auto it = memo_.find(id);
    require(it != memo_.end(), "its pickle is damaged");
    return it->second;
  }

  // ---- names and tensors ----------------------------------------------------------------------------

  template <class T>
  c10::intrusive_ptr<T> holder(const c10::IValue& value) const {
    require(value.isCapsule(), "its pickle is damaged");
    // c10::dynamic_intrusive_pointer_cast would leak an object of another type.
    const c10::intrusive_ptr<torch::CustomClassHolder> any = value.toCapsule();
    T* const held = dynamic_cast<T*>(any.get());
    require(held != nullptr, "its pickle is damaged");
    return c10::intrusive_ptr<T>::reclaim_copy(held);
  }

  std::vector<c10::IValue> elements(const c10::IValue& tuple, std::size_t at_least) const {
    require(tuple.isTuple() && tuple.toTupleRef().elements().size() >= at_least, "its pickle is damaged");
    const auto& all = tuple.toTupleRef().elements();
    return std::vector<c10::IValue>(all.begin(), all.end());
  }

  std::vector<std::int64_t> integers(const c10::IValue& tuple) const {
    std::vector<std::int64_t> values;
    for (const c10::IValue& value : elements(tuple, 0)) {
      require(value.isInt() && value.toInt() >= 0, "a tensor has sizes or strides that are no integers >= 0");
      values.push_back(value.toInt());
    }
    return values;
  }

  at::ScalarType dtype_of(const std::string& storage_class) const {
    for (const auto& [name, dtype] : kStorages)
      if (storage_class == name) return dtype;
    C10_THROW_ERROR(
        Error, c10::str("schedulefree: ", path_, " cannot be read: it holds tensors of ", storage_class));
  }

  // ('storage', class, key, location, number of elements), where tensors share a storage by its key
  c10::IValue storage(const c10::IValue& id) {
    const auto parts = elements(id, 5);
    require(parts[0].isString() && parts[0].toStringRef() == "storage" && parts[2].isString(),
            "its pickle is damaged");
    const std::string key = parts[2].toStringRef();
    auto found = storages_.find(key);
    if (found == storages_.end()) {
      const at::ScalarType dtype = dtype_of(holder<Global>(parts[1])->name);
      require(archive_.hasRecord("data/" + key), "it lacks the contents of a tensor");
      auto [data, size] = archive_.getRecord("data/" + key);
      c10::Storage bytes(c10::Storage::use_byte_size_t(), size, std::move(data));
      found = storages_.emplace(key, c10::make_intrusive<TypedStorage>(std::move(bytes), dtype)).first;
    }
    return c10::IValue::make_capsule(found->second);
  }

  // (storage, offset, sizes, strides, requires_grad, hooks): torch/_utils.py
  at::Tensor tensor(const std::vector<c10::IValue>& args) const {
    require(args.size() >= 4 && args[1].isInt() && args[1].toInt() >= 0, "its pickle is damaged");
    const auto typed = holder<TypedStorage>(args[0]);
    const auto sizes = integers(args[2]), strides = integers(args[3]);
    require(sizes.size() == strides.size(), "its pickle is damaged");
    const bool empty = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    const auto available =
        static_cast<std::int64_t>(typed->storage.nbytes() / c10::elementSize(typed->dtype));
    std::int64_t last = args[1].toInt();  // the last element that the tensor reaches
    bool fits = empty || last < available;
    for (std::size_t d = 0; d < sizes.size() && fits && !empty; ++d) {
      const std::int64_t steps = sizes[d] - 1;
      fits = steps == 0 || strides[d] <= available / steps;
      if (fits) last += steps * strides[d];
      fits = fits && last < available;
    }
    require(fits, "a tensor reaches beyond its storage");
    if (empty) return at::empty(sizes, at::TensorOptions(typed->dtype));
    return at::empty({0}, at::TensorOptions(typed->dtype))
        .set_(typed->storage, args[1].toInt(), sizes, strides);
  }

  c10::IValue call(const std::string& name, const c10::IValue& tuple) const {
    const auto args = elements(tuple, 0);
    if (name == "collections OrderedDict" && args.empty())
      return c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get());
    if (name == "torch._utils _rebuild_tensor_v2") return tensor(args);
    if (name == "torch._utils _rebuild_parameter" && !args.empty() && args[0].isTensor()) return args[0];
    if (name == "torch Size" && args.size() == 1) return args[0];
    C10_THROW_ERROR(Error,
                    c10::str("schedulefree: ", path_, " cannot be read: it holds ", name,
                             ", where tensors, numbers, strings, tuples, lists and dicts were expected"));
  }

  // ---- the machine: opcodes of pickle protocol 2, as in Python's pickletools ------------------------

  c10::IValue run() {
    for (;;) {
      const auto opcode = take<std::uint8_t>();
      switch (opcode) {
        case 0x80:
          require(take<std::uint8_t>() == 2, "it was pickled by another protocol than 2, that of torch.save");
          break;
        case '.':
          return pop();  // STOP
        case '(':
          marks_.push_back(stack_.size());
          break;
        case 'N':
          push({});
          break;
        case 0x88:
          push(true);
          break;
        case 0x89:
          push(false);
          break;
        case 'J':
          push(static_cast<std::int64_t>(take<std::int32_t>()));
          break;
        case 'K':
          push(static_cast<std::int64_t>(take<std::uint8_t>()));
          break;
        case 'M':
          push(static_cast<std::int64_t>(take<std::uint16_t>()));
          break;
        case 0x8a:
          push(take_long());
          break;
        case 'G':
          push(take_big_endian_double());
          break;
        case 'X': {
          const std::size_t size = take<std::uint32_t>();
          push(std::string(take(size), size));
          break;
        }
        case '}':
          push(c10::impl::GenericDict(c10::AnyType::get(), c10::AnyType::get()));
          break;
        case 's':
          set_items(pop_many(2));
          break;
        case 'u':
          set_items(pop_to_mark());
          break;
        case ']':
          push(c10::impl::GenericList(c10::AnyType::get()));
          break;
        case 'a':
          append(pop_many(1));
          break;
        case 'e':
          append(pop_to_mark());
          break;
        case ')':
          push_tuple(stack_, {});
          break;
        case 0x85:
          push_tuple(stack_, pop_many(1));
          break;
        case 0x86:
          push_tuple(stack_, pop_many(2));
          break;
        case 0x87:
          push_tuple(stack_, pop_many(3));
          break;
        case 't':
          push_tuple(stack_, pop_to_mark());
          break;
        case 'q':
          memo_[take<std::uint8_t>()] = top();
          break;
        case 'r':
          memo_[take<std::uint32_t>()] = top();
          break;
        case 'h':
          push(remembered(take<std::uint8_t>()));
          break;
        case 'j':
          push(remembered(take<std::uint32_t>()));
          break;
        case 'c': {
          const std::string module = take_line();
          push(c10::IValue::make_capsule(c10::make_intrusive<Global>(module + " " + take_line())));
          break;
        }
        case 'Q':
          push(storage(pop()));
          break;
        case 'R': {
          const c10::IValue args = pop();
          push(call(holder<Global>(pop())->name, args));
          break;
        }
        case 'b':  // an attribute of an OrderedDict, such as the versions of modules
          pop();
          require(top().isGenericDict(), "its pickle is damaged");
          break;
        default:
          C10_THROW_ERROR(
              Error, c10::str("schedulefree: ", path_, " cannot be read: opcode ", static_cast<int>(opcode),
                              " does not belong to what torch.save writes by default"));
      }
    }
  }

  const std::string& path_;
  caffe2::serialize::PyTorchStreamReader& archive_;
  at::DataPtr data_;
  std::size_t size_ = 0, at_ = 0;
  std::vector<c10::IValue> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint32_t, c10::IValue> memo_;
  std::unordered_map<std::string, c10::intrusive_ptr<TypedStorage>> storages_;
};

}  // namespace schedulefree::detail
