// Rows grouped by class on the CPU, by a stable counting sort of their indices.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pudnet {

// Row indices, class by class: those of class k are order[start[k]] .. order[start[k + 1] - 1]; unlabelled rows come last,
// as class K.
struct Groups {
  std::vector<std::int64_t> order, start;
};

// Throws std::invalid_argument, in the name of `where`, on a label that is neither in 0..K-1 nor -1.
inline Groups group_rows(const char* where, const std::int64_t* labels, std::int64_t n, std::int64_t classes) {
  Groups groups;
  groups.order.resize(n);
  groups.start.assign(classes + 2, 0);
  const auto class_of = [&](std::int64_t row) { return labels[row] < 0 ? classes : labels[row]; };
  for (std::int64_t row = 0; row < n; ++row) {
    if (labels[row] < -1 || labels[row] >= classes) {
      throw std::invalid_argument(std::string(where) + ": labels must be in 0.." + std::to_string(classes - 1) +
                                  ", or -1 for a row of no class; got " + std::to_string(labels[row]) + " in row " +
                                  std::to_string(row) + ".");
    }
    ++groups.start[class_of(row) + 1];
  }
  for (std::int64_t k = 0; k <= classes; ++k) groups.start[k + 1] += groups.start[k];
  std::vector<std::int64_t> next(groups.start.begin(), groups.start.end() - 1);
  for (std::int64_t row = 0; row < n; ++row) groups.order[next[class_of(row)]++] = row;
  return groups;
}

}  // namespace pudnet
