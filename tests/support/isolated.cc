// SPDX-License-Identifier: Apache-2.0
#include "tests/support/isolated.h"

#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "natslm/base/error.h"

namespace natslm::test {
namespace {

constexpr char kEnd = '\0';  // of a message; texts have several lines

// The messages in `text`, the unfinished rest left in it.
void take_messages(std::string& text, IsolatedResult& result, std::string& doing) {
  for (size_t end; (end = text.find(kEnd)) != std::string::npos; text.erase(0, end + 1)) {
    if (end == 0) continue;
    const std::string body = text.substr(1, end - 1);
    switch (text[0]) {
      case '>':
        doing = body;
        break;
      case '!':
        result.failures.push_back(body);
        break;
      case '.':
        result.ended = true;
        break;
      default:
        result.notes.push_back(body);
    }
  }
}

void call(int file, const std::function<void(Messages&)>& body) {
  Messages messages(file);
  try {
    body(messages);
  } catch (const std::exception& error) {
    messages.failed(error.what());
  }
  const char ended[2] = {'.', kEnd};
  static_cast<void>(!write(file, ended, sizeof ended));
}

[[noreturn]] void child(int file, const std::function<void(Messages&)>& body) {
  call(file, body);
  _exit(0);  // no destructors: a broken device may never answer them
}

// Without a child, for tools that watch one process: nothing is killed.
IsolatedResult run_here(const std::function<void(Messages&)>& body) {
  int ends[2];
  NATSLM_CHECK(pipe(ends) == 0, "pipe: ", std::strerror(errno));
  std::thread caller([&] {
    call(ends[1], body);
    close(ends[1]);
  });
  IsolatedResult result;
  std::string text, doing = "starting";
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) != 0;) {
    if (n < 0) continue;  // interrupted
    text.append(buffer, static_cast<size_t>(n));
    take_messages(text, result, doing);
  }
  caller.join();
  close(ends[0]);
  if (!result.failures.empty()) result.failures.back() += "\n  last at: " + doing;
  return result;
}

}  // namespace

void Messages::send(char kind, const std::string& text) {
  const std::string message = kind + text + kEnd;
  for (size_t sent = 0; sent < message.size();) {
    const ssize_t n = write(file_, message.data() + sent, message.size() - sent);
    if (n < 0 && errno != EINTR) _exit(1);  // the parent is gone
    if (n > 0) sent += static_cast<size_t>(n);
  }
}

IsolatedResult run_isolated(const std::function<void(Messages&)>& body, int patience_s) {
  if (std::getenv("NATSLM_GPU_ONE_PROCESS")) return run_here(body);
  // One at a time: a child must not inherit the writing end of another one's pipe, whose parent
  // would then not see that the other died.
  static std::mutex forking;
  int ends[2];
  pid_t pid = -1;
  {
    const std::lock_guard<std::mutex> lock(forking);
    NATSLM_CHECK(pipe(ends) == 0, "pipe: ", std::strerror(errno));
    std::fflush(nullptr);
    pid = fork();
    NATSLM_CHECK(pid >= 0, "fork: ", std::strerror(errno));
    if (pid == 0) {
      close(ends[0]);
      child(ends[1], body);
    }
    close(ends[1]);
  }

  IsolatedResult result;
  std::string text, doing = "starting";
  bool hung = false;
  for (;;) {
    pollfd wait{ends[0], POLLIN, 0};
    const int ready = poll(&wait, 1, patience_s * 1000);
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      hung = true;
      kill(pid, SIGKILL);
      break;
    }
    char buffer[4096];
    const ssize_t n = read(ends[0], buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(buffer, static_cast<size_t>(n));
    take_messages(text, result, doing);
  }
  close(ends[0]);
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (hung) {
    result.failures.push_back("HUNG for " + std::to_string(patience_s) + " s at: " + doing);
  } else if (!result.ended) {
    result.failures.push_back("DIED (" +
                              (WIFSIGNALED(status)
                                   ? "signal " + std::to_string(WTERMSIG(status))
                                   : "exit " + std::to_string(WEXITSTATUS(status))) +
                              ") at: " + doing);
  } else if (!result.failures.empty()) {
    result.failures.back() += "\n  last at: " + doing;
  }
  return result;
}

}  // namespace natslm::test
