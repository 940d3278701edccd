// From Python's lists to the structures of segment.h, for the bindings of either extension.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "segment.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace hosfl {

// The calling thread's floating-point control register: sets it, and returns what it was.
inline uint64_t exchange_arithmetic(uint64_t control) {
#if defined(__SSE__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(unsigned(control));
  return before;
#elif defined(__aarch64__)
  uint64_t before;
  asm volatile("mrs %0, fpcr" : "=r"(before));
  asm volatile("msr fpcr, %0" ::"r"(control));
  return before;
#else
  return control;
#endif
}

#if defined(__SSE__)
constexpr uint64_t IEEE_ARITHMETIC = 0x1F80;
#else
constexpr uint64_t IEEE_ARITHMETIC = 0;
#endif

// Bits assume IEEE arithmetic: round to nearest, subnormals kept. torch.set_flush_denormal changes that
// for the calling thread.
struct IeeeArithmetic {
  uint64_t saved = exchange_arithmetic(IEEE_ARITHMETIC);
  ~IeeeArithmetic() { exchange_arithmetic(saved); }
};

// Of tensors: addresses, numbers of elements, dtypes. Lists of each, because pybind11 is slow to read a tuple for each.
using Memory = std::tuple<std::vector<uint64_t>, std::vector<int64_t>, std::vector<int>>;

// Where tensors lie in the noise: dist, factors, streams, starts, as the named tuple Place of place.py.
using Place = std::tuple<std::string, std::vector<float>, std::vector<uint32_t>, std::vector<uint64_t>>;

inline Dist dist_of(const std::string& name) {
  if (name == "rademacher") return Dist::rademacher;
  if (name == "gaussian") return Dist::gaussian;
  throw std::invalid_argument("no distribution is named " + name);
}

inline std::vector<Segment> segments_of(const Memory& tensors, const Place& place) {
  const auto& [addresses, sizes, dtypes] = tensors;
  const auto& [name, factors, streams, starts] = place;
  const size_t n = addresses.size();
  if (sizes.size() != n || dtypes.size() != n || factors.size() != n || streams.size() != n || starts.size() != n)
    throw std::invalid_argument("addresses, sizes, dtypes, factors, streams and starts differ in length");
  const Dist dist = dist_of(name);
  std::vector<Segment> segments;
  segments.reserve(n);
  for (size_t t = 0; t < n; ++t) {
    if (sizes[t] < 0 || dtypes[t] < 0 || dtypes[t] > 2) throw std::invalid_argument("bad size or dtype");
    segments.push_back({reinterpret_cast<void*>(addresses[t]), sizes[t], starts[t], streams[t], factors[t],
                        static_cast<Dtype>(dtypes[t]), dist});
  }
  return segments;
}

// Rows of a table: their address, that of their numbers in it (int64), how many they are, elements of each, dtype.
using Rows = std::tuple<uint64_t, uint64_t, int64_t, int64_t, int>;

// Rounding seeds: one for each record, or none.
inline std::vector<Record> records_of(const std::vector<uint64_t>& seeds, const std::vector<double>& coefficients,
                                      const std::vector<uint64_t>& rounding_seeds) {
  if (coefficients.size() != seeds.size() || (!rounding_seeds.empty() && rounding_seeds.size() != seeds.size()))
    throw std::invalid_argument("seeds, coefficients and rounding seeds differ in length");
  std::vector<Record> records;
  IeeeArithmetic scope;  // the conversion to float32 must not flush
  for (size_t r = 0; r < seeds.size(); ++r)
    records.push_back({seeds[r], float(coefficients[r]), rounding_seeds.empty() ? 0 : rounding_seeds[r]});
  return records;
}

inline std::vector<Step> steps_of(const std::vector<std::array<double, 3>>& rounds,
                                  const std::vector<uint64_t>& rounding_seeds) {
  if (!rounding_seeds.empty() && rounding_seeds.size() != rounds.size())
    throw std::invalid_argument("steps and rounding seeds differ in length");
  std::vector<Step> steps;
  IeeeArithmetic scope;
  for (size_t r = 0; r < rounds.size(); ++r)
    steps.push_back({float(rounds[r][0]), float(rounds[r][1]), float(rounds[r][2]),
                     rounding_seeds.empty() ? 0 : rounding_seeds[r]});
  return steps;
}

inline void add_moments(std::vector<Segment>& segments, const std::vector<std::vector<uint64_t>>& moments) {
  if (moments.size() > 2) throw std::invalid_argument("more than two moments");
  for (size_t k = 0; k < moments.size(); ++k) {
    if (moments[k].size() != segments.size()) throw std::invalid_argument("moments and tensors differ in length");
    for (size_t t = 0; t < segments.size(); ++t) segments[t].moments[k] = reinterpret_cast<float*>(moments[k][t]);
  }
}

// `records` and `steps` are not read: they may be addresses of another device.
inline Update update_of(int rule, const std::vector<double>& constants, const Record* records, int64_t count,
                        const Step* steps, int64_t rounds, size_t moments) {
  if (rule < 0 || rule > 2 || moments != size_t(rule) || constants.size() > 5 || rounds <= 0 || count % rounds)
    throw std::invalid_argument("bad rule, moments, constants or no rounds");
  IeeeArithmetic scope;
  Update update = {static_cast<Rule>(rule), {}, records, steps, rounds, count / rounds};
  std::copy(constants.begin(), constants.end(), update.constants);
  return update;
}

}  // namespace hosfl
