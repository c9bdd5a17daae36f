// Runs a function in a child process, so that a hang, a crash or a broken device of one part of a
// test leaves the others alone. The parent must not have used the GPU: CUDA does not survive a
// fork.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace natslm::test {

// What the child tells its parent, line by line.
class Messages {
 public:
  explicit Messages(int file) : file_(file) {}
  void doing(const std::string& what) { send('>', what); }  // named if the child then dies or hangs
  void failed(const std::string& text) { send('!', text); }
  void note(const std::string& text) { send(' ', text); }

 private:
  void send(char kind, const std::string& text);
  int file_;
};

struct IsolatedResult {
  std::vector<std::string> failures;  // a child that died or hung is one of them
  std::vector<std::string> notes;
  bool ended = false;  // the function returned
};

// A child that says nothing for `patience_s` seconds is killed. An exception is a failure. May be
// called from several threads at once. With NATSLM_GPU_ONE_PROCESS in the environment everything
// runs in this process and is never killed: for compute-sanitizer.
IsolatedResult run_isolated(const std::function<void(Messages&)>& body, int patience_s);

}  // namespace natslm::test
