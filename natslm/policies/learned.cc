// SPDX-License-Identifier: Apache-2.0
#include "natslm/policies/learned.h"

#include <ATen/ops/linear.h>

#include <algorithm>

#include "natslm/base/error.h"
#include "natslm/policies/demotion.h"
#include "natslm/roles/streaming_lifetimes.h"

namespace natslm::policies {

Learned::Learned(const roles::Options& options, double bias, bool record)
    : options_(options), bias_(bias), record_(record) {
  roles::check(options);
}

Learned::Learned(const roles::Options& options, double bias, bool record, const KeyBudget& budget,
                 const cache::Shape& shape, std::span<const float> layer_shares)
    : Learned(options, bias, record) {
  if (budget.share == 0 && budget.keys == 0) return;
  budget_ = budget;
  demotion_ =
      std::make_unique<Demotion>(KeyCap(budget, shape, options, layer_shares), shape, options);
}

Learned::~Learned() = default;

std::string Learned::spec() const {
  return "learned:bias=" + shortest(bias_) +
         (budget_.share > 0 ? ",budget=" + shortest(budget_.share) : "") +
         (budget_.keys > 0 ? ",keys=" + std::to_string(budget_.keys) : "");
}

Learned::State& Learned::state(int32_t slot, int32_t layer, int64_t heads) {
  if (std::ssize(states_) <= slot) states_.resize(slot + 1);
  if (std::ssize(states_[slot]) <= layer) states_[slot].resize(layer + 1);
  State& state = states_[slot][layer];
  state.pending.resize(heads * roles::kRoles, 0.0f);
  if (record_) state.roles.resize(heads);
  return state;
}

// Gives the tokens first..final of one head the lifetime of their role. Those before the fresh ones
// are already stored, as readable as a Global.
void Learned::decide(const cache::NewKeys& fresh, roles::Role role, int32_t first, int32_t final,
                     int32_t* last, cache::StoredKeys& stored) const {
  const int32_t begin = fresh.first_position;
  const int32_t end = roles::arriving_last(role, final, options_.window);
  if (role == roles::kGlobal) {
    cache::end_open(stored, final);
    for (int32_t j = begin; j < first; ++j) {
      if (last[j - begin] == kOpenEnded) last[j - begin] = final;
    }
    return;  // a Global keeps the "for ever" it came with
  }
  if (first < begin) {
    for (size_t j = 0; j < stored.position.size(); ++j) {
      if (stored.position[j] >= first) stored.last[j] = end;
    }
  }
  std::fill(last + std::max(first, begin) - begin, last + final - begin + 1, end);
}

void Learned::on_append(cache::NewKeys& fresh, std::span<cache::StoredKeys> stored) {
  const int64_t heads = fresh.last.size(0), n = fresh.last.size(1);
  NATSLM_CHECK(fresh.score_weight.defined() && fresh.hidden.defined(),
               "policy learned: the model has no score layer; use another policy, such as full, or "
               "train its roles first");
  NATSLM_CHECK(fresh.score_weight.size(0) == heads * roles::kRoles,
               "policy learned: a score layer of ", fresh.score_weight.size(0),
               " rows does not fit ", heads, " KV heads");
  const at::Tensor logits =
      at::linear(fresh.hidden.to(at::kFloat), fresh.score_weight.to(at::kFloat)).cpu().contiguous();
  const float* row = logits.const_data_ptr<float>();
  int32_t* last = fresh.last.mutable_data_ptr<int32_t>();
  State& state = this->state(fresh.slot, fresh.layer, heads);
  if (demotion_) demotion_->begin(fresh, stored);

  for (int64_t t = 0; t < n; ++t, row += heads * roles::kRoles) {
    const int32_t position = fresh.first_position + static_cast<int32_t>(t);
    for (int64_t i = 0; i < heads * roles::kRoles; ++i) state.pending[i] += row[i];
    const bool complete = (position + 1) % options_.chunk == 0;
    const int32_t first = position - position % options_.chunk;
    if (demotion_) demotion_->arrive(position);
    for (int32_t h = 0; h < heads; ++h) {
      if (record_) state.roles[h].push_back(kUndecided);
      if (!complete) continue;
      float mean[roles::kRoles];
      for (int r = 0; r < roles::kRoles; ++r) {
        mean[r] = state.pending[h * roles::kRoles + r] / static_cast<float>(options_.chunk);
      }
      const auto bias = static_cast<float>(bias_);
      const roles::Role role =
          first == 0 ? roles::kGlobal : roles::best_role(mean, options_.set, bias);
      if (demotion_) {
        demotion_->decided(h, role, certainty(mean, role, options_.set, bias), first);
      }
      decide(fresh, role, first, position, last + h * n, stored[h]);
      if (record_) std::fill(state.roles[h].end() - options_.chunk, state.roles[h].end(), role);
    }
    if (complete) std::ranges::fill(state.pending, 0.0f);
    if (demotion_) demotion_->settle();
  }
}

int64_t Learned::key_cap(int32_t query) const {
  return demotion_ ? demotion_->cap().total(query) : 0;
}

int64_t Learned::demoted(int32_t slot) const {
  return demotion_ ? demotion_->demoted(slot) : 0;
}

void Learned::reset(int32_t slot) {
  if (demotion_) demotion_->reset(slot);
  if (slot < std::ssize(states_)) states_[slot].clear();
}

std::vector<int8_t> Learned::role_of(int32_t slot, int32_t layer, int32_t head) const {
  NATSLM_CHECK(record_, "policy learned: roles are only kept when asked for at construction");
  if (slot >= std::ssize(states_) || layer >= std::ssize(states_[slot])) return {};
  const State& state = states_[slot][layer];
  return head < std::ssize(state.roles) ? state.roles[head] : std::vector<int8_t>();
}

std::unique_ptr<cache::Policy> make_learned(const Spec& spec, const PolicyContext& context) {
  NATSLM_CHECK(context.roles.set != roles::RoleSet::kDense,
               "policy learned: this model was trained without roles; use another policy, such as "
               "full, or give it a role side-car");
  const KeyBudget budget{spec.number("budget", 0, 0, 1), spec.integer("keys", 0, 0, kMaxPosition)};
  double bias = context.bias;
  std::span<const float> layer_shares;
  if (context.calibration != nullptr) {
    roles::check(*context.calibration, context.shape.layers);
    layer_shares = context.calibration->layer_shares;
    const double all = double(context.context) * context.shape.layers * context.shape.kv_heads;
    const double share = budget.share > 0 ? budget.share : all > 0 ? budget.keys / all : 0;
    if (share > 0) bias = context.calibration->bias_for(share);
  }
  bias = spec.number("bias", bias, -1e6, 1e6);
  return std::make_unique<Learned>(context.roles, bias, context.record_roles, budget, context.shape,
                                   layer_shares);
}

}  // namespace natslm::policies
