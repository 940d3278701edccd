// Python's door to the CUDA kernels: addresses on the device in, and the stream to launch on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "arguments.h"
#include "cuda.h"

namespace py = pybind11;

namespace hosfl {
namespace {

// Addresses, sizes, dtypes, streams, starts, factors: as _cpp takes them.
using Places = std::tuple<std::vector<uint64_t>, std::vector<int64_t>, std::vector<int>, std::vector<uint32_t>,
                          std::vector<uint64_t>, std::vector<float>>;
using OnQueue = std::pair<int, uint64_t>;  // device, stream

std::vector<Segment> segments_at(const Places& places) { return std::apply(segments_of, places); }

Dist dist_of(bool gaussian) { return gaussian ? Dist::gaussian : Dist::rademacher; }

cuda::Queue queue_of(const OnQueue& queue) { return {queue.first, queue.second}; }

// An array as it lies in memory, to be copied to the device.
template <typename T>
py::bytes bytes_of(const std::vector<T>& array) {
  return {reinterpret_cast<const char*>(array.data()), array.size() * sizeof(T)};
}

void philox(uint64_t address, uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const OnQueue& queue) {
  cuda::philox(key, uint64_t(c1) << 32 | c0, c2, c3, reinterpret_cast<uint32_t*>(address), queue_of(queue));
}

void noise(uint64_t address, int64_t n, uint64_t seed, uint32_t stream, uint64_t start, bool gaussian,
           const OnQueue& queue) {
  const Segment out = {reinterpret_cast<void*>(address), n, start, stream, 1.0f, Dtype::float32};
  cuda::noise(out, seed, dist_of(gaussian), queue_of(queue));
}

void perturb(const Places& places, uint64_t seed, double scale, const std::vector<uint64_t>& rounding_seeds,
             bool gaussian, const OnQueue& queue) {
  const Record record = records_of({seed}, {scale}, rounding_seeds)[0];
  cuda::perturb(segments_at(places), record, dist_of(gaussian), !rounding_seeds.empty(), queue_of(queue));
}

void replay(const Places& places, uint64_t records, int64_t count, bool gaussian, bool stochastic,
            const OnQueue& queue) {
  cuda::replay(segments_at(places), reinterpret_cast<const Record*>(records), count, dist_of(gaussian), stochastic,
               queue_of(queue));
}

void update(const Places& places, const std::vector<std::vector<uint64_t>>& moments, int rule,
            const std::vector<double>& constants, uint64_t records, int64_t count, uint64_t steps, int64_t rounds,
            bool gaussian, bool stochastic, const OnQueue& queue) {
  auto segments = segments_at(places);
  add_moments(segments, moments);
  const Update update = update_of(rule, constants, reinterpret_cast<const Record*>(records), count,
                                  reinterpret_cast<const Step*>(steps), rounds, moments.size());
  cuda::update(segments, update, dist_of(gaussian), stochastic, queue_of(queue));
}

}  // namespace
}  // namespace hosfl

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels. Use hosfl_kernels, which checks the arguments first.";
  m.attr("EMULATED") = hosfl::cuda::emulated();
  m.def("records", [](const std::vector<uint64_t>& seeds, const std::vector<double>& coefficients,
                      const std::vector<uint64_t>& rounding_seeds) {
    return hosfl::bytes_of(hosfl::records_of(seeds, coefficients, rounding_seeds));
  });
  m.def("steps", [](const std::vector<std::array<double, 3>>& rounds, const std::vector<uint64_t>& rounding_seeds) {
    return hosfl::bytes_of(hosfl::steps_of(rounds, rounding_seeds));
  });
  m.def("philox", &hosfl::philox);
  m.def("noise", &hosfl::noise);
  m.def("perturb", &hosfl::perturb);
  m.def("replay", &hosfl::replay);
  m.def("update", &hosfl::update);
}
