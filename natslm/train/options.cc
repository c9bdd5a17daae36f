// SPDX-License-Identifier: Apache-2.0
#include "natslm/train/options.h"

#include <cmath>

#include "natslm/base/error.h"

namespace natslm::train {

void check(const Options& o) {
  const auto at_least = [](const char* name, auto value, auto least) {
    NATSLM_CHECK(value >= least, "--", name, " is ", value, "; it must be at least ", least);
  };
  at_least("steps", o.steps, 1);
  at_least("batch", o.batch, 1);
  at_least("micro-batch", o.micro_batch, 0);
  NATSLM_CHECK(o.micro_batch == 0 || o.batch % o.micro_batch == 0, "--micro-batch is ",
               o.micro_batch, "; it must divide --batch, which is ", o.batch);
  at_least("context", o.context, 2);
  at_least("warm-up", o.warm_up, 0);
  at_least("log-every", o.log_every, 1);
  at_least("validate-every", o.validate_every, 0);
  at_least("checkpoint-every", o.checkpoint_every, 0);
  at_least("keep-checkpoints", o.keep_checkpoints, 1);
  // Written so that NaN fails too.
  const auto positive = [](const char* name, double value) {
    NATSLM_CHECK(value > 0 && std::isfinite(value), "--", name, " is ", value,
                 "; it must be a number above 0");
  };
  const auto not_negative = [](const char* name, double value) {
    NATSLM_CHECK(value >= 0 && std::isfinite(value), "--", name, " is ", value,
                 "; it must be a number of at least 0");
  };
  const auto share = [](const char* name, double value, bool one_allowed) {
    NATSLM_CHECK(value >= 0 && (one_allowed ? value <= 1 : value < 1), "--", name, " is ", value,
                 "; it must be from 0 to ", one_allowed ? "1" : "below 1");
  };
  positive("lr", o.learning_rate);
  positive("role-lr", o.role_rate);
  share("final-lr", o.final_share, true);
  share("beta1", o.beta1, false);
  share("beta2", o.beta2, false);
  positive("epsilon", o.epsilon);
  not_negative("decay", o.decay);
  not_negative("clip", o.clip);
  not_negative("lambda", o.lambda);
  share("kv-budget", o.kv_budget, true);
  positive("control-gain", o.control_gain);
  positive("control-start", o.control_start);
  not_negative("bias-range", o.bias_range);
  NATSLM_CHECK(o.optimize == kJoint || o.optimize == kAlternating, "--optimize is ", o.optimize,
               "; choose ", kJoint, " or ", kAlternating);
  if (o.optimize == kAlternating) {
    NATSLM_CHECK(o.batch % 2 == 0, "--batch is ", o.batch, "; --optimize ", kAlternating,
                 " halves it, so it must be even");
    NATSLM_CHECK(
        o.micro_batch == 0 || o.micro_batch >= o.batch / 2 || (o.batch / 2) % o.micro_batch == 0,
        "--micro-batch is ", o.micro_batch, "; with --optimize ", kAlternating,
        " it must divide half of --batch, which is ", o.batch / 2);
  }
}

}  // namespace natslm::train
