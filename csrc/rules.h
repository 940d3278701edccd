// One step of one weight, by rule: the same operations, in the same order, as spec.py's `direction` and `update`.
#pragma once

#include <type_traits>

#include "noise.h"
#include "segment.h"

namespace hosfl {

HOSFL_INLINE constexpr int moments_of(Rule rule) { return rule == Rule::sgd ? 0 : rule == Rule::momentum ? 1 : 2; }

// The weight before its rounding to storage, given the sum g over the round's directions. Moments that the rule does
// not keep are not touched; k holds its constants.
template <Rule RULE>
HOSFL_INLINE float stepped(float x, float& m, float& v, float g, const float* k, const Step& step) {
  float d = g;
  if (RULE == Rule::momentum) d = m = k[0] * m + g;
  if (RULE == Rule::adamw) {
    m = k[0] * m + k[1] * g;
    v = k[2] * v + k[3] * (g * g);
    d = m / (sqrtf(v) * step.root + k[4]);
  }
  return x * step.keep - step.rate * d;
}

// Calls run(rule) with the rule as a constant.
template <typename Run_>
static inline void with_rule(Rule rule, Run_ run) {
  switch (rule) {
    case Rule::sgd:
      return run(std::integral_constant<Rule, Rule::sgd>{});
    case Rule::momentum:
      return run(std::integral_constant<Rule, Rule::momentum>{});
    case Rule::adamw:
      return run(std::integral_constant<Rule, Rule::adamw>{});
  }
}

}  // namespace hosfl
