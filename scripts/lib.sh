# Shared by the scripts: a Python that fits, and a virtual environment with the project in it.
# Sourced from the repository's root, by bash with `set -euo pipefail`.

# A line for people, in bold where it is a terminal that shows it.
say() {
  if [[ -t 2 ]]; then
    printf '\033[1m%s\033[0m\n' "$*" >&2
  else
    printf '%s\n' "$*" >&2
  fi
}

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# Whether $1 is a Python 3.11 to 3.13 that can make virtual environments.
_python_fits() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

# Prints a Python that fits: $ELLM_PYTHON, else python3, else a versioned one.
find_python() {
  local python
  for python in ${ELLM_PYTHON:-python3 python3.12 python3.13 python3.11}; do
    if _python_fits "$python"; then
      command -v "$python"
      return
    fi
  done
  fail "No Python 3.11, 3.12 or 3.13 that can make virtual environments was found" \
    "(looked for: ${ELLM_PYTHON:-python3, python3.12, python3.13, python3.11})." \
    "Install one (on Debian or Ubuntu: apt install python3 python3-venv), or name it:" \
    "ELLM_PYTHON=/path/to/python3.12 $0"
}

_need_compiler() {
  local compiler
  for compiler in ${CXX:-c++ g++ clang++}; do
    command -v "$compiler" >/dev/null && return
  done
  fail "No C++ compiler was found (looked for: ${CXX:-c++, g++, clang++})." \
    "Install one (on Debian or Ubuntu: apt install g++), or name it in CXX."
}

# A hash of the contents of everything that gets installed. A tracked file may have been deleted:
# its absence from the list is what changes the hash then.
_sources_hash() {
  local parts=(pyproject.toml CMakeLists.txt ellm_jax models xla_ffi)
  {
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
      git ls-files -z --cached --others --exclude-standard -- "${parts[@]}"
    else
      find "${parts[@]}" -type f -not -path '*/__pycache__/*' -print0
    fi
  } | sort -zu | { xargs -0 sha256sum 2>/dev/null || true; } | sha256sum | cut -d' ' -f1
}

# ensure_venv DIR PYTHON EXTRAS: makes the environment if there is none, and installs the project
# with EXTRAS (such as "test,parity", or "") if anything in it has changed.
ensure_venv() {
  local dir=$1 python=$2 extras=$3 stamp version wanted
  stamp=$dir/.ellm-installed
  # Empty where find_python, in a subshell, has said why there is none.
  [[ -n $python ]] || exit 1
  version=$("$python" --version)
  if [[ ! -x $dir/bin/python ]]; then
    say "Making a virtual environment in $dir ($version) ..."
    "$python" -m venv "$dir"
  elif [[ $("$dir/bin/python" --version) != "$version" ]]; then
    fail "$dir has $("$dir/bin/python" --version), and $python is $version." \
      "Remove $dir, or name another place in ELLM_VENV or ELLM_TEST_VENV."
  fi
  wanted="$extras $version $(_sources_hash)"
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  _need_compiler
  say "Installing ellm_jax${extras:+ with $extras} (the first time takes a few minutes) ..."
  rm -f "$stamp"
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check ".${extras:+[$extras]}"
  printf '%s' "$wanted" >"$stamp"
}
