#!/bin/bash
# Installs ik-llama-cpp-python, built for the instruction set of this machine (its wheel is for AVX2 alone), into the
# environment of the given Python. The source package on PyPI lacks one file of its own build, which does nothing but
# fill in a version template; that file is written here.
#
#   ik-llama-build.sh PYTHON REQUIREMENTS
set -euo pipefail
python=$1
requirement=$(grep '^ik-llama-cpp-python==' "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --no-binary ik-llama-cpp-python --dest "$work" "$requirement"
tar --extract --gzip --file "$work"/*.tar.gz --directory "$work" --strip-components 1
common=$work/vendor/ik_llama.cpp/common
missing=$common/cmake/build-info-gen-cpp.cmake
if [ ! -e "$missing" ]; then
  mkdir -p "$(dirname "$missing")"
  cat > "$missing" <<'CMAKE'
set(BUILD_NUMBER 0)
set(BUILD_COMMIT "unknown")
set(BUILD_COMPILER "${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION}")
set(BUILD_TARGET "unknown")
configure_file("${CMAKE_CURRENT_LIST_DIR}/../build-info.cpp.in" "${CMAKE_CURRENT_LIST_DIR}/../build-info.cpp" @ONLY)
CMAKE
fi
"$python" -m pip install --quiet "$work"
