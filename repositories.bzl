"""Repositories made from what the machine has; nothing is downloaded."""

# ---- What Bazel 4 would download ----

def _builtin_rules_impl(ctx):
    ctx.file("BUILD.bazel")
    ctx.file(ctx.attr.language + "/BUILD.bazel")
    lines = ["%s = native.%s" % (rule, rule) for rule in ctx.attr.rules]
    ctx.file(ctx.attr.language + "/defs.bzl", "\n".join(lines) + "\n")

_builtin_rules = repository_rule(
    implementation = _builtin_rules_impl,
    attrs = {
        "language": attr.string(mandatory = True),
        "rules": attr.string_list(mandatory = True),
    },
)

def _no_coverage_impl(ctx):
    ctx.file("BUILD.bazel", """
filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])
filegroup(name = "lcov_merger", visibility = ["//visibility:public"])
""")

_no_coverage = repository_rule(implementation = _no_coverage_impl)

def offline_repositories():
    """Gives Bazel 4 what it would otherwise download for any C++ build and test.

    From @rules_cc and @rules_java its own toolchains take nothing but the rules built into Bazel, by
    the same names; coverage is left out. Debian's bazel-bootstrap, which is a 4.2, states no version.
    """
    version = native.bazel_version
    if version and not version.startswith("4."):
        return
    _builtin_rules(
        name = "rules_cc",
        language = "cc",
        rules = [
            "cc_binary",
            "cc_library",
            "cc_proto_library",
            "cc_test",
            "cc_toolchain",
            "cc_toolchain_suite",
            "objc_library",
        ],
    )
    _builtin_rules(
        name = "rules_java",
        language = "java",
        rules = [
            "java_binary",
            "java_import",
            "java_library",
            "java_runtime",
            "java_toolchain",
        ],
    )
    _no_coverage(name = "remote_coverage_tools")

# ---- Headers that a Python installation carries ----

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
        "-std=c++17",
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
