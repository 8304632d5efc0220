#!/usr/bin/env bash
# Installs what pip cannot: a C compiler, an OpenCL driver, the sanitizers' runtime, Python's venv,
# git, an emulator of ARM processors, one of OpenCL devices that reports data races, spin, and a browser.
#
#   tools/system.sh [--required] [clang] [opencl] [sanitizers] [emulator] [oclgrind] [venv] [git]
#      [spin] [chromium]
#
# On Debian and its derivatives apt-get installs what is missing, if we are root or sudo needs no
# password. Otherwise it prints one sentence per missing thing that says what to type, and exits with
# code 1 if that is needed in any case: clang, venv, and with --required everything.
set -euo pipefail

PYTHON=${SYSTEM_PYTHON:-$(command -v python3.11 || command -v python3)}
VENV=${VENV:-.venv}
required=false
packages=()   # what apt-get is to install
missing=()    # the requested words that are not there yet

main() {
  for word in "$@"; do
    case $word in
      --required) required=true ;;
      clang | opencl | sanitizers | emulator | oclgrind | venv | git | spin | chromium)
        "has_$word" || missing+=("$word") ;;
      *) usage ;;
    esac
  done
  if [ ${#missing[@]} -eq 0 ]; then return; fi
  install_missing
  for word in "${missing[@]}"; do "has_$word" || complain "$word"; done
}

usage() {
  echo "usage: tools/system.sh [--required]" \
    "[clang] [opencl] [sanitizers] [emulator] [oclgrind] [venv] [git] [spin] [chromium]" >&2
  exit 2
}

install_missing() {
  local apt
  apt=$(apt_command) || return 0
  for word in "${missing[@]}"; do packages+=($("package_$word")); done # one may be several
  echo "Installing ${packages[*]} with apt-get ..."
  local log
  log=$(mktemp)
  # On a fresh machine the package lists are empty, so update comes first.
  if $apt update >"$log" 2>&1 && $apt install -y --no-install-recommends "${packages[@]}" >>"$log" 2>&1
  then
    # The package's name depends on clang's version, which may only be known now.
    if [[ " ${missing[*]} " == *" sanitizers "* ]] && ! has_sanitizers; then
      $apt install -y --no-install-recommends "$(package_sanitizers)" >>"$log" 2>&1 || tail -n 20 "$log" >&2
    fi
  else
    tail -n 20 "$log" >&2
  fi
  rm -f "$log"
}

# Prints the command that runs apt-get for this user; fails where there is none.
apt_command() {
  command -v apt-get >/dev/null || return 1
  local options="-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3"
  if [ "$(id -u)" -eq 0 ]; then
    echo "env DEBIAN_FRONTEND=noninteractive apt-get $options"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    echo "sudo -n env DEBIAN_FRONTEND=noninteractive apt-get $options"
  else
    return 1
  fi
}

has_clang() {
  # macOS has a clang that only offers to install Xcode's tools, so the compiler has to answer.
  if clang --version >/dev/null 2>&1; then return 0; fi
  local found
  found=$(versioned_clang) || return 1
  # The only compiler is called clang-NN: make, demo and tests find it as clang in .venv/bin.
  mkdir -p "$VENV/bin" && ln -sf "$found" "$VENV/bin/clang"
}

versioned_clang() {
  local version
  for version in 22 21 20 19 18 17 16 15 14; do
    command -v "clang-$version" && return 0
  done
  return 1
}

# A driver, and the library that finds drivers, which is a separate package.
has_opencl() {
  [ "$(uname)" = Darwin ] && return
  compgen -G "/etc/OpenCL/vendors/*.icd" >/dev/null &&
    "$PYTHON" -c 'from ctypes.util import find_library; exit(find_library("OpenCL") is None)'
}

has_sanitizers() {
  has_clang || return 1
  echo 'int main(void) { return 0; }' |
    clang -x c -fsanitize=address,undefined - -o /dev/null 2>/dev/null
}

has_emulator() {
  command -v qemu-aarch64 >/dev/null && command -v ld.lld >/dev/null &&
    [ -d /usr/aarch64-linux-gnu/include ] && [ -d /usr/lib/gcc-cross/aarch64-linux-gnu ]
}

has_oclgrind() { [ -f "${OCLGRIND:-/usr/lib/oclgrind/liboclgrind-rt-icd.so}" ]; }

has_venv() {
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null
}


has_git() { command -v git >/dev/null; }

has_spin() { command -v spin >/dev/null; }
has_chromium() { command -v chromium >/dev/null || command -v chromium-browser >/dev/null; }

package_clang() { echo clang; }
package_git() { echo git; }
package_spin() { echo spin; }
package_chromium() { echo chromium; }
package_opencl() { echo pocl-opencl-icd ocl-icd-libopencl1; }
package_emulator() { echo qemu-user lld libc6-dev-arm64-cross libgcc-12-dev-arm64-cross; }
package_oclgrind() { echo oclgrind ocl-icd-libopencl1; }
package_venv() { "$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'; }

package_sanitizers() {
  local version=14 # Debian 12's
  if clang --version >/dev/null 2>&1; then
    version=$(clang -dumpversion | cut -d. -f1)
  fi
  echo "libclang-rt-$version-dev"
}

complain() {
  local what
  case $1 in
    clang) what="tinygrad's CPU backend needs the C compiler clang" ;;
    opencl) what="the OpenCL tests need an OpenCL driver" ;;
    sanitizers) what="the kernels' sanitizer tests need clang's runtime library" ;;
    emulator) what="running NEON code here needs an emulator and ARM's libraries" ;;
    oclgrind) what="looking for data races needs oclgrind" ;;
    venv) what="$PYTHON cannot make virtual environments" ;;
    git) what="the test of README's commands needs git" ;;
    spin) what="exploring the protocol of checkpoints needs spin" ;;
    chromium) what="the tests of the chat page and of the report need chromium" ;;
  esac
  if [ "$(uname)" = Darwin ]; then
    echo "$what: type  xcode-select --install  and then run make again." >&2
  else
    echo "$what: type  sudo apt-get install $("package_$1")  (or what your system calls it)" \
      "and then run make again." >&2
  fi
  if $required || [ "$1" = clang ] || [ "$1" = venv ]; then exit 1; fi
}

main "$@"
