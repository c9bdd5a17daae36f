// Runs the built program as a user would: a process of its own, its exit code and what it wrote.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/scratch_folder.h"

namespace natslm::test {

struct Outcome {
  int exit_code = -1;  // 128 + n if signal n ended it
  std::string out, err;
};

// A program that runs on while the test does something, for example sends it a signal.
class Program {
 public:
  // Starts nats-lm with these arguments; standard input is `input`.
  explicit Program(const std::vector<std::string>& arguments, const std::string& input = "");
  ~Program();  // kills it if it still runs
  void signal(int number) const;
  // What it wrote to standard error so far.
  std::string err_so_far() const;
  Outcome wait();

 private:
  ScratchFolder scratch_;
  pid_t pid_ = -1;
};

inline Outcome run_program(const std::vector<std::string>& arguments,
                           const std::string& input = "") {
  return Program(arguments, input).wait();
}

std::string read_file(const std::filesystem::path& path);
void write_file(const std::filesystem::path& path, const std::string& text);
// Lines without their newlines; a last line without one counts.
std::vector<std::string> lines_of(const std::string& text);

}  // namespace natslm::test
