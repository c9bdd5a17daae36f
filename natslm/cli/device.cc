// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/device.h"

#include <ATen/Parallel.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <fstream>

#include "natslm/base/error.h"

namespace natslm::cli {

namespace {

constexpr int kOldestMajor = 8;  // compute capability of the portable kernels

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown model";
}

}  // namespace

void add_device_option(CLI::App& command, std::string& name) {
  command.add_option("--device", name, "where to compute")->check(CLI::IsMember({"cpu", "cuda"}));
}

std::string gpu_problem(const GpuFacts& facts) {
  if (!facts.problem.empty()) return facts.problem;
  if (facts.driver < facts.runtime) {
    return "the driver is for CUDA " + version_text(facts.driver) + ", this build needs " +
           version_text(facts.runtime) + ": update the driver";
  }
  if (facts.major < kOldestMajor) {
    return facts.name + " has compute capability " + std::to_string(facts.major) + "." +
           std::to_string(facts.minor) + "; the kernels need 8.0 or later";
  }
  return "";
}

c10::Device device_from(const std::string& name) {
  if (name == "cpu") return c10::Device(c10::kCPU);
  const std::string problem = gpu_problem(gpu_facts());
  NATSLM_CHECK(problem.empty(), "--device cuda: ", problem);
  return c10::Device(c10::kCUDA, 0);
}

std::string device_description(const c10::Device& device) {
  if (device.is_cuda()) {
    const GpuFacts facts = gpu_facts();
    return facts.name + ", " + std::to_string(facts.multiprocessors) + " multiprocessors" +
           (facts.kernel_driver.empty() ? "" : ", driver " + facts.kernel_driver);
  }
  const int threads = at::get_num_threads();
  return "cpu, " + std::to_string(threads) + (threads == 1 ? " thread, " : " threads, ") +
         cpu_model();
}

double milliseconds(const c10::Device& device, const std::function<void()>& call, int64_t times) {
  if (device.is_cuda()) {
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    c10::Event begin(device.type(), c10::EventFlag::BACKEND_DEFAULT);
    c10::Event end(device.type(), c10::EventFlag::BACKEND_DEFAULT);
    begin.record(stream);
    for (int64_t i = 0; i < times; ++i) call();
    end.record(stream);
    end.synchronize();
    return begin.elapsedTime(end);
  }
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < times; ++i) call();
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - begin;
  return spent.count();
}

}  // namespace natslm::cli
