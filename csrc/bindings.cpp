// Python's door to the kernels: lists of addresses and sizes in, threads and instruction set chosen here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "arguments.h"
#include "noise.h"
#include "ops.h"
#include "pool.h"

namespace py = pybind11;

namespace hosfl {
namespace {

// --- instruction sets ---

std::vector<const Ops*> supported() {  // best last
  std::vector<const Ops*> all = {&baseline::ops};
#if defined(__x86_64__)
  // The features that kernels_avx2.cpp and kernels_avx512.cpp are compiled for, one by one: GCC 11 knows no levels such
  // as x86-64-v3 here. A feature counts only where the operating system saves its registers.
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;  // clang before 18 has no name for f16c
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v3 && f16c) all.push_back(&avx2::ops);
  if (v3 && f16c && v4) all.push_back(&avx512::ops);
#endif
  return all;
}

const Ops* chosen = supported().back();

void use_isa(const std::string& name) {
  std::string known;
  for (const Ops* ops : supported()) {
    if (name == ops->isa) {
      chosen = ops;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + ops->isa;
  }
  throw std::invalid_argument("this processor has no '" + name + "'; it has: " + known);
}

// --- threads ---

// Below this many cell updates one thread is faster than waking another.
constexpr int64_t UPDATES_PER_THREAD = 1 << 17;

// Those that `updates` keep busy.
int useful_threads(int64_t updates, int threads) {
  return int(std::clamp<int64_t>(updates / UPDATES_PER_THREAD, 1, std::max(threads, 1)));
}

// Calls work(k) for k = 0 .. items - 1. Threads take items as they come free: on a busy machine a slow thread then
// holds up one item, not its whole share.
template <typename Work>
void each_item(int64_t items, int threads, Work work) {
  std::atomic<int64_t> next{0};
  Pool::here().run(threads - 1, [&] {
    IeeeArithmetic scope;
    for (int64_t k; (k = next.fetch_add(1)) < items;) work(k);
  });
}

constexpr int64_t BLOCK = RADEMACHER_ROWS * COLS;

// The part [first, last) of the segments laid end to end.
std::vector<Segment> part_of(const std::vector<Segment>& segments, int64_t first, int64_t last) {
  std::vector<Segment> part;
  int64_t at = 0;
  for (const Segment& segment : segments) {
    const int64_t from = std::max<int64_t>(first - at, 0), to = std::min(last - at, segment.n);
    if (from < to) part.push_back(piece_of(segment, from, to));
    at += segment.n;
  }
  return part;
}

// Calls work(segment) on every segment, cut into chunks. A cut changes no bit: noise is a function of the element.
template <typename Work>
void in_parallel(const std::vector<Segment>& segments, int64_t updates_per_cell, int threads, Work work) {
  int64_t total = 0;
  for (const Segment& segment : segments) total += segment.n;
  const int count = useful_threads(total * std::max<int64_t>(updates_per_cell, 1), threads);
  // Whole blocks where there are enough of them: a block cut in two makes its words twice.
  constexpr int64_t CHUNKS_PER_THREAD = 16;
  const int64_t even = count == 1 ? total : total / (count * CHUNKS_PER_THREAD), unit = even >= BLOCK ? BLOCK : COLS;
  const int64_t chunk = (even / unit + 1) * unit;
  each_item((total + chunk - 1) / chunk, count, [&](int64_t k) {
    const int64_t at = k * chunk;
    for (const Segment& segment : part_of(segments, at, std::min(at + chunk, total))) work(segment);
  });
}

// The segments cut where blocks end: what of a tensor lies in one block, wherever a shard of it begins.
std::vector<Segment> blocks_of(const std::vector<Segment>& segments) {
  std::vector<Segment> blocks;
  for (const Segment& segment : segments) {
    for (int64_t at = 0, next; at < segment.n; at = next) {
      next = std::min(at + BLOCK - int64_t((segment.start + uint64_t(at)) % BLOCK), segment.n);
      blocks.push_back(piece_of(segment, at, next));
    }
  }
  return blocks;
}

// Neighbours in the table are one segment. One shorter than the rows of the noise is cut where such a row ends: across
// the end, the words of all 1,024 columns would be made.
std::vector<Segment> segments_of_rows(const Rows& rows, const Place& place) {
  const auto& [address, numbers_address, count, width, dtype] = rows;
  const auto* const numbers = reinterpret_cast<const int64_t*>(numbers_address);
  const Segment all = segments_of(Memory{{address}, {count * width}, {dtype}}, place)[0];
  std::vector<Segment> segments;
  for (int64_t k = 0, next; k < count; k = next) {
    for (next = k + 1; next < count && numbers[next] == numbers[next - 1] + 1;) ++next;
    Segment segment = piece_of(all, k * width, next * width);
    segment.start = uint64_t(numbers[k]) * uint64_t(width);
    const int64_t left = COLS - int64_t(segment.start % COLS);
    if (segment.n < COLS && left < segment.n) {
      segments.push_back(piece_of(segment, 0, left));
      segment = piece_of(segment, left, segment.n);
    }
    segments.push_back(segment);
  }
  return segments;
}

// --- the ops ---

py::tuple philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t words[4];
  chosen->philox(key, uint64_t(c1) << 32 | c0, c2, c3, words);
  return py::make_tuple(words[0], words[1], words[2], words[3]);
}

void noise(const Memory& out, uint64_t seed, const Place& place, int threads) {
  const auto segments = segments_of(out, place);
  py::gil_scoped_release unlocked;
  in_parallel(segments, 1, threads, [&](const Segment& segment) { chosen->noise(segment, seed); });
}

void replay(const Memory& tensors, const std::vector<uint64_t>& seeds,
            const std::vector<double>& coefficients, const Place& place, const std::vector<uint64_t>& rounding_seeds,
            int threads) {
  const auto segments = segments_of(tensors, place);
  const auto records = records_of(seeds, coefficients, rounding_seeds);
  const bool stochastic = !rounding_seeds.empty();
  py::gil_scoped_release unlocked;
  in_parallel(segments, int64_t(records.size()), threads, [&](const Segment& segment) {
    chosen->replay(segment, records.data(), int64_t(records.size()), stochastic);
  });
}

void perturb_rows(const Rows& rows, uint64_t seed, double scale, const Place& place, int threads) {
  const auto segments = segments_of_rows(rows, place);
  const auto records = records_of({seed}, {scale}, {});
  py::gil_scoped_release unlocked;
  in_parallel(segments, 1, threads,
              [&](const Segment& segment) { chosen->replay(segment, records.data(), 1, false); });
}

void update(const Memory& tensors, const std::vector<std::vector<uint64_t>>& moments, int rule,
            const std::vector<double>& constants, const std::vector<uint64_t>& seeds,
            const std::vector<double>& coefficients, const std::vector<std::array<double, 3>>& rounds,
            const Place& place, const std::vector<uint64_t>& rounding_seeds, int threads) {
  auto segments = segments_of(tensors, place);
  const auto records = records_of(seeds, coefficients, {});
  const auto steps = steps_of(rounds, rounding_seeds);
  const bool stochastic = !rounding_seeds.empty();
  add_moments(segments, moments);
  const Update update = update_of(rule, constants, records.data(), int64_t(records.size()), steps.data(),
                                  int64_t(steps.size()), moments.size());
  py::gil_scoped_release unlocked;
  in_parallel(segments, int64_t(records.size() + steps.size()), threads,
              [&](const Segment& segment) { chosen->update(segment, update, stochastic); });
}

std::vector<double> project(const Memory& tensors, const std::vector<uint64_t>& seeds, const Place& place,
                            int threads) {
  const auto blocks = blocks_of(segments_of(tensors, place));
  const int64_t n = int64_t(blocks.size()), count = int64_t(seeds.size());
  py::gil_scoped_release unlocked;
  IeeeArithmetic scope;
  std::vector<double> scalars(seeds.size());
  // Every block has its own sums, added in the order of the blocks when the threads are done with them; so many blocks
  // at a time that their sums stay below 32 MB.
  const int64_t most = std::max<int64_t>((1 << 22) / std::max<int64_t>(count, 1), 1);
  for (int64_t first = 0; first < n; first += most) {
    const int64_t items = std::min(most, n - first);
    std::vector<double> sums(size_t(items * count));
    each_item(items, useful_threads(items * BLOCK * count, threads), [&](int64_t k) {
      chosen->project(blocks[size_t(first + k)], seeds.data(), count, sums.data() + k * count);
    });
    for (size_t i = 0; i < sums.size(); ++i) scalars[i % seeds.size()] += sums[i];
  }
  return scalars;
}

}  // namespace
}  // namespace hosfl

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "The C++ kernels. Use hosfl_kernels, which checks the arguments first.";
  m.def("philox", &hosfl::philox);
  m.def("noise", &hosfl::noise);
  m.def("perturb_rows", &hosfl::perturb_rows);
  m.def("replay", &hosfl::replay);
  m.def("update", &hosfl::update);
  m.def("project", &hosfl::project);
  m.def("join_openmp", [] { return hosfl::Pool::here().join_openmp(); }, "Work with the threads of torch's ops.");
  m.def("forked", &hosfl::forked, "For tests: see pool.h.");
  m.def("exchange_arithmetic", &hosfl::exchange_arithmetic);
  m.attr("IEEE_ARITHMETIC") = hosfl::IEEE_ARITHMETIC;
  m.def("use_isa", &hosfl::use_isa, "Use another instruction set of this processor; for tests and benchmarks.");
  m.def("isa", [] { return std::string(hosfl::chosen->isa); });
  m.def("supported", [] {
    std::vector<std::string> names;
    for (const auto* ops : hosfl::supported()) names.push_back(ops->isa);
    return names;
  });
}
