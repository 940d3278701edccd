// The CUDA kernels as their bindings see them: tensors on the device, a stream, records in the device's memory.
// Compiled by nvcc these launch kernels; compiled by another compiler they run the same thread bodies one by one.
#pragma once

#include <vector>

#include "ops.h"

namespace hosfl {
namespace cuda {

bool emulated();  // whether this is the other compiler's

struct Queue {
  int device;
  uint64_t stream;  // a cudaStream_t
};

// All throw std::runtime_error if CUDA refuses.
void philox(uint64_t key, uint64_t block, uint32_t stream, uint32_t tag, uint32_t* words, Queue queue);
void noise(const Segment& out, uint64_t seed, Dist dist, Queue queue);
void perturb(const std::vector<Segment>& segments, const Record& record, Dist dist, bool stochastic, Queue queue);
void replay(const std::vector<Segment>& segments, const Record* records, int64_t count, Dist dist, bool stochastic,
            Queue queue);
void update(const std::vector<Segment>& segments, const Update& update, Dist dist, bool stochastic, Queue queue);

}  // namespace cuda
}  // namespace hosfl
