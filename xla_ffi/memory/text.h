// Numbers as people read them, for messages.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

namespace ellm {

// "1536 bytes", "64 KiB", "1.50 GiB": whole numbers stay whole.
inline std::string human_bytes(size_t bytes) {
  static constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  size_t scale = 1;
  while (unit < 4 && bytes / scale >= 1024 && (bytes % (scale * 1024) == 0 || bytes >> 20 != 0)) {
    scale *= 1024;
    ++unit;
  }
  char text[64];
  if (bytes % scale == 0) {
    std::snprintf(text, sizeof text, "%zu %s", bytes / scale, kUnits[unit]);
  } else {
    std::snprintf(text, sizeof text, "%.2f %s",
                  static_cast<double>(bytes) / static_cast<double>(scale), kUnits[unit]);
  }
  return text;
}

}  // namespace ellm
