"""Makes the C++ headers that a Python installation carries available to Bazel."""

_FIND = """
import importlib.util, pathlib, sysconfig
def home(package):
    spec = importlib.util.find_spec(package)
    return pathlib.Path(spec.origin).parent if spec else ""
print(sysconfig.get_path("include"), home("nanobind"), home("jaxlib"), sep=chr(10))
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob([
        "nanobind/include/**/*.h",
        "nanobind/ext/robin_map/include/**/*.h",
    ]),
    copts = [
        "-DNDEBUG",
        "-fno-strict-aliasing",
    ],
    includes = ["nanobind/include"],
    linkstatic = True,
    textual_hdrs = glob([
        "nanobind/src/*.h",
        "nanobind/src/*.cpp",
    ]),
    deps = [
        ":python",
        ":robin_map",
    ],
)

cc_library(
    name = "robin_map",
    hdrs = glob(["nanobind/ext/robin_map/include/**/*.h"]),
    includes = ["nanobind/ext/robin_map/include"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["jaxlib/include/xla/ffi/api/*.h"]),
    includes = ["jaxlib/include"],
)
"""

def _python_headers_impl(ctx):
    python = ctx.which("python3")
    if not python:
        fail("the Python extension needs python3 on PATH; none was found")
    found = ctx.execute([python, "-c", _FIND])
    if found.return_code != 0:
        fail("%s could not tell where its packages are: %s" % (python, found.stderr))
    homes = found.stdout.split("\n")
    for name, home in zip(["python", "nanobind", "jaxlib"], homes):
        if not home:
            fail("%s has no package %s; install it, or put a python3 that has it first on PATH" %
                 (python, name))
        ctx.symlink(home, name)
    ctx.file("BUILD.bazel", _BUILD)

python_headers = repository_rule(
    implementation = _python_headers_impl,
    environ = ["PATH"],
    local = True,
    doc = "cc_library targets :python, :nanobind (compiled from source) and :xla_ffi.",
)
