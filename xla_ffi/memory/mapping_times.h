// What mapping costs on a driver: a measurement, not part of serving.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "memory/driver.h"

namespace ellm {

// Microseconds per chunk, one value per repeat, by what was called: "create" and "destroy"; "map",
// "set_access" and "unmap" chunk by chunk; the latter three with "_batched" as calls for all chunks
// side by side. "set_access" is there only where mapping does not include it (CUDA).
using MappingTimes = std::map<std::string, std::vector<double>>;

// Creates `count` chunks of `chunk_bytes`, maps and unmaps them one by one and then together, and
// destroys them; `repeats` times. Everything is given back, whatever happens. Errors: kInvalid
// (nothing to measure), the driver's.
Result<MappingTimes> time_mapping(Driver& driver, size_t chunk_bytes, size_t count, size_t repeats);

}  // namespace ellm
