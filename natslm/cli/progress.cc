// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/progress.h"

#include <algorithm>

#include "natslm/cli/table.h"

namespace natslm::cli {

namespace {

constexpr std::chrono::milliseconds kRedraw{100};
constexpr std::chrono::seconds kPlainLine{5};

// At most `columns` columns of a UTF-8 text.
std::string_view clipped(std::string_view text, int columns) {
  size_t end = 0;
  for (int used = 0; end < text.size(); ++end) {
    if ((text[end] & 0xC0) != 0x80 && used++ == columns) break;
  }
  return text.substr(0, end);
}

}  // namespace

Progress::Progress(std::string label, int64_t total, std::FILE* stream, const Terminal& terminal)
    : label_(std::move(label)), total_(total), stream_(stream), terminal_(terminal) {}

Progress::~Progress() {
  if (pending_) draw(true);
  if (visible_) std::fputc('\n', stream_);
  std::fflush(stream_);
}

void Progress::restart_at(int64_t done) {
  first_ = done_ = done;
  begin_ = Clock::now();
}

void Progress::update(int64_t done, std::string_view note) {
  done_ = done;
  note_ = note;
  pending_ = true;
  const auto since = Clock::now() - (drawn_ == Clock::time_point{} ? begin_ : drawn_);
  const bool first_bar = terminal_.interactive && !visible_;
  if (first_bar || (terminal_.interactive ? since >= kRedraw : since >= kPlainLine)) draw(false);
}

void Progress::print(std::string_view line) {
  clear_line();
  std::fprintf(stream_, "%.*s\n", static_cast<int>(line.size()), line.data());
  std::fflush(stream_);
  if (terminal_.interactive && pending_) draw(false);
}

void Progress::clear_line() {
  if (visible_) std::fputs("\r\x1b[K", stream_);
  visible_ = false;
}

void Progress::draw(bool last) {
  const double elapsed = std::chrono::duration<double>(Clock::now() - begin_).count();
  std::string text = label_ + " ";
  if (total_ > 0) {
    const double share = std::clamp(double(done_) / double(total_), 0.0, 1.0);
    if (terminal_.interactive) {
      constexpr int kBar = 24;
      const int filled = static_cast<int>(share * kBar);
      text += "[" + std::string(filled, '#') + std::string(kBar - filled, '.') + "] ";
    }
    text += std::to_string(done_) + "/" + std::to_string(total_);
    if (last || done_ >= total_) {
      text += " in " + duration(elapsed);
    } else if (done_ > first_) {
      text += " ETA " + duration(elapsed * double(total_ - done_) / double(done_ - first_));
    }
  } else {
    text += std::to_string(done_) + " in " + duration(elapsed);
  }
  if (!note_.empty()) text += "  " + note_;
  if (terminal_.interactive) {
    const std::string_view line = clipped(text, terminal_.width - 1);
    std::fprintf(stream_, "\r\x1b[K%.*s", static_cast<int>(line.size()), line.data());
    visible_ = true;
  } else {
    std::fprintf(stream_, "%s\n", text.c_str());
  }
  std::fflush(stream_);
  drawn_ = Clock::now();
  pending_ = false;
}

}  // namespace natslm::cli
