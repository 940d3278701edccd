// The ops for CUDA: one launch for up to 48 tensors of one dtype, one thread for one tile. HOSFL_CUDA=1 builds this
// with nvcc. What a thread does is a function of (block, thread): compiled by another compiler, a launch runs the
// threads one after another.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "cuda_tile.h"

namespace py = pybind11;

namespace hosfl {
namespace cuda {
namespace {

constexpr int TENSORS = 48;  // as many as a kernel's parameters, 4 KB at most, have room for

// A launch's parameters, by value: nothing to allocate, nothing to copy to the device ahead of it.
struct Arguments {
  Segment segments[TENSORS];
  uint32_t first_block[TENSORS];  // of the segments; 0xFFFFFFFF where there is none
  Record record;                  // of perturb and noise
  const Record* records;          // of replay
  int64_t count;
  Update update;
};
static_assert(sizeof(Arguments) <= 4096, "a kernel's parameters have 4 KB");

// --- what a thread does ---

template <Dist D>
struct Noise {
  using Tile = cuda::Tile<16, 4>;

  HOSFL_INLINE void run(const Arguments& a, const Segment& segment, const Tile& tile) {
    typename Tile::Values z;
    each_noise<D>(tile, a.record.seed, 1.0f, [&](int r, int v, float w) { z[r][v] = w; });
    store<Float32>(tile, segment.data, z);
  }
};

// x += s * z for every record, rounded to storage after each, so that the bits are those of one after another.
template <typename Storage, Rounding R, Dist D, typename Tile>
HOSFL_INLINE void move(const Segment& segment, const Tile& tile, const Record* records, int64_t count) {
  typename Tile::Values x;
  load<Storage>(tile, segment.data, x);
  for (int64_t k = 0; k < count; ++k) {
    const float s = records[k].coefficient * segment.factor;
    each_noise<D>(tile, records[k].seed, s, [&](int r, int v, float w) { x[r][v] = x[r][v] + w; });
    round_to_storage<Storage, R>(tile, records[k].rounding_seed, x);
  }
  store<Storage>(tile, segment.data, x);
}

// 16 bytes of each row to a thread, 64 cells in all.
template <typename Storage, Rounding R, Dist D>
struct Perturb {
  static constexpr int V = 16 / sizeof(typename Storage::Cell);
  using Tile = cuda::Tile<64 / V, V>;

  HOSFL_INLINE void run(const Arguments& a, const Segment& segment, const Tile& tile) {
    move<Storage, R, D>(segment, tile, &a.record, 1);
  }
};

// One column to a thread: memory is touched once for all records, and few words are made for many rows.
template <typename Storage, Rounding R, Dist D>
struct Replay {
  using Tile = cuda::Tile<D == Dist::rademacher ? 64 : 16, 1>;

  HOSFL_INLINE void run(const Arguments& a, const Segment& segment, const Tile& tile) {
    move<Storage, R, D>(segment, tile, a.records, a.count);
  }
};

template <typename Storage, Rounding R, Dist D, Rule RULE>
struct UpdateRounds {
  using Tile = cuda::Tile<D == Dist::rademacher && RULE != Rule::adamw ? 32 : 16, 1>;

  HOSFL_INLINE void run(const Arguments& a, const Segment& segment, const Tile& tile) {
    constexpr int MOMENTS = moments_of(RULE);
    typename Tile::Values x, m = {}, v = {};  // those that the rule does not keep are never in a register
    load<Storage>(tile, segment.data, x);
    if (MOMENTS > 0) load<Float32>(tile, segment.moments[0], m);
    if (MOMENTS > 1) load<Float32>(tile, segment.moments[1], v);
    const Record* record = a.update.records;
    for (int64_t round = 0; round < a.update.rounds; ++round) {
      typename Tile::Values g = {};
      for (int64_t p = 0; p < a.update.directions; ++p, ++record) {
        const float s = record->coefficient * segment.factor;
        each_noise<D>(tile, record->seed, s, [&](int r, int c, float w) { g[r][c] = g[r][c] + w; });
      }
      const Step step = a.update.steps[round];
      HOSFL_UNROLL
      for (int r = 0; r < Tile::ROWS; ++r) {
        x[r][0] = stepped<RULE>(x[r][0], m[r][0], v[r][0], g[r][0], a.update.constants, step);
      }
      round_to_storage<Storage, R>(tile, step.rounding_seed, x);
    }
    store<Storage>(tile, segment.data, x);
    if (MOMENTS > 0) store<Float32>(tile, segment.moments[0], m);
    if (MOMENTS > 1) store<Float32>(tile, segment.moments[1], v);
  }
};

// A launch's parameters for rows of a table.
struct RowsArguments {
  void* data;
  const int64_t* numbers;  // of the rows, in the table
  int64_t n, width;        // cells, and those of a row
  uint64_t seed;
  uint32_t stream;
  float s;
};

// One cell, which makes its words itself: rows are few.
template <typename Storage, Dist D>
HOSFL_INLINE void perturb_cell(const RowsArguments& a, int64_t cell) {
  const uint64_t place = uint64_t(a.numbers[cell / a.width] * a.width + cell % a.width);  // in the table
  const uint64_t row = place / COLS, col = place % COLS;
  uint32_t word[4];
  float w;
  if (D == Dist::rademacher) {
    column_words(a.seed, row / RADEMACHER_ROWS * COLS + col, a.stream, TAG_RADEMACHER, word);
    const int k = int(row / 32 % 4);
    w = signed_by(bits_of(a.s), k == 0 ? word[0] : k == 1 ? word[1] : k == 2 ? word[2] : word[3], int(31 - row % 32));
  } else {
    column_words(a.seed, row / GAUSSIAN_ROWS * COLS + col, a.stream, TAG_GAUSSIAN, word);
    const bool last = row % 4 >= 2;
    float z0, z1;
    box_muller(last ? word[2] : word[0], last ? word[3] : word[1], z0, z1);
    w = a.s * (row % 2 ? z1 : z0);
  }
  auto& x = static_cast<typename Storage::Cell*>(a.data)[cell];
  x = Storage::template store<Rounding::nearest>(Storage::load(x) + w, 0);
}

// The thread's segment and tile, and its work on them.
template <typename Work>
HOSFL_INLINE void run_thread(const Arguments& a, uint32_t block, uint32_t thread) {
  using Tile = typename Work::Tile;
  int t = 0;
  HOSFL_UNROLL
  for (int step = 32; step; step /= 2) {
    if (t + step < TENSORS && a.first_block[t + step] <= block) t += step;
  }
  const Tile tile = Tile::locate(a.segments[t], block - a.first_block[t], thread);
  if (!empty(tile.at, tile.n, Tile::ROWS, Tile::V)) Work::run(a, a.segments[t], tile);
}

// --- launches ---

using Queue = std::pair<int, uint64_t>;  // the device, and the cudaStream_t to launch on

#ifdef __CUDACC__
template <typename Work>
__global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Arguments a) {
  run_thread<Work>(a, blockIdx.x, threadIdx.x);
}

template <typename Storage, Dist D>
__global__ void __launch_bounds__(THREADS) rows_kernel(const __grid_constant__ RowsArguments a) {
  const int64_t cell = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (cell < a.n) perturb_cell<Storage, D>(a, cell);
}

__global__ void philox_kernel(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t* words) {
  uint32_t word[4];
  column_words(key, block, stream, tag, word);
  for (int k = 0; k < 4; ++k) words[k] = word[k];
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

cudaStream_t enter(const Queue& queue) {
  check(cudaSetDevice(queue.first));
  return reinterpret_cast<cudaStream_t>(queue.second);
}
#endif

template <typename Work>
void launch(const Arguments& a, uint32_t blocks, const Queue& queue) {
#ifdef __CUDACC__
  const cudaStream_t stream = enter(queue);
  kernel<Work><<<blocks, THREADS, 0, stream>>>(a);
  check(cudaGetLastError());
#else
  for (uint32_t block = 0; block < blocks; ++block) {
    for (uint32_t thread = 0; thread < THREADS; ++thread) run_thread<Work>(a, block, thread);
  }
#endif
}

// Launches Work on the segments of one dtype, TENSORS of them at a time.
template <typename Work>
void launch_all(const std::vector<Segment>& segments, Dtype dtype, Arguments a, const Queue& queue) {
  int count = 0;
  uint64_t blocks = 0;
  const auto flush = [&] {
    if (count) launch<Work>(a, uint32_t(blocks), queue);
    count = 0, blocks = 0;
  };
  for (const Segment& segment : segments) {
    if (segment.dtype != dtype || segment.n == 0) continue;
    const uint64_t more = uint64_t(Work::Tile::blocks(segment));
    if (more > 0x7FFFFFFFu) throw std::runtime_error("a tensor has more tiles than CUDA has blocks: cut it");
    if (count == TENSORS || blocks + more > 0x7FFFFFFFu) flush();
    if (count == 0) std::fill_n(a.first_block, TENSORS, 0xFFFFFFFFu);
    a.segments[count] = segment;
    a.first_block[count++] = uint32_t(blocks);
    blocks += more;
  }
  flush();
}

// Calls run(dtype, storage, rounding, dist) for every dtype, the last three as constants.
template <typename Run_>
void each_dtype(Dist dist, bool stochastic, Run_ run) {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    with_storage(dtype, stochastic, [&](auto storage, auto rounding) {
      with_dist(dist, [&](auto dist_) { run(dtype, storage, rounding, dist_); });
    });
  }
}

// --- Python's door: addresses on the device in, and the stream to launch on. Where CUDA refuses, RuntimeError. ---

// An array as it lies in memory, to be copied to the device.
template <typename T>
py::bytes bytes_of(const std::vector<T>& array) {
  return {reinterpret_cast<const char*>(array.data()), array.size() * sizeof(T)};
}

py::bytes records(const std::vector<uint64_t>& seeds, const std::vector<double>& coefficients,
                  const std::vector<uint64_t>& rounding_seeds) {
  return bytes_of(records_of(seeds, coefficients, rounding_seeds));
}

py::bytes steps(const std::vector<std::array<double, 3>>& rounds, const std::vector<uint64_t>& rounding_seeds) {
  return bytes_of(steps_of(rounds, rounding_seeds));
}

void philox(uint64_t address, uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, const Queue& queue) {
  auto* const words = reinterpret_cast<uint32_t*>(address);
  const uint64_t block = uint64_t(c1) << 32 | c0;
#ifdef __CUDACC__
  const cudaStream_t stream = enter(queue);
  philox_kernel<<<1, 1, 0, stream>>>(key, block, c2, c3, words);
  check(cudaGetLastError());
#else
  uint32_t word[4];
  column_words(key, block, c2, c3, word);
  std::copy(word, word + 4, words);
#endif
}

void noise(const Memory& out, uint64_t seed, const Place& place, const Queue& queue) {
  const auto segments = segments_of(out, place);
  Arguments a = {};
  a.record.seed = seed;
  with_dist(segments[0].dist, [&](auto dist) {
    launch_all<Noise<decltype(dist)::value>>(segments, Dtype::float32, a, queue);
  });
}

void perturb(const Memory& tensors, uint64_t seed, double scale, const Place& place,
             const std::vector<uint64_t>& rounding_seeds, const Queue& queue) {
  const auto segments = segments_of(tensors, place);
  Arguments a = {};
  a.record = records_of({seed}, {scale}, rounding_seeds)[0];
  each_dtype(segments[0].dist, !rounding_seeds.empty(), [&](Dtype dtype, auto storage, auto rounding, auto dist) {
    launch_all<Perturb<decltype(storage), decltype(rounding)::value, decltype(dist)::value>>(segments, dtype, a, queue);
  });
}

void perturb_rows(const Rows& rows, uint64_t seed, double scale, const Place& place, const Queue& queue) {
  const auto& [address, numbers, count, width, dtype] = rows;
  const Segment all = segments_of(Memory{{address}, {count * width}, {dtype}}, place)[0];
  const float s = records_of({seed}, {scale}, {})[0].coefficient * all.factor;
  const RowsArguments a = {all.data, reinterpret_cast<const int64_t*>(numbers), all.n, width, seed, all.stream, s};
  if ((a.n + THREADS - 1) / THREADS > 0x7FFFFFFF) throw std::runtime_error("more rows than CUDA has blocks: cut them");
  with_storage(all.dtype, false, [&](auto storage, auto) {
    with_dist(all.dist, [&](auto dist) {
#ifdef __CUDACC__
      const cudaStream_t stream = enter(queue);
      rows_kernel<decltype(storage), decltype(dist)::value>
          <<<uint32_t((a.n + THREADS - 1) / THREADS), THREADS, 0, stream>>>(a);
      check(cudaGetLastError());
#else
      for (int64_t cell = 0; cell < a.n; ++cell) perturb_cell<decltype(storage), decltype(dist)::value>(a, cell);
#endif
    });
  });
}

void replay(const Memory& tensors, uint64_t records, int64_t count, const Place& place, bool stochastic,
            const Queue& queue) {
  const auto segments = segments_of(tensors, place);
  Arguments a = {};
  a.records = reinterpret_cast<const Record*>(records), a.count = count;
  each_dtype(segments[0].dist, stochastic, [&](Dtype dtype, auto storage, auto rounding, auto dist) {
    launch_all<Replay<decltype(storage), decltype(rounding)::value, decltype(dist)::value>>(segments, dtype, a, queue);
  });
}

void update(const Memory& tensors, const std::vector<std::vector<uint64_t>>& moments, int rule,
            const std::vector<double>& constants, uint64_t records, int64_t count, uint64_t steps, int64_t rounds,
            const Place& place, bool stochastic, const Queue& queue) {
  auto segments = segments_of(tensors, place);
  add_moments(segments, moments);
  Arguments a = {};
  a.update = update_of(rule, constants, reinterpret_cast<const Record*>(records), count,
                       reinterpret_cast<const Step*>(steps), rounds, moments.size());
  with_rule(a.update.rule, [&](auto rule_) {
    constexpr Rule RULE = decltype(rule_)::value;
    each_dtype(segments[0].dist, stochastic, [&](Dtype dtype, auto storage, auto rounding, auto dist) {
      using Work = UpdateRounds<decltype(storage), decltype(rounding)::value, decltype(dist)::value, RULE>;
      launch_all<Work>(segments, dtype, a, queue);
    });
  });
}

}  // namespace
}  // namespace cuda
}  // namespace hosfl

PYBIND11_MODULE(_cuda, m) {
  using namespace hosfl::cuda;
  m.doc() = "The CUDA kernels. Use hosfl_kernels, which checks the arguments first.";
#ifdef __CUDACC__
  m.attr("EMULATED") = false;
#else
  m.attr("EMULATED") = true;
#endif
  m.def("records", &records);
  m.def("steps", &steps);
  m.def("philox", &philox);
  m.def("noise", &noise);
  m.def("perturb", &perturb);
  m.def("perturb_rows", &perturb_rows);
  m.def("replay", &replay);
  m.def("update", &update);
}
