// SPDX-License-Identifier: Apache-2.0
#include "natslm/cli/lifetimes_view.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "natslm/base/error.h"
#include "natslm/cli/table.h"
#include "natslm/cli/utf8.h"
#include "natslm/roles/roles.h"

namespace natslm::cli {
namespace {

constexpr int kNoRole = roles::kRoles;  // the place after the roles
constexpr int kKinds = roles::kRoles + 1;

// How strongly a token is drawn: by the share of the heads that still hold it.
enum Strength { kEvicted, kFew, kSome, kMost };

Strength strength_of(double share_alive) {
  if (share_alive <= 0) return kEvicted;
  if (share_alive < 1.0 / 3) return kFew;
  return share_alive < 2.0 / 3 ? kSome : kMost;
}

// Select Graphic Rendition codes, [kind][strength]. Orange, blue, grey, green: apart from each
// other in brightness too, for those who see colours differently.
constexpr const char* kCodes256[kKinds][4] = {
    {"38;5;136", "1;38;5;214", "1;38;5;223;48;5;94", "1;38;5;16;48;5;214"},
    {"38;5;31", "1;38;5;81", "1;38;5;159;48;5;24", "1;38;5;16;48;5;81"},
    {"38;5;244", "38;5;252", "1;38;5;255;48;5;240", "1;38;5;16;48;5;252"},
    {"38;5;65", "1;38;5;114", "1;38;5;157;48;5;22", "1;38;5;16;48;5;114"},
};
constexpr const char* kCodes16[kKinds][4] = {
    {"33", "1;33", "1;4;33", "30;43"},
    {"36", "1;36", "1;4;36", "30;46"},
    {"90", "37", "1;4;37", "30;47"},
    {"32", "1;32", "1;4;32", "30;42"},
};
constexpr char kMarks[kKinds][2] = {{'g', 'G'}, {'l', 'L'}, {'s', 'S'}, {'.', '#'}};
constexpr const char* kNames[kKinds] = {"Global", "Local", "Sliding window", "kept"};

class Painter {
 public:
  explicit Painter(Palette palette) : palette_(palette) {}
  bool colours() const { return palette_ != Palette::kPlain; }
  std::string operator()(std::string_view text, int kind, Strength strength) const {
    return with(text, (palette_ == Palette::k256 ? kCodes256 : kCodes16)[kind][strength]);
  }
  std::string bold(std::string_view text) const { return with(text, "1"); }
  std::string faint(std::string_view text) const {
    return with(text, palette_ == Palette::k256 ? "38;5;245" : "90");
  }

 private:
  std::string with(std::string_view text, const char* code) const {
    if (!colours()) return std::string(text);
    return std::string("\x1b[") + code + "m" + std::string(text) + "\x1b[0m";
  }
  Palette palette_;
};

struct Look {
  int kind = kNoRole;
  Strength strength = kEvicted;
};

// Roles come from the policy; where it gives none (or none yet) only life and death are drawn.
int kind_of(const HeadLifetimes& head, size_t token) {
  if (token >= head.role.size() || head.role[token] < 0) return kNoRole;
  return head.role[token];
}

Look look_of(const std::vector<const HeadLifetimes*>& heads, size_t token) {
  std::array<int, kKinds> all{}, living{};
  int alive = 0;
  for (const HeadLifetimes* head : heads) {
    const int kind = kind_of(*head, token);
    ++all[kind];
    if (head->alive[token] != 0) {
      ++living[kind];
      ++alive;
    }
  }
  const auto& votes = alive > 0 ? living : all;
  const int kind = static_cast<int>(std::ranges::max_element(votes) - votes.begin());
  return {kind, strength_of(static_cast<double>(alive) / static_cast<double>(heads.size()))};
}

// A character as drawn.
struct Cell {
  std::string text;
  int32_t columns = 1;
  size_t token = 0;
  bool ends_line = false;
};

std::vector<Cell> cells_of(const std::vector<std::string>& tokens) {
  std::string bytes;
  std::vector<size_t> token_of;  // of each byte
  for (size_t token = 0; token < tokens.size(); ++token) {
    bytes += tokens[token];
    token_of.resize(bytes.size(), token);
  }
  std::vector<Cell> cells;
  for (size_t at = 0; at < bytes.size();) {
    const Character character = character_at(bytes, at);
    Cell cell;
    cell.token = token_of[at];
    if (character.value == '\n') {
      cell.text = "\xE2\x86\xB5";  // the return arrow: a newline's key is a key too
      cell.ends_line = true;
    } else if (character.value == '\t') {
      cell.text = "    ";
      cell.columns = 4;
    } else {
      cell.text = printable(std::string_view(bytes).substr(at, character.bytes));
      cell.columns = columns_of(character.value);
    }
    cells.push_back(std::move(cell));
    at += character.bytes;
  }
  return cells;
}

// Lines of cells [begin, end): at newlines, and before a token that would not fit.
std::vector<std::pair<size_t, size_t>> lines_of(const std::vector<Cell>& cells, int32_t width) {
  std::vector<std::pair<size_t, size_t>> lines;
  size_t begin = 0, token_begin = 0;
  int32_t used = 0, token_used = 0;  // columns of the line, and of its last token
  for (size_t i = 0; i < cells.size(); ++i) {
    if (i == begin || cells[i].token != cells[i - 1].token) {
      token_begin = i;
      token_used = 0;
    }
    used += cells[i].columns;
    token_used += cells[i].columns;
    if (used > width && i > begin) {
      // A token longer than half a line is cut, others go to the next line whole.
      const size_t cut = token_begin > begin && token_used <= width / 2 ? token_begin : i;
      lines.emplace_back(begin, cut);
      begin = cut;
      used = 0;
      for (size_t j = cut; j <= i; ++j) used += cells[j].columns;
    }
    if (cells[i].ends_line) {
      lines.emplace_back(begin, i + 1);
      begin = i + 1;
      used = 0;
    }
  }
  if (begin < cells.size()) lines.emplace_back(begin, cells.size());
  return lines;
}

std::string painted_line(const std::vector<Cell>& cells, std::pair<size_t, size_t> line,
                         const std::vector<Look>& looks, const Painter& paint) {
  std::string text = "  ";
  for (size_t i = line.first; i < line.second;) {
    const Look look = looks[cells[i].token];
    std::string run;
    for (; i < line.second && looks[cells[i].token].kind == look.kind &&
           looks[cells[i].token].strength == look.strength;
         ++i) {
      run += cells[i].text;
    }
    text += paint(run, look.kind, look.strength);
  }
  return text + "\n";
}

// Under the text, at each token's first column: its role, a capital if most of the heads hold it.
std::string marks_line(const std::vector<Cell>& cells, std::pair<size_t, size_t> line,
                       const std::vector<Look>& looks) {
  std::string marks = "  ";
  for (size_t i = line.first; i < line.second; ++i) {
    const bool begins = i == line.first || cells[i].token != cells[i - 1].token;
    const Look look = looks[cells[i].token];
    std::string mark(cells[i].columns, ' ');
    if (begins && !mark.empty()) mark[0] = kMarks[look.kind][look.strength >= kSome];
    marks += mark;
  }
  marks.resize(marks.find_last_not_of(' ') + 1);
  return marks + "\n";
}

std::string legend(const std::array<bool, kKinds>& present, bool many, const Painter& paint) {
  std::string line = "  ";
  for (int kind = 0; kind < kKinds; ++kind) {
    if (!present[kind]) continue;
    if (paint.colours()) {
      line += paint(std::string(" ") + kNames[kind] + " ", kind, kMost) + " ";
      if (kind != roles::kGlobal) line += paint("evicted", kind, kEvicted);  // a Global never is
      line += "   ";
    } else {
      line += std::string(1, kMarks[kind][1]) + "/" + kMarks[kind][0] + " " + kNames[kind] + "   ";
    }
  }
  if (!paint.colours()) line += "capital: alive at the end";
  line.resize(line.find_last_not_of(' ') + 1);
  line += "\n";
  if (many && paint.colours()) {
    const int kind = present[roles::kGlobal] ? int{roles::kGlobal} : kNoRole;
    line += "  alive in " + paint(" most ", kind, kMost) + " " + paint(" some ", kind, kSome) +
            " " + paint("few", kind, kFew) + " " + paint("none", kind, kEvicted) +
            " of the heads; colour: its commonest role\n";
  } else if (many) {
    line += "  over all heads: the role in most heads that hold it; alive: in a third or more\n";
  }
  return line;
}

// Live tokens of a head by kind.
std::array<int64_t, kKinds> living(const HeadLifetimes& head) {
  std::array<int64_t, kKinds> counts{};
  for (size_t token = 0; token < head.alive.size(); ++token) {
    if (head.alive[token] != 0) ++counts[kind_of(head, token)];
  }
  return counts;
}

int64_t sum(const std::array<int64_t, kKinds>& counts) {
  int64_t total = 0;
  for (const int64_t count : counts) total += count;
  return total;
}

// A stacked bar of `cells` columns that stands for `scale` of the tokens.
std::string bar(const std::array<int64_t, kKinds>& counts, int64_t tokens, double scale,
                int32_t cells, const Painter& paint) {
  std::string text;
  int64_t counted = 0, drawn = 0;
  for (int kind = 0; kind < kKinds; ++kind) {
    counted += counts[kind];
    const double share = static_cast<double>(counted) / static_cast<double>(tokens);
    const int64_t end = std::min<int64_t>(cells, std::llround(share / scale * cells));
    if (end > drawn) {
      std::string run;
      for (int64_t i = drawn; i < end; ++i)
        run += paint.colours() ? "\xE2\x96\x88" : std::string(1, kMarks[kind][1]);
      // The colour of the block is that of the highlighter.
      text += paint.colours() ? paint(run, kind, kFew) : run;
      drawn = end;
    }
  }
  std::string rest;
  for (int64_t i = drawn; i < cells; ++i) rest += "\xC2\xB7";
  return text + paint.faint(rest);
}

std::string right(std::string text, size_t width) {
  return text.size() < width ? std::string(width - text.size(), ' ') + text : text;
}

std::string percent_of(int64_t count, int64_t total) {
  return percent(static_cast<double>(count) / static_cast<double>(total));
}

std::string heads_picture(const LifetimesPicture& picture, int32_t width, const Painter& paint) {
  const int64_t tokens = static_cast<int64_t>(picture.tokens.size());
  const size_t layers = picture.heads.size(), heads = picture.heads[0].size();
  int64_t highest = 0, total = 0;
  for (const auto& layer : picture.heads) {
    for (const HeadLifetimes& head : layer) {
      const int64_t alive = sum(living(head));
      highest = std::max(highest, alive);
      total += alive;
    }
  }
  const double top = static_cast<double>(highest) / static_cast<double>(tokens);
  const double scale = top <= 0.1 ? 0.1 : top <= 0.25 ? 0.25 : top <= 0.5 ? 0.5 : 1.0;

  constexpr int32_t kLabel = 11, kNumber = 8;
  const int32_t share = (width - kLabel) / static_cast<int32_t>(heads);
  const int32_t cells = std::min(32, share - kNumber - 2);
  const bool bars = cells >= 6;
  std::string text = "  " + paint.bold("Alive at the end") + ": " +
                     percent_of(total, tokens * static_cast<int64_t>(layers * heads)) + " of " +
                     std::to_string(tokens) + " tokens, " + std::to_string(layers) + " x " +
                     std::to_string(heads) + " heads" +
                     (bars ? "; a full bar is " + percent(scale, 0) : "") + "\n";
  if (bars) {
    std::string names(kLabel, ' ');
    for (size_t head = 0; head < heads; ++head) {
      std::string name = "KV head " + std::to_string(head);
      name.resize(cells + kNumber + 2, ' ');
      names += name;
    }
    names.resize(names.find_last_not_of(' ') + 1);
    text += paint.faint(names) + "\n";
  }
  for (size_t layer = 0; layer < layers; ++layer) {
    text += "  " + paint.faint("layer " + right(std::to_string(layer), 2)) + " ";
    int64_t of_layer = 0;
    for (const HeadLifetimes& head : picture.heads[layer]) {
      const auto counts = living(head);
      of_layer += sum(counts);
      if (bars) {
        text += bar(counts, tokens, scale, cells, paint) +
                right(percent_of(sum(counts), tokens), kNumber) + "  ";
      } else {
        text += right(std::to_string(std::llround(100.0 * static_cast<double>(sum(counts)) /
                                                  static_cast<double>(tokens))),
                      4);
      }
    }
    if (!bars)
      text += paint.faint("  mean " + percent_of(of_layer, tokens * static_cast<int64_t>(heads)));
    text.resize(text.find_last_not_of(' ') + 1);
    text += "\n";
  }
  if (!bars) text += "  " + paint.faint("one number a KV head, per cent") + "\n";
  return text;
}

}  // namespace

Palette palette_of(bool colour) {
  if (!colour) return Palette::kPlain;
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  const bool many = variable("TERM").find("256color") != std::string::npos ||
                    variable("TERM").find("direct") != std::string::npos ||
                    !variable("COLORTERM").empty();
  return many ? Palette::k256 : Palette::k16;
}

int32_t columns_of(char32_t c) {
  struct Range {
    char32_t first, last;
  };
  // Combining marks, joiners and variation selectors; then East Asian wide and emoji blocks
  // (Unicode Standard Annex 11, blocks only).
  constexpr Range kNone[] = {
      {0x300, 0x36F},   {0x483, 0x489},   {0x591, 0x5BD},   {0x610, 0x61A},   {0x64B, 0x65F},
      {0x200B, 0x200F}, {0x20D0, 0x20FF}, {0xFE00, 0xFE0F}, {0xFE20, 0xFE2F}, {0xE0100, 0xE01EF}};
  constexpr Range kWide[] = {
      {0x1100, 0x115F},   {0x231A, 0x231B},   {0x2E80, 0x303E},   {0x3041, 0x33FF},
      {0x3400, 0x4DBF},   {0x4E00, 0x9FFF},   {0xA000, 0xA4CF},   {0xAC00, 0xD7A3},
      {0xF900, 0xFAFF},   {0xFE30, 0xFE6F},   {0xFF00, 0xFF60},   {0xFFE0, 0xFFE6},
      {0x1F300, 0x1F64F}, {0x1F680, 0x1F6FF}, {0x1F900, 0x1F9FF}, {0x20000, 0x3FFFD}};
  const auto in = [c](const Range& range) { return c >= range.first && c <= range.last; };
  if (std::ranges::any_of(kNone, in)) return 0;
  return std::ranges::any_of(kWide, in) ? 2 : 1;
}

std::string printable(std::string_view text) {
  std::string safe;
  for (size_t at = 0; at < text.size();) {
    const Character character = character_at(text, at);
    const char32_t c = character.value;
    const bool control = (c < 0x20 && c != '\n' && c != '\t') || (c >= 0x7F && c < 0xA0);
    if (control || (c == kReplacement && character.bytes == 1)) {
      safe += "\xEF\xBF\xBD";
    } else {
      safe += text.substr(at, character.bytes);
    }
    at += character.bytes;
  }
  return safe;
}

std::string draw_lifetimes(const LifetimesPicture& picture, const ViewOptions& options) {
  NATSLM_CHECK(!picture.tokens.empty() && !picture.heads.empty() && !picture.heads[0].empty(),
               "there is nothing to draw: no token went through the model");
  const int32_t layers = static_cast<int32_t>(picture.heads.size());
  const int32_t heads = static_cast<int32_t>(picture.heads[0].size());
  NATSLM_CHECK(options.layer < layers && options.head < heads, "layer ", options.layer,
               ", KV head ", options.head, " is not there: the model has layers 0 to ", layers - 1,
               " with KV heads 0 to ", heads - 1);
  const Painter paint(options.palette);
  const int32_t width = std::clamp(options.width, 40, 120) - 4;

  std::vector<const HeadLifetimes*> shown;
  for (int32_t layer = 0; layer < layers; ++layer) {
    for (int32_t head = 0; head < heads; ++head) {
      const bool wanted = (options.layer < 0 || options.layer == layer) &&
                          (options.head < 0 || options.head == head);
      if (wanted) shown.push_back(&picture.heads[layer][head]);
    }
  }
  std::vector<Look> looks(picture.tokens.size());
  std::array<bool, kKinds> present{};
  for (size_t token = 0; token < looks.size(); ++token) {
    looks[token] = look_of(shown, token);
    present[looks[token].kind] = true;
  }
  for (const auto& layer : picture.heads) {  // what only the bars show
    for (const HeadLifetimes& head : layer) {
      const auto counts = living(head);
      for (int kind = 0; kind < kKinds; ++kind) present[kind] = present[kind] || counts[kind] > 0;
    }
  }

  std::string where = "all layers and KV heads";
  if (shown.size() == 1) {
    where = "layer " + std::to_string(options.layer) + ", KV head " + std::to_string(options.head);
  } else if (options.layer >= 0) {
    where = "layer " + std::to_string(options.layer) + ", all KV heads";
  } else if (options.head >= 0) {
    where = "KV head " + std::to_string(options.head) + " of all layers";
  }
  std::string text = "  " + paint.bold("Lifetimes of keys") + ", " + where + "\n";
  text += legend(present, shown.size() > 1, paint) + "\n";

  const std::vector<Cell> cells = cells_of(picture.tokens);
  const auto lines = lines_of(cells, width);
  const int64_t count = static_cast<int64_t>(lines.size());
  const int64_t head_lines = options.max_lines / 3, tail_lines = options.max_lines - head_lines;
  for (int64_t i = 0; i < count; ++i) {
    if (count > options.max_lines && i == head_lines) {
      text += "  " +
              paint.faint("... " + std::to_string(count - head_lines - tail_lines) +
                          " lines left out ...") +
              "\n";
      i = count - tail_lines;
    }
    text += painted_line(cells, lines[i], paint.colours() ? looks : std::vector<Look>(looks.size()),
                         paint);
    if (!paint.colours()) text += marks_line(cells, lines[i], looks);
  }
  return text + "\n" + heads_picture(picture, width, paint);
}

}  // namespace natslm::cli
