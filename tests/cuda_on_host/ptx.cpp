// Runs PTX on the host: what nvcc and Triton have compiled, inline assembly included, thread by thread in the blocks of
// emulation.h. What a compiler makes of the sources is tested so, up to what ptxas makes of it: which loads it joins,
// which memory it believes not to overlap, what it holds a layout to be.
//
// Found at run time besides what emulation.h finds: an access that is not aligned as its width, one outside of shared
// memory; built with AddressSanitizer, one outside of the tensors. An instruction that is not known here is an error.
//
// Not modelled: what ptxas joins to one multiply-add, the error of approximate instructions, the policies of caches.
#include <dlfcn.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cctype>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <tuple>
#include <type_traits>

#include "emulation.h"

namespace emulation {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

[[noreturn]] void fail_here(const std::string& what) {
  fail(*current_block(), *current_thread(), what);
}

template <typename T>
T as(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <typename T>
uint64_t bits_of(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <typename T>
constexpr bool kFloating = !std::is_integral_v<T>;
// In which T is worked on.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What the lanes of a warp read or write by one instruction, where TK_EMULATION_TRAFFIC names a file to which each
// launch adds a line of every kind: kernel, kind, requests, bytes that were asked for, pieces that they take. A piece
// of global memory is a sector of 32 bytes; one of shared memory all that its 32 banks of 4 bytes can give at once, to
// 32, 16 or 8 lanes.
class Traffic {
 public:
  enum Kind { kGlobalLoads, kGlobalStores, kSharedLoads, kSharedStores, kKinds };

  explicit Traffic(const char* path) : path_(path) {}

  // The times-th access that this thread makes by the instruction at this place.
  void add(Kind kind, size_t place, unsigned times, uint64_t at, size_t bytes) {
    const Thread& thread = *current_thread();
    const Key key{kind, current_block()->index.x, current_block()->index.y, thread.index / kWarpSize, place, times};
    requests_[key].push_back({at, bytes});
  }

  // That a thread has executed.
  void add_instructions(size_t n) { instructions_ += n; }

  void write(const std::string& kernel) {
    std::ofstream file(path_, std::ios::app);
    file << kernel << "\tinstructions\t" << instructions_ << "\t0\t0\n";
    instructions_ = 0;
    const char* const names[] = {"global loads", "global stores", "shared loads", "shared stores"};
    for (int kind = 0; kind < kKinds; ++kind) {
      size_t requests = 0, bytes = 0, pieces = 0;
      for (const auto& [key, lanes] : requests_) {
        if (std::get<0>(key) != kind) continue;
        ++requests;
        for (const Lane& lane : lanes) bytes += lane.bytes;
        if (kind == kSharedLoads || kind == kSharedStores) {
          pieces += passes(lanes);
          continue;
        }
        std::set<uint64_t> touched;
        for (const Lane& lane : lanes) {
          for (uint64_t s = lane.at / 32; s <= (lane.at + lane.bytes - 1) / 32; ++s) touched.insert(s);
        }
        pieces += touched.size();
      }
      if (requests == 0) continue;
      file << kernel << '\t' << names[kind] << '\t' << requests << '\t' << bytes << '\t' << pieces << '\n';
    }
    requests_.clear();
  }

 private:
  using Key = std::tuple<int, unsigned, unsigned, unsigned, size_t, unsigned>;
  struct Lane {
    uint64_t at;
    size_t bytes;
  };

  // Each takes one word of every bank; lanes with 8 bytes are served by halves of a warp, those with 16 by quarters.
  static size_t passes(const std::vector<Lane>& lanes) {
    const size_t together = 32 * 4 / std::max<size_t>(4, lanes[0].bytes);
    size_t all = 0;
    for (size_t first = 0; first < lanes.size(); first += together) {
      std::map<uint64_t, std::set<uint64_t>> words;  // of each bank
      size_t most = 1;
      for (size_t i = first; i < std::min(first + together, lanes.size()); ++i) {
        for (uint64_t w = lanes[i].at / 4; w <= (lanes[i].at + lanes[i].bytes - 1) / 4; ++w) {
          words[w % 32].insert(w);
          most = std::max(most, words[w % 32].size());
        }
      }
      all += most;
    }
    return all;
  }

  std::string path_;
  size_t instructions_ = 0;
  std::map<Key, std::vector<Lane>> requests_;
};

Traffic* traffic() {
  static const char* const path = std::getenv("TK_EMULATION_TRAFFIC");
  static const std::unique_ptr<Traffic> recorded(path == nullptr ? nullptr : new Traffic(path));
  return recorded.get();
}

// What one thread has: registers are as wide as the widest, their types are those of the instructions.
struct Frame {
  std::vector<uint64_t> registers;
  size_t next = 0;
  mutable std::map<size_t, unsigned> times;  // by step: accesses so far, where they are recorded
};

struct Source {
  int index;  // of a register; -1: a constant
  uint64_t constant;
  uint64_t operator()(const Frame& f) const { return index < 0 ? constant : f.registers[index]; }
};

using Step = std::function<void(Frame&)>;

enum class Space { kGlobal, kShared, kParameter };

// Added to what lies in shared memory where its address is one of any memory.
constexpr uint64_t kSharedWindow = uint64_t(1) << 62;

struct Address {
  Space space;
  Source base;
  int64_t offset;
  bool stores = false;

  // Where `bytes` of it lie on the host, aligned to as many.
  unsigned char* operator()(const Frame& f, size_t bytes) const {
    uint64_t at = base(f) + offset;
    if (space == Space::kShared) at = static_cast<uint32_t>(at);
    if (at % bytes != 0) fail_here("an address that is not aligned to " + std::to_string(bytes) + " bytes");
    if (space == Space::kShared) {
      const Block& block = *current_block();
      if (at + bytes > block.shared_bytes) fail_here("an address outside of shared memory");
      at += reinterpret_cast<uint64_t>(block.shared.get());
      look_for_races(reinterpret_cast<const void*>(at), bytes, stores);
    }
    if (at < 4096) fail_here("a null address");
    if (traffic() != nullptr && space != Space::kParameter) {
      const int kind = (space == Space::kShared ? Traffic::kSharedLoads : Traffic::kGlobalLoads) + stores;
      traffic()->add(static_cast<Traffic::Kind>(kind), f.next, f.times[2 * f.next + stores]++, at, bytes);
    }
    return reinterpret_cast<unsigned char*>(at);
  }
};

template <typename T>
T load(const unsigned char* at) {
  return *reinterpret_cast<const T*>(at);
}
template <typename T>
void store(unsigned char* at, T x) {
  *reinterpret_cast<T*>(at) = x;
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}
std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\n");
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\n") + 1 - first);
}

// Calls f with a value of the type that PTX calls so.
template <typename F>
void of_type(const std::string& type, F f) {
  const auto is = [&](auto... names) { return ((type == names) || ...); };
  if (is("pred", "u8", "b8")) return f(uint8_t());
  if (is("u16", "b16")) return f(uint16_t());
  if (is("u32", "b32")) return f(uint32_t());
  if (is("u64", "b64")) return f(uint64_t());
  if (is("s8")) return f(int8_t());
  if (is("s16")) return f(int16_t());
  if (is("s32")) return f(int32_t());
  if (is("s64")) return f(int64_t());
  if (is("f16")) return f(Half());
  if (is("bf16")) return f(BFloat16());
  if (is("f32")) return f(float());
  if (is("f64")) return f(double());
  throw std::runtime_error("PTX on the host: the type " + type + " is not known");
}

template <typename F>
void of_integer(const std::string& type, F f) {
  of_type(type, [&](auto of) {
    if constexpr (kFloating<decltype(of)>) {
      throw std::runtime_error("PTX on the host: an integer type expected");
    } else {
      f(of);
    }
  });
}

template <typename T>
T flushed(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}

template <typename To, typename From>
To converted(From x, bool whole) {
  if constexpr (kFloating<From> && !kFloating<To>) {
    const double towards_zero = std::trunc(static_cast<double>(x));
    if (std::isnan(towards_zero)) return 0;
    if (towards_zero >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    if (towards_zero <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    return static_cast<To>(towards_zero);
  } else if constexpr (kFloating<From>) {
    const auto wide = static_cast<Wide<From>>(x);
    return static_cast<To>(static_cast<Wide<To>>(whole ? std::trunc(wide) : wide));
  } else if constexpr (kFloating<To>) {
    return static_cast<To>(static_cast<Wide<To>>(x));
  } else {
    return static_cast<To>(x);
  }
}

// What setp asks: which of less, equal and greater make it true, and whether a NaN does.
struct Comparison {
  bool less, equal, greater, unordered;

  template <typename T>
  bool operator()(T a, T b) const {
    return a < b ? less : a == b ? equal : a > b ? greater : unordered;
  }
};

Comparison comparison(const std::string& name) {
  const std::string plain = name == "lo" || name == "ls" ? "l" : name == "hi" || name == "hs" ? "g" : name;
  const bool nan = name.size() == 3 && name != "num";  // ltu, equ, ..., nan
  if (name == "num" || name == "nan") return {!nan, !nan, !nan, nan};
  if (plain.starts_with("eq")) return {false, true, false, nan};
  if (plain.starts_with("ne")) return {true, false, true, nan};
  const bool also_equal = name[1] == 'e' || name[1] == 's';
  if (plain[0] == 'l') return {true, also_equal, false, nan};
  if (plain[0] == 'g') return {false, also_equal, true, nan};
  throw std::runtime_error("PTX on the host: the comparison " + name + " is not known");
}

struct Instruction {
  std::string name;
  std::vector<std::string> words;  // of the name
  std::vector<std::string> operands;

  bool is(const char* word) const { return words[0] == word; }
  bool has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }
  const std::string& type() const { return words.back(); }
  const std::string& operand(size_t i) const { return operands.at(i); }
};

// What a thread finds in registers when it begins.
constexpr const char* kSpecial[] = {"%tid.x", "%laneid", "%ntid.x", "%nctaid.x", "%ctaid.x", "%ctaid.y"};

struct Parameter {
  std::string name;
  size_t bytes, offset;
};

}  // namespace

// A kernel of PTX: its statements, each as something that can be called.
class PtxKernel {
 public:
  // From ".entry" on; names_of_shared: those of memory that has as many bytes as the launch says.
  PtxKernel(const std::string& text, const std::vector<std::string>& names_of_shared) {
    const size_t opened = text.find('('), closed = text.find(')', opened), body = text.find('{', closed);
    size_t end = body;
    for (int depth = 0; end < text.size(); ++end) {
      depth += text[end] == '{' ? 1 : text[end] == '}' ? -1 : 0;
      if (depth == 0) break;
    }
    const size_t named = text.find(' ') + 1;  // .entry name
    name_ = trimmed(text.substr(named, opened - named));
    read_parameters(text.substr(opened + 1, closed - opened - 1));
    for (const std::string& name : names_of_shared) constants_[index_of(name)] = 0;
    read_body(text.substr(body + 1, end - body - 1));
    for (auto& [label, step] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) throw std::runtime_error("PTX on the host: no label " + label);
      step = found->second;
    }
  }

  const std::string& name() const { return name_; }
  size_t parameters() const { return parameters_.size(); }
  size_t parameter_bytes(size_t i) const { return parameters_[i].bytes; }

  // As the thread that calls.
  void run(void* const* arguments) const {
    std::vector<uint64_t> memory(
        parameters_.empty() ? 1 : parameters_.back().offset / 8 + parameters_.back().bytes / 8 + 2);
    auto* const base = reinterpret_cast<unsigned char*>(memory.data());
    Frame frame;
    frame.registers.assign(registers_.size(), 0xffffffffffffffffu);  // NaN, as shared memory
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const Parameter& p = parameters_[i];
      if (arguments[i] != nullptr) std::memcpy(base + p.offset, arguments[i], p.bytes);
      const auto found = registers_.find(p.name);
      if (found != registers_.end()) frame.registers[found->second] = reinterpret_cast<uint64_t>(base + p.offset);
    }
    for (const auto& [index, value] : constants_) frame.registers[index] = value;
    const Block& block = *current_block();
    const unsigned thread = current_thread()->index;
    const unsigned values[] = {thread, thread % kWarpSize, block.size.x, block.grid.x, block.index.x, block.index.y};
    for (size_t i = 0; i < std::size(kSpecial); ++i) {
      const auto found = registers_.find(kSpecial[i]);
      if (found != registers_.end()) frame.registers[found->second] = values[i];
    }
    size_t instructions = 0;
    while (frame.next < steps_.size()) {
      instructions += is_work_[frame.next];
      const Step& step = steps_[frame.next++];
      step(frame);
    }
    if (traffic() != nullptr) traffic()->add_instructions(instructions);
  }

 private:
  void read_parameters(const std::string& text) {
    size_t offset = 0;
    for (const std::string& declared : split(text, ',')) {
      std::istringstream words(declared);
      Parameter p{"", 0, 0};
      size_t alignment = 0, count = 1;
      for (std::string word; words >> word;) {
        if (word == ".align") {
          words >> alignment;
        } else if (word[0] == '.' && word.size() > 2 && std::isdigit(static_cast<unsigned char>(word[2]))) {
          p.bytes = std::stoul(word.substr(2)) / 8;
        } else if (word[0] != '.') {
          p.name = word.substr(0, word.find('['));
          if (p.name.size() < word.size()) count = std::stoul(word.substr(p.name.size() + 1));
        }
      }
      if (p.name.empty()) continue;
      alignment = std::max(count > 1 ? alignment : 0, p.bytes);
      p.bytes *= count;
      p.offset = (offset + alignment - 1) / alignment * alignment;
      offset = p.offset + p.bytes;
      parameters_.push_back(p);
    }
  }

  int index_of(const std::string& name) {
    return registers_.emplace(name, static_cast<int>(registers_.size())).first->second;
  }

  void read_body(const std::string& text) {
    std::string statements;
    for (std::string line : split(text, '\n')) {
      line = trimmed(line.substr(0, line.find("//")));
      if (line.rfind(".loc", 0) == 0 || line.rfind(".pragma", 0) == 0) continue;
      statements += line + "\n";
    }
    for (std::string statement : split(statements, ';')) {
      statement = trimmed(statement);
      for (;;) {  // what stands before an instruction
        if (!statement.empty() && (statement[0] == '{' || statement[0] == '}')) {
          statement = trimmed(statement.substr(1));
          continue;
        }
        const size_t colon = statement.find(':');
        const size_t space = statement.find_first_of(" \t\n[");
        if (colon == std::string::npos || colon > space || statement.compare(colon, 2, "::") == 0) break;
        labels_[statement.substr(0, colon)] = steps_.size();
        statement = trimmed(statement.substr(colon + 1));
      }
      if (statement.empty() || statement[0] == '.') continue;
      try {
        read(statement);
        is_work_.push_back(statement.find("mov.") == std::string::npos && !statement.starts_with("ld.param") &&
                           !statement.starts_with("cvta"));
        is_work_.resize(steps_.size());
      } catch (const std::exception& error) {
        throw std::runtime_error(std::string(error.what()) + ": " + statement);
      }
    }
  }

  // Adds what the instruction does, where its predicate holds.
  void emit(Step step) {
    if (predicate_.empty()) {
      steps_.push_back(std::move(step));
      return;
    }
    const bool negated = predicate_[0] == '!';
    const int index = index_of(predicate_.substr(negated));
    steps_.push_back([index, negated, step = std::move(step)](Frame& f) {
      if ((f.registers[index] != 0) != negated) step(f);
    });
  }

  static std::vector<std::string> operands_of(const std::string& text) {
    std::vector<std::string> operands;
    int depth = 0;
    std::string operand;
    for (const char c : text) {
      depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
      if (c == ',' && depth == 0) {
        operands.push_back(trimmed(operand));
        operand.clear();
      } else {
        operand += c;
      }
    }
    if (!trimmed(operand).empty()) operands.push_back(trimmed(operand));
    return operands;
  }

  Source source(const std::string& text) {
    const char first = text[0];
    if (std::isdigit(static_cast<unsigned char>(first)) || first == '-') {
      if (text.rfind("0f", 0) == 0 || text.rfind("0F", 0) == 0) {
        return {-1, std::stoull(text.substr(2), nullptr, 16)};
      }
      if (text.rfind("0d", 0) == 0 || text.rfind("0D", 0) == 0) {
        return {-1, std::stoull(text.substr(2), nullptr, 16)};
      }
      return {-1, first == '-' ? static_cast<uint64_t>(std::stoll(text, nullptr, 0)) : std::stoull(text, nullptr, 0)};
    }
    const bool special = first == '%' && text.find('.') != std::string::npos;
    if (special && std::find(std::begin(kSpecial), std::end(kSpecial), text) == std::end(kSpecial)) unknown();
    return {index_of(text), 0};
  }

  Address address(Space space, const std::string& text, bool stores = false) {
    const std::string inside = trimmed(text.substr(1, text.size() - 2));
    const size_t plus = inside.find('+');
    const int64_t offset = plus == std::string::npos ? 0 : std::stoll(trimmed(inside.substr(plus + 1)));
    return {space, source(trimmed(inside.substr(0, plus))), offset, stores};
  }

  // One register, or those of a vector.
  std::vector<Source> sources(const std::string& text) {
    std::vector<Source> all;
    if (text[0] != '{') return {source(text)};
    for (const std::string& part : split(text.substr(1, text.size() - 2), ',')) all.push_back(source(trimmed(part)));
    return all;
  }

  // The registers of "a|b", the second -1 where there is none.
  std::pair<int, int> one_or_two(const std::string& text) {
    const size_t bar = text.find('|');
    const int first = index_of(trimmed(text.substr(0, bar)));
    return {first, bar == std::string::npos ? -1 : index_of(trimmed(text.substr(bar + 1)))};
  }

  // The first operand becomes function(second), (second, third) and so on, all of one type; of both halves where the
  // type is a pair.
  template <typename F>
  void unary(const Instruction& i, F function, const std::string& type) {
    if (type.ends_with("x2")) {
      of_type(type.substr(0, type.size() - 2), [&, d = index_of(i.operand(0)), a = source(i.operand(1))](auto of) {
        using T = decltype(of);
        emit([=](Frame& f) {
          const auto half = [&](int k) { return bits_of(static_cast<T>(function(as<T>(a(f) >> (16 * k))))); };
          f.registers[d] = half(1) << 16 | half(0);
        });
      });
      return;
    }
    of_type(type, [&, d = index_of(i.operand(0)), a = source(i.operand(1))](auto of) {
      using T = decltype(of);
      emit([=](Frame& f) { f.registers[d] = bits_of(static_cast<T>(function(as<T>(a(f))))); });
    });
  }
  template <typename F>
  void binary(const Instruction& i, F function) {
    const int d = index_of(i.operand(0));
    const Source a = source(i.operand(1)), b = source(i.operand(2));
    if (i.type().ends_with("x2")) {
      of_type(i.type().substr(0, i.type().size() - 2), [&](auto of) {
        using T = decltype(of);
        emit([=](Frame& f) {
          const auto half = [&](int k) {
            return bits_of(static_cast<T>(function(as<T>(a(f) >> (16 * k)), as<T>(b(f) >> (16 * k)))));
          };
          f.registers[d] = half(1) << 16 | half(0);
        });
      });
      return;
    }
    of_type(i.type(), [&](auto of) {
      using T = decltype(of);
      emit([=](Frame& f) { f.registers[d] = bits_of(static_cast<T>(function(as<T>(a(f)), as<T>(b(f))))); });
    });
  }
  template <typename F>
  void binary_of_integers(const Instruction& i, F function) {
    of_integer(i.type(), [&, d = index_of(i.operand(0)), a = source(i.operand(1)), b = source(i.operand(2))](auto of) {
      using T = decltype(of);
      emit([=](Frame& f) { f.registers[d] = bits_of(static_cast<T>(function(as<T>(a(f)), as<T>(b(f))))); });
    });
  }
  // Of 32 bits.
  template <typename F>
  void of_three_words(const Instruction& i, F function) {
    const Source a = source(i.operand(1)), b = source(i.operand(2)), c = source(i.operand(3));
    emit([=, d = index_of(i.operand(0))](Frame& f) {
      f.registers[d] = function(static_cast<uint32_t>(a(f)), static_cast<uint32_t>(b(f)), static_cast<uint32_t>(c(f)));
    });
  }

  void read(const std::string& statement) {
    std::string text = statement;
    predicate_.clear();
    if (text[0] == '@') {
      const size_t space = text.find_first_of(" \t");
      predicate_ = text.substr(1, space - 1);
      text = trimmed(text.substr(space));
    }
    const size_t space = text.find_first_of(" \t\n{");
    Instruction i{text.substr(0, space), {}, {}};
    i.words = split(i.name, '.');
    if (space != std::string::npos) i.operands = operands_of(text.substr(space));
    if (!read_control(i) && !read_memory(i) && !read_arithmetic(i) && !read_bits(i) && !read_of_warp(i)) unknown();
  }

  [[noreturn]] static void unknown() { throw std::runtime_error("PTX on the host: an instruction that is not known"); }

  bool read_control(const Instruction& i) {
    if (i.is("ret") || i.is("exit")) {
      emit([](Frame& f) { f.next = static_cast<size_t>(-1); });
    } else if (i.is("bra")) {
      branches_.emplace_back(i.operand(0), 0);
      emit([this, place = branches_.size() - 1](Frame& f) { f.next = branches_[place].second; });
    } else if (i.is("setp")) {
      read_comparison(i);
    } else if (i.is("selp")) {
      const int d = index_of(i.operand(0));
      of_type(i.type(), [&, a = source(i.operand(1)), b = source(i.operand(2)), p = source(i.operand(3))](auto of) {
        using T = decltype(of);
        emit([=](Frame& f) { f.registers[d] = bits_of(as<T>(p(f) != 0 ? a(f) : b(f))); });
      });
    } else {
      // What is about time, order among threads that run one after the other, and the policies of caches.
      return i.is("griddepcontrol") || i.is("membar") || i.is("fence") || i.is("createpolicy");
    }
    return true;
  }

  bool read_memory(const Instruction& i) {
    const Space in = i.has("param") ? Space::kParameter : i.has("global") ? Space::kGlobal : Space::kShared;
    if (i.is("mov")) {
      read_mov(i);
    } else if (i.is("ld") || i.is("st")) {
      if (in == Space::kShared && i.name.find(".shared") == std::string::npos) unknown();
      i.is("ld") ? read_load(in, i) : read_store(in, i);
    } else if (i.is("cvta")) {
      const uint64_t window = i.has("shared") ? kSharedWindow : 0;
      emit([=, back = i.has("to"), d = index_of(i.operand(0)), a = source(i.operand(1))](Frame& f) {
        f.registers[d] = back ? a(f) - window : a(f) + window;
      });
    } else if (i.name == "atom.global.add.u32") {
      const Address to = address(Space::kGlobal, i.operand(1));
      emit([=, d = index_of(i.operand(0)), a = source(i.operand(2))](Frame& f) {
        unsigned char* const at = to(f, 4);
        const auto before = load<uint32_t>(at);
        store<uint32_t>(at, before + static_cast<uint32_t>(a(f)));
        f.registers[d] = before;
      });
    } else if (i.name == "cp.async.wait_all") {
      emit([](Frame&) { wait_for_copies(); });
    } else if (i.name.starts_with("cp.async.c") && i.operands.size() == 3) {
      const size_t bytes = std::stoul(i.operand(2));
      const Address to = address(Space::kShared, i.operand(0), true), from = address(Space::kGlobal, i.operand(1));
      emit([=](Frame& f) { begin_copy(to(f, bytes), from(f, bytes), bytes); });
    } else {
      return false;
    }
    return true;
  }

  bool read_arithmetic(const Instruction& i) {
    if (i.is("add")) {
      binary(i, [](auto a, auto b) { return a + b; });
    } else if (i.is("sub")) {
      binary(i, [](auto a, auto b) { return a - b; });
    } else if (i.is("mul") || i.is("mad")) {
      read_product(i);
    } else if (i.is("fma")) {
      const Source a = source(i.operand(1)), b = source(i.operand(2)), c = source(i.operand(3));
      of_type(i.type(), [&, d = index_of(i.operand(0))](auto of) {
        using T = decltype(of);
        using W = Wide<T>;
        emit([=](Frame& f) {
          const auto wide = [&](const Source& x) { return static_cast<W>(as<T>(x(f))); };
          f.registers[d] = bits_of(static_cast<T>(std::fma(wide(a), wide(b), wide(c))));
        });
      });
    } else if (i.is("div")) {
      binary(i, [](auto a, auto b) {
        if (!kFloating<decltype(a)> && b == decltype(b)(0)) fail_here("a division by zero");
        return a / b;
      });
    } else if (i.is("rem")) {
      binary_of_integers(i, [](auto a, auto b) {
        if (b == 0) fail_here("a division by zero");
        return a % b;
      });
    } else if (i.is("min") || i.is("max")) {
      binary(i, [max = i.is("max"), keeps_nan = i.has("NaN")](auto a, auto b) {
        using T = decltype(a);
        if constexpr (kFloating<T>) {
          const auto x = static_cast<Wide<T>>(a), y = static_cast<Wide<T>>(b);
          if (keeps_nan && (std::isnan(x) || std::isnan(y))) return static_cast<T>(x + y);
          return static_cast<T>(max ? std::fmax(x, y) : std::fmin(x, y));
        } else {
          return max ? std::max(a, b) : std::min(a, b);
        }
      });
    } else if (i.is("neg")) {
      unary(i, [](auto a) { return -a; }, i.type());
    } else if (i.is("abs")) {
      unary(i, [](auto a) { return std::signbit(static_cast<double>(a)) ? -a : a; }, i.type());
    } else if (i.is("rcp") || i.is("ex2") || i.is("lg2") || i.is("sqrt")) {
      unary(
          i,
          [what = i.words[0][0], flush = i.has("ftz")](auto a) {
            auto x = static_cast<Wide<decltype(a)>>(a);
            if (flush) x = flushed(x);
            x = what == 'r' ? 1 / x : what == 'e' ? std::exp2(x) : what == 'l' ? std::log2(x) : std::sqrt(x);
            return static_cast<decltype(a)>(flush ? flushed(x) : x);
          },
          i.type());
    } else if (i.is("cvt")) {
      read_conversion(i);
    } else {
      return false;
    }
    return true;
  }

  bool read_bits(const Instruction& i) {
    if (i.is("and")) {
      binary_of_integers(i, [](auto a, auto b) { return a & b; });
    } else if (i.is("or")) {
      binary_of_integers(i, [](auto a, auto b) { return a | b; });
    } else if (i.is("xor")) {
      binary_of_integers(i, [](auto a, auto b) { return a ^ b; });
    } else if (i.is("not")) {
      const uint64_t ones = i.type() == "pred"  ? 1
                            : i.type() == "b16" ? 0xffff
                            : i.type() == "b32" ? 0xffffffff
                                                : ~0ull;
      emit([=, d = index_of(i.operand(0)), a = source(i.operand(1))](Frame& f) { f.registers[d] = ~a(f) & ones; });
    } else if (i.is("shl") || i.is("shr")) {
      of_integer(i.type(),
                 [&, d = index_of(i.operand(0)), a = source(i.operand(1)), b = source(i.operand(2))](auto of) {
                   using T = decltype(of);
                   emit([=, left = i.is("shl")](Frame& f) {  // by any number
                     const auto by = std::min<uint32_t>(static_cast<uint32_t>(b(f)), 8 * sizeof(T) - 1);
                     const bool all = by < static_cast<uint32_t>(b(f));
                     const T x = as<T>(a(f)), moved = static_cast<T>(left ? x << by : x >> by);
                     f.registers[d] = bits_of(!all ? moved : static_cast<T>(!left && x < 0 ? -1 : 0));
                   });
                 });
    } else if (i.is("popc")) {
      emit([d = index_of(i.operand(0)), a = source(i.operand(1)), wide = i.type() == "b64"](Frame& f) {
        f.registers[d] = static_cast<uint64_t>(std::popcount(wide ? a(f) : static_cast<uint32_t>(a(f))));
      });
    } else if (i.name == "brev.b32") {
      emit([d = index_of(i.operand(0)), a = source(i.operand(1))](Frame& f) {
        uint32_t reversed = 0;
        for (unsigned k = 0; k < 32; ++k) reversed |= static_cast<uint32_t>(a(f) >> k & 1) << (31 - k);
        f.registers[d] = reversed;
      });
    } else if (i.name == "bfind.shiftamt.u32") {  // how far to the left the highest one can go
      emit([d = index_of(i.operand(0)), a = source(i.operand(1))](Frame& f) {
        const auto x = static_cast<uint32_t>(a(f));
        f.registers[d] = x == 0 ? ~uint32_t(0) : static_cast<uint32_t>(std::countl_zero(x));
      });
    } else if (i.name == "prmt.b32") {
      of_three_words(i, [](uint32_t a, uint32_t b, uint32_t selector) {
        uint32_t result = 0;
        for (int k = 0; k < 4; ++k) {
          const unsigned chosen = selector >> (4 * k) & 0xf;
          const uint32_t byte = (chosen & 4 ? b : a) >> (8 * (chosen & 3)) & 0xff;
          result |= (chosen & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << (8 * k);
        }
        return result;
      });
    } else if (i.name == "bfe.u32" || i.name == "bfe.s32") {
      of_three_words(i, [negative = i.type() == "s32"](uint32_t a, uint32_t b, uint32_t c) {
        const unsigned at = b & 0xff, length = std::min(c & 0xff, 32u);
        const auto wide = negative ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(a))) : a;
        uint64_t field = (at > 63 ? 0 : wide >> at) & ((uint64_t(1) << length) - 1);
        if (negative && length > 0 && field >> (length - 1) & 1) field |= ~uint64_t(0) << length;
        return static_cast<uint32_t>(field);
      });
    } else if (i.is("bfi")) {
      const Source a = source(i.operand(1)), b = source(i.operand(2)), c = source(i.operand(3)),
                   n = source(i.operand(4));
      of_integer(i.type(), [&, d = index_of(i.operand(0))](auto of) {
        using T = decltype(of);
        emit([=](Frame& f) {
          const unsigned at = c(f) & 0xff, length = n(f) & 0xff;
          const uint64_t ones = length > 63 ? ~uint64_t(0) : (uint64_t(1) << length) - 1;
          const uint64_t mask = at > 63 ? 0 : ones << at;
          f.registers[d] = bits_of(static_cast<T>((b(f) & ~mask) | ((at > 63 ? 0 : a(f) << at) & mask)));
        });
      });
    } else {
      return false;
    }
    return true;
  }

  bool read_of_warp(const Instruction& i) {
    if (i.is("shfl")) {
      read_shuffle(i);
    } else if (i.name.starts_with("bar.warp.sync")) {
      emit([mask = source(i.operand(0))](Frame& f) { synchronise_warp(static_cast<unsigned>(mask(f))); });
    } else if (i.is("bar") || i.is("barrier")) {
      const Source threads = i.operands.size() > 1 ? source(i.operand(1)) : Source{-1, 0};
      // A "bar" wants the lanes of a warp in one place, which the statement's number is.
      const int place = i.is("bar") ? static_cast<int>(steps_.size()) + 1 : 0;
      emit([=, number = source(i.operand(0))](Frame& f) {
        barrier(place, static_cast<int>(number(f)), static_cast<uint32_t>(threads(f)));
      });
    } else if (i.is("ldmatrix") || i.is("stmatrix")) {
      read_matrices(i);
    } else if (i.name == "redux.sync.min.s32" || i.name == "redux.sync.max.s32") {
      const bool least = i.name == "redux.sync.min.s32";
      over_lanes(i, least ? INT32_MAX : INT32_MIN, [=](uint32_t& result, unsigned, uint32_t, uint32_t x) {
        const auto a = static_cast<int32_t>(result), b = static_cast<int32_t>(x);
        result = static_cast<uint32_t>(least ? std::min(a, b) : std::max(a, b));
      });
    } else if (i.name == "redux.sync.add.s32") {
      over_lanes(i, 0, [](uint32_t& result, unsigned, uint32_t, uint32_t x) { result += x; });
    } else if (i.name == "vote.sync.ballot.b32") {
      over_lanes(i, 0, [](uint32_t& result, unsigned lane, uint32_t, uint32_t x) {
        result |= static_cast<uint32_t>(x != 0) << lane;
      });
    } else if (i.name == "match.any.sync.b32") {
      over_lanes(i, 0, [](uint32_t& result, unsigned lane, uint32_t own, uint32_t x) {
        result |= static_cast<uint32_t>(x == own) << lane;
      });
    } else {
      return false;
    }
    return true;
  }

  // d, a, mask: work(d so far, lane, own a, its a) for every lane of the mask.
  template <typename F>
  void over_lanes(const Instruction& i, int32_t first, F work) {
    emit([=, d = index_of(i.operand(0)), a = source(i.operand(1)), mask = source(i.operand(2))](Frame& f) {
      const auto own = static_cast<uint32_t>(a(f));
      auto result = static_cast<uint32_t>(first);
      exchange_all(static_cast<unsigned>(mask(f)), own,
                   [&](unsigned lane, uint32_t x) { work(result, lane, own, x); });
      f.registers[d] = result;
    });
  }

  void read_mov(const Instruction& i) {
    const std::vector<Source> to = sources(i.operand(0)), from = sources(i.operand(1));
    if (to.size() == 1 && from.size() == 1) {
      unary(i, [](auto a) { return a; }, i.type());
      return;
    }
    const unsigned bits = std::stoul(i.type().substr(1)) / std::max(to.size(), from.size());
    const uint64_t ones = (uint64_t(1) << bits) - 1;
    emit([=](Frame& f) {
      uint64_t all = 0;
      for (size_t k = 0; k < from.size(); ++k) all |= from.size() > 1 ? (from[k](f) & ones) << (k * bits) : from[k](f);
      for (size_t k = 0; k < to.size(); ++k) {
        f.registers[to[k].index] = to.size() > 1 ? all >> (k * bits) & ones : all;
      }
    });
  }

  void read_load(Space space, const Instruction& i) {
    const std::vector<Source> to = sources(i.operand(0));
    of_type(i.type(), [&, from = address(space, i.operand(1))](auto of) {
      using T = decltype(of);
      emit([=](Frame& f) {
        const unsigned char* const at = from(f, to.size() * sizeof(T));
        for (size_t k = 0; k < to.size(); ++k) {
          const T x = load<T>(at + k * sizeof(T));
          if constexpr (std::is_signed_v<T> && !kFloating<T>) {  // extended to whatever register takes it
            f.registers[to[k].index] = static_cast<uint64_t>(static_cast<int64_t>(x));
          } else {
            f.registers[to[k].index] = bits_of(x);
          }
        }
      });
    });
  }

  void read_store(Space space, const Instruction& i) {
    const std::vector<Source> from = sources(i.operand(1));
    of_type(i.type(), [&, to = address(space, i.operand(0), true)](auto of) {
      using T = decltype(of);
      emit([=](Frame& f) {
        unsigned char* const at = to(f, from.size() * sizeof(T));
        for (size_t k = 0; k < from.size(); ++k) store(at + k * sizeof(T), as<T>(from[k](f)));
      });
    });
  }

  void read_product(const Instruction& i) {
    const bool adds = i.is("mad"), wide = i.has("wide"), high = i.has("hi");
    if (!wide && !high && !i.has("lo")) {  // of floating point
      if (adds) unknown();
      binary(i, [](auto a, auto b) { return a * b; });
      return;
    }
    const Source a = source(i.operand(1)), b = source(i.operand(2)), c = adds ? source(i.operand(3)) : Source{-1, 0};
    of_integer(i.type(), [&, d = index_of(i.operand(0))](auto of) {
      using T = decltype(of);
      using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      emit([=](Frame& f) {
        const W product = static_cast<W>(as<T>(a(f))) * static_cast<W>(as<T>(b(f)));
        if (wide) {
          const uint64_t all = static_cast<uint64_t>(product) + c(f);
          f.registers[d] = sizeof(T) == 2 ? static_cast<uint32_t>(all) : all;
        } else {
          f.registers[d] =
              bits_of(static_cast<T>(static_cast<T>(high ? product >> (8 * sizeof(T)) : product) + as<T>(c(f))));
        }
      });
    });
  }

  void read_comparison(const Instruction& i) {
    const Comparison compared = comparison(i.words.at(1));
    const auto [first, second] = one_or_two(i.operand(0));
    const Source a = source(i.operand(1)), b = source(i.operand(2));
    if (i.type().ends_with("x2")) {
      if (second < 0) unknown();
      of_type(i.type().substr(0, i.type().size() - 2), [&, first = first, second = second](auto of) {
        using T = decltype(of);
        emit([=](Frame& f) {
          const uint64_t x = a(f), y = b(f);
          f.registers[first] = compared(as<T>(x), as<T>(y));
          f.registers[second] = compared(as<T>(x >> 16), as<T>(y >> 16));
        });
      });
      return;
    }
    const bool combined = i.has("and") || i.has("or") || i.has("xor");
    if (second >= 0) unknown();
    const Source c = combined ? source(i.operand(3)) : Source{-1, 0};
    const char with = combined ? i.words[2][0] : ' ';
    of_type(i.type(), [&, d = first](auto of) {
      using T = decltype(of);
      emit([=](Frame& f) {
        const bool own = compared(as<T>(a(f)), as<T>(b(f))), other = c(f) != 0;
        f.registers[d] = with == 'a' ? own && other : with == 'o' ? own || other : with == 'x' ? own != other : own;
      });
    });
  }

  void read_conversion(const Instruction& i) {
    const std::string to = i.words.at(i.words.size() - 2), from = i.type();
    bool whole = false;
    for (size_t k = 1; k + 2 < i.words.size(); ++k) {
      if (i.words[k] != "rzi" && i.words[k] != "rn" && i.words[k] != "ftz") unknown();
      whole |= i.words[k] == "rzi";
    }
    const int d = index_of(i.operand(0));
    if (to.ends_with("x2")) {
      of_type(to.substr(0, to.size() - 2), [&, high = source(i.operand(1)), low = source(i.operand(2))](auto of) {
        using T = decltype(of);
        if constexpr (sizeof(T) == 2 && kFloating<T>) {
          emit(
              [=](Frame& f) { f.registers[d] = bits_of(T(as<float>(high(f)))) << 16 | bits_of(T(as<float>(low(f)))); });
        }
      });
      return;
    }
    of_type(to, [&](auto to_value) {
      of_type(from, [&, a = source(i.operand(1))](auto from_value) {
        using To = decltype(to_value);
        using From = decltype(from_value);
        emit([=](Frame& f) { f.registers[d] = bits_of(converted<To, From>(as<From>(a(f)), whole)); });
      });
    });
  }

  void read_shuffle(const Instruction& i) {
    const std::string how = i.words.at(2);  // shfl.sync.how.b32
    const auto [d, found] = one_or_two(i.operand(0));
    const Source a = source(i.operand(1)), b = source(i.operand(2)), c = source(i.operand(3)),
                 mask = source(i.operand(4));
    emit([=, d = d, found = found](Frame& f) {
      const unsigned lane = current_thread()->index % kWarpSize, by = b(f) & 31, clamp = c(f) & 31;
      const unsigned segment = c(f) >> 8 & 31, last = (lane & segment) | (clamp & ~segment);
      unsigned from = how == "up"     ? lane - by
                      : how == "down" ? lane + by
                      : how == "bfly" ? lane ^ by
                                      : (lane & segment) | (by & ~segment);
      const bool inside = how == "up" ? static_cast<int>(from) >= static_cast<int>(last) : from <= last;
      if (!inside) from = lane;
      f.registers[d] = exchange(static_cast<unsigned>(mask(f)), static_cast<uint32_t>(a(f)), from);
      if (found >= 0) f.registers[found] = inside;
    });
  }

  // (ld|st)matrix.sync.aligned.m8n8.xN[.trans].shared.b16: of 8 x 8 numbers of 16 bits, lane 8 i + r has the address of
  // row r of matrix i, and of every matrix each lane two numbers.
  void read_matrices(const Instruction& i) {
    const bool loads = i.is("ldmatrix"), transposed = i.has("trans");
    if (!i.has("m8n8") || i.type() != "b16") unknown();
    const std::vector<Source> registers = sources(i.operand(loads ? 0 : 1));
    const Address row = address(Space::kShared, i.operand(loads ? 1 : 0), !loads);
    emit([=](Frame& f) {
      const unsigned lane = current_thread()->index % kWarpSize;
      unsigned char* const own = lane < 8 * registers.size() ? row(f, 16) : nullptr;
      std::vector<uint64_t> read(registers.size());
      for (size_t m = 0; m < registers.size(); ++m) {
        for (unsigned k = 0; k < 2; ++k) {
          const unsigned other = 2 * (lane % 4) + k, r = transposed ? other : lane / 4;
          const unsigned column = transposed ? lane / 4 : other;
          unsigned char* const at = exchange(~0u, own, static_cast<unsigned>(8 * m + r)) + 2 * column;
          if (loads) {
            read[m] |= static_cast<uint64_t>(load<uint16_t>(at)) << (16 * k);
          } else {
            store(at, static_cast<uint16_t>(registers[m](f) >> (16 * k)));
          }
        }
      }
      exchange(~0u, 0u, 0);  // all lanes have read or written
      for (size_t m = 0; loads && m < registers.size(); ++m) f.registers[registers[m].index] = read[m];
    });
  }

  std::string name_;
  std::vector<Parameter> parameters_;
  std::map<std::string, int> registers_;
  std::map<int, uint64_t> constants_;
  std::vector<Step> steps_;
  std::vector<bool> is_work_;  // and not only another name for a value
  std::map<std::string, size_t> labels_;
  std::vector<std::pair<std::string, size_t>> branches_;  // a label, and the step there
  std::string predicate_;                                 // of the instruction that is read
};

namespace {

// Anonymous namespaces are named after the file by nvcc, but not by g++.
std::string one_name(std::string name) {
  const size_t at = name.find("_GLOBAL__N_");
  if (at == std::string::npos) return name;
  size_t digits = at;
  while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
  return name.replace(digits, at - digits + std::stoul(name.substr(digits, at - digits)), "anonymous");
}

// A text of PTX, whose kernels are read when they are first wanted.
class PtxModule {
 public:
  explicit PtxModule(std::string text) : text_(std::move(text)) {
    for (size_t at = text_.find(".extern .shared"); at != std::string::npos;
         at = text_.find(".extern .shared", at + 1)) {
      const std::string declared = text_.substr(at, text_.find('[', at) - at);
      shared_.push_back(declared.substr(declared.rfind(' ') + 1));
    }
    for (size_t at = text_.find(".entry "); at != std::string::npos; at = text_.find(".entry ", at + 1)) {
      const size_t opened = text_.find('(', at);
      places_[one_name(trimmed(text_.substr(at + 7, opened - at - 7)))] = at;
    }
  }

  const PtxKernel* find(const std::string& name) {
    const auto place = places_.find(name);
    if (place == places_.end()) return nullptr;
    std::unique_ptr<PtxKernel>& kernel = kernels_[name];
    if (kernel == nullptr) {
      const size_t next = text_.find(".entry ", place->second + 1);
      kernel = std::make_unique<PtxKernel>(text_.substr(place->second, next - place->second), shared_);
    }
    return kernel.get();
  }

 private:
  std::string text_;
  std::vector<std::string> shared_;
  std::map<std::string, size_t> places_;
  std::map<std::string, std::unique_ptr<PtxKernel>> kernels_;
};

// The functions of this library, those without an outward name too, by where they lie in it.
std::map<uint64_t, std::string> functions_of(const char* library) {
  std::map<uint64_t, std::string> names;
  const std::string command = "nm --defined-only '" + std::string(library) + "'";
  FILE* const listing = popen(command.c_str(), "r");
  if (listing == nullptr) throw std::runtime_error("PTX on the host: nm does not run");
  std::string line;
  for (int c = std::fgetc(listing); c != EOF; c = std::fgetc(listing)) {
    if (c != '\n') {
      line += static_cast<char>(c);
      continue;
    }
    std::istringstream words(line);
    std::string at, kind, name;
    if (words >> at >> kind >> name) names[std::stoull(at, nullptr, 16)] = name;
    line.clear();
  }
  pclose(listing);
  return names;
}

}  // namespace

const PtxKernel* ptx_kernel_at(const void* function) {
  const char* const files = std::getenv("TK_EMULATION_PTX");
  if (files == nullptr) return nullptr;
  static std::vector<std::unique_ptr<PtxModule>> modules;
  static std::map<uint64_t, std::string> functions;
  static std::map<const void*, const PtxKernel*> known;
  const PtxKernel*& kernel = known[function];
  if (kernel != nullptr) return kernel;
  Dl_info library;
  if (dladdr(function, &library) == 0) throw std::runtime_error("PTX on the host: a kernel of no library");
  if (functions.empty()) {
    functions = functions_of(library.dli_fname);
    for (const std::string& path : split(files, ':')) {
      std::ifstream file(path);
      std::stringstream text;
      text << file.rdbuf();
      modules.push_back(std::make_unique<PtxModule>(text.str()));
    }
  }
  const std::string& name =
      functions[reinterpret_cast<uint64_t>(function) - reinterpret_cast<uint64_t>(library.dli_fbase)];
  for (const auto& module : modules) {
    if (kernel == nullptr) kernel = module->find(one_name(name));
  }
  if (kernel == nullptr) throw std::runtime_error("PTX on the host: no kernel " + name);
  return kernel;
}

void launch_ptx(const PtxKernel& kernel, dim3 grid, dim3 size, size_t shared_bytes, void* const* arguments,
                const std::vector<size_t>& bytes) {
  if (bytes.size() != kernel.parameters())
    throw std::runtime_error("PTX on the host: other parameters than the kernel's");
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != kernel.parameter_bytes(i)) {
      throw std::runtime_error("PTX on the host: parameter " + std::to_string(i) + " has " + std::to_string(bytes[i]) +
                               " bytes, the kernel's " + std::to_string(kernel.parameter_bytes(i)));
    }
  }
  launch(grid, size, shared_bytes, [&] { kernel.run(arguments); }, std::getenv("TK_EMULATION_RACES") != nullptr);
  if (traffic() != nullptr) traffic()->write(kernel.name());
}

}  // namespace emulation

// For tests of what Triton compiles: the error, or null. A parameter that is null is passed as zeros.
extern "C" __attribute__((visibility("default"))) const char* tk_launch_ptx(const char* text, const char* name,
                                                                            const unsigned* grid, unsigned threads,
                                                                            unsigned shared_bytes,
                                                                            void* const* arguments) {
  static std::map<std::string, std::unique_ptr<emulation::PtxModule>> modules;
  static std::string error;
  try {
    auto& module = modules[text];
    if (module == nullptr) module = std::make_unique<emulation::PtxModule>(text);
    const emulation::PtxKernel* const kernel = module->find(name);
    if (kernel == nullptr) throw std::runtime_error("PTX on the host: no kernel " + std::string(name));
    emulation::allow_shared_bytes(shared_bytes);
    emulation::launch(dim3(grid[0], grid[1]), dim3(threads), shared_bytes, [&] { kernel->run(arguments); });
    if (emulation::traffic() != nullptr) emulation::traffic()->write(name);
    return nullptr;
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}
