#!/usr/bin/env bash
# Sets up whatever the tests need, then checks everything; with arguments only pytest, with these.
#
#   tests/run.sh                    lint, types, layers, shell scripts, all tests
#   tests/run.sh tests/unit -k url  some tests
#
# Needs python3 >= 3.10 with venv and pip. On Debian as root it installs the rest itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() {
  printf '\n== %s\n' "$*"
  "$@"
}

# slurm*, munge, tini and iproute2 make the cluster of tests/cluster, and openmpi-bin and mpich are launchers on it; nginx
# and squid are the servers of tests/harness, openssl names their certificates, nftables and iproute2 make its networks,
# e2fsprogs and btrfs-progs its small disks; curl and aria2 are what tests and benchmarks compare with.
packages=(
  slurmd slurmctld slurm-client munge tini openmpi-bin mpich iproute2 nftables nginx-light squid openssl curl aria2
  e2fsprogs btrfs-progs shellcheck
)

install_packages() {
  command -v apt-get >/dev/null || return 0
  local missing=() package
  for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  if ((EUID != 0)); then
    # The tests that need them skip, and say so; on CI a skip is a failure (tests/conftest.py).
    printf 'tests/run.sh: not root, so these packages stay missing: %s\n' "${missing[*]}" >&2
    return 0
  fi
  printf 'tests/run.sh: installing these Debian packages, which the tests need: %s\n' "${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  run apt-get update -qq
  run apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

shell_scripts() {
  find .ci/run benchmarks launch slurm tests -name .venv -prune -o \
    -type f \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \) -print0
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' tests/run.sh
  exit
fi

install_packages
run launch/venv.sh test
PATH="$PWD/.venv/bin:$PATH"

if (($#)); then
  run python -m pytest "$@"
  exit
fi

run ruff check .
run ruff format --check .
run mypy
run lint-imports
mapfile -d '' scripts < <(shell_scripts)
run shellcheck "${scripts[@]}"
# The ranks of a test are new processes, and PYTHONDONTWRITEBYTECODE may be set: each would compile what it imports.
run python -m compileall -q src tests
# One more than CI has cores: some tests wait for a deadline, and many for one another.
run python -m pytest -n 3
