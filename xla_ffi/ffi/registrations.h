// What Python registers with JAX.
#pragma once

#include <nanobind/nanobind.h>

namespace ellm {

// {FFI target name: capsule of its handler}.
nanobind::dict ffi_registrations();

}  // namespace ellm
