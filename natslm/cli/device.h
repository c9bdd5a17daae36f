// Where a command computes: --device cpu or cuda, and what there is to say about a GPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/Device.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <string>

namespace natslm::cli {

// Adds --device cpu|cuda.
void add_device_option(CLI::App& command, std::string& name);

// The device of that name. Throws Error, one line with the remedy, if it cannot be used: a build
// without CUDA, no GPU, a driver older than the runtime, a GPU older than the kernels.
c10::Device device_from(const std::string& name);

// The first GPU.
struct GpuFacts {
  std::string problem;  // why it cannot be used; the rest may be empty then
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t memory = 0, free_memory = 0;  // bytes
  int driver = 0, runtime = 0;          // CUDA's version number: 13000 is 13.0
  std::string kernel_driver;            // "580.159.03"; empty if unknown
};
GpuFacts gpu_facts();
// "" if the GPU can be used, otherwise why not and the remedy.
std::string gpu_problem(const GpuFacts& facts);
// The multiprocessors' clock now, MHz; 0 if unknown.
int gpu_clock_mhz();

// "cpu, 2 threads, AMD EPYC" or "NVIDIA H200, 132 multiprocessors, driver 580.159.03".
std::string device_description(const c10::Device& device);

// Milliseconds of `times` calls one after the other, by the device's own events on a GPU.
double milliseconds(const c10::Device& device, const std::function<void()>& call, int64_t times);

}  // namespace natslm::cli
