// The ops for CUDA: one launch for up to 48 tensors of one dtype, one thread for one tile. HOSFL_CUDA=1 builds this
// with nvcc. What a thread does is a function of (block, thread) that a C++ compiler can run too: see cuda.h.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda.h"
#include "cuda_tile.h"

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

#ifdef __CUDACC__
template <typename Work>
__global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Arguments a) {
  run_thread<Work>(a, blockIdx.x, threadIdx.x);
}

__global__ void philox_kernel(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t* words) {
  uint32_t word[4];
  column_words(key, block, stream, tag, word);
  for (int k = 0; k < 4; ++k) words[k] = word[k];
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
#endif

template <typename Work>
void launch(const Arguments& a, uint32_t blocks, Queue queue) {
#ifdef __CUDACC__
  check(cudaSetDevice(queue.device));
  kernel<Work><<<blocks, THREADS, 0, reinterpret_cast<cudaStream_t>(queue.stream)>>>(a);
  check(cudaGetLastError());
#else
  for (uint32_t block = 0; block < blocks; ++block) {
    for (uint32_t thread = 0; thread < THREADS; ++thread) run_thread<Work>(a, block, thread);
  }
#endif
}

// Launches Work on the segments of one dtype, TENSORS of them at a time.
template <typename Work>
void launch_all(const std::vector<Segment>& segments, Dtype dtype, Arguments a, Queue queue) {
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

constexpr Dtype DTYPES[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

}  // namespace

bool emulated() {
#ifdef __CUDACC__
  return false;
#else
  return true;
#endif
}

void philox(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t* words, Queue queue) {
#ifdef __CUDACC__
  check(cudaSetDevice(queue.device));
  philox_kernel<<<1, 1, 0, reinterpret_cast<cudaStream_t>(queue.stream)>>>(key, block, stream, tag, words);
  check(cudaGetLastError());
#else
  uint32_t word[4];
  column_words(key, block, stream, tag, word);
  std::copy(word, word + 4, words);
#endif
}

void noise(const Segment& out, uint64_t seed, Dist dist, Queue queue) {
  Arguments a = {};
  a.record.seed = seed;
  if (dist == Dist::rademacher) {
    launch_all<Noise<Dist::rademacher>>({out}, Dtype::float32, a, queue);
  } else {
    launch_all<Noise<Dist::gaussian>>({out}, Dtype::float32, a, queue);
  }
}

void perturb(const std::vector<Segment>& segments, const Record& record, Dist dist, bool stochastic, Queue queue) {
  Arguments a = {};
  a.record = record;
  for (const Dtype dtype : DTYPES) {
    with_storage(dtype, stochastic, [&](auto storage, auto rounding) {
      using Storage = decltype(storage);
      constexpr Rounding R = decltype(rounding)::value;
      if (dist == Dist::rademacher) {
        launch_all<Perturb<Storage, R, Dist::rademacher>>(segments, dtype, a, queue);
      } else {
        launch_all<Perturb<Storage, R, Dist::gaussian>>(segments, dtype, a, queue);
      }
    });
  }
}

void replay(const std::vector<Segment>& segments, const Record* records, int64_t count, Dist dist, bool stochastic,
            Queue queue) {
  Arguments a = {};
  a.records = records, a.count = count;
  for (const Dtype dtype : DTYPES) {
    with_storage(dtype, stochastic, [&](auto storage, auto rounding) {
      using Storage = decltype(storage);
      constexpr Rounding R = decltype(rounding)::value;
      if (dist == Dist::rademacher) {
        launch_all<Replay<Storage, R, Dist::rademacher>>(segments, dtype, a, queue);
      } else {
        launch_all<Replay<Storage, R, Dist::gaussian>>(segments, dtype, a, queue);
      }
    });
  }
}

void update(const std::vector<Segment>& segments, const Update& update, Dist dist, bool stochastic, Queue queue) {
  Arguments a = {};
  a.update = update;
  for (const Dtype dtype : DTYPES) {
    with_storage(dtype, stochastic, [&](auto storage, auto rounding) {
      with_rule(update.rule, [&](auto rule) {
        using Storage = decltype(storage);
        constexpr Rounding R = decltype(rounding)::value;
        constexpr Rule RULE = decltype(rule)::value;
        if (dist == Dist::rademacher) {
          launch_all<UpdateRounds<Storage, R, Dist::rademacher, RULE>>(segments, dtype, a, queue);
        } else {
          launch_all<UpdateRounds<Storage, R, Dist::gaussian, RULE>>(segments, dtype, a, queue);
        }
      });
    });
  }
}

}  // namespace cuda
}  // namespace hosfl
