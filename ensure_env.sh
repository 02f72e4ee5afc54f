# Sourced by the launch scripts, with ROOT (this folder) set. Sets PYTHON to an interpreter that has requirements.txt:
#   1. PYTHON if the caller set it: used as it is, without checks;
#   2. the active python3 if it has the requirements, as in a vendor's container;
#   3. ROOT/.venv, created on first use with the versions of constraints.txt. No other environment is ever changed.
# `.venv/.made_by` marks the folder as ours: `installing` (an interrupted one is rebuilt) or `complete`.

REQUIREMENTS_CHECK='
import platform, re, sys
from importlib import metadata

FACTS = {
    "python_version": "%d.%d" % sys.version_info[:2],
    "sys_platform": sys.platform,
    "platform_machine": platform.machine(),
}
OTHER_NAMES = {"triton": ["pytorch-triton"]}  # the same package, as some containers call it

def version(text):  # the release numbers alone: a local build such as 2.13.0+cpu is a 2.13.0
    numbers = [int(n) for n in re.match(r"\d+(\.\d+)*", text)[0].split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return numbers

def holds(have, comparison):
    operator, want = re.match(r"\s*(==|>=|<=|!=|>|<)\s*\"?([\d.]+)", comparison).groups()
    a, b = version(have), version(want)
    return {"==": a == b, ">=": a >= b, "<=": a <= b, "!=": a != b, ">": a > b, "<": a < b}[operator]

def applies(marker):  # comparisons joined by `and`; of numbers for python_version only
    for fact, operator, want in re.findall(r"(\w+)\s*([=!<>]+)\s*\"([^\"]+)\"", marker):
        if fact == "python_version":
            true = holds(FACTS[fact], operator + want)
        else:
            true = (FACTS[fact] == want) == (operator == "==")
        if not true:
            return False
    return True

def installed(name):
    for candidate in [name, *OTHER_NAMES.get(name, [])]:
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            pass
    return None

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer")
missing = []
for line in open(sys.argv[1], encoding="utf-8"):
    requirement, _, marker = line.split("#")[0].strip().partition(";")
    if not requirement or not applies(marker):
        continue
    name, comparisons = re.match(r"([\w.-]+)\s*(.*)", requirement).groups()
    have = installed(name)
    if have is None or not all(holds(have, c) for c in comparisons.split(",") if c):
        missing.append(requirement.strip())
if missing:
    sys.exit(missing[0] + (" and %d more" % (len(missing) - 1) if missing[1:] else ""))
'

# Prints what is missing and fails, unless interpreter $1 has the requirements.
missing_requirements() { "$1" -c "$REQUIREMENTS_CHECK" "$ROOT/requirements.txt" 2>&1; }

venv_is_complete() {
    [ -x "$ROOT/.venv/bin/python" ] && [ "$(cat "$ROOT/.venv/.made_by" 2>/dev/null)" != installing ] \
        && missing_requirements "$ROOT/.venv/bin/python" >/dev/null
}

# Prints a Python of version 3.10 or newer on PATH.
find_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python3.10 python3.13 python; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$candidate" && return
    done
    echo "error: Python 3.10 or newer is needed, and none was found on PATH." >&2
    return 1
}

make_venv() {
    local venv="$ROOT/.venv" base missing
    if [ -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/.made_by" ]; then
        missing=$(missing_requirements "$venv/bin/python")
        echo "error: $venv lacks $missing, and was not made by this script." \
            "Run '$venv/bin/python -m pip install -r requirements.txt', or move it away." >&2
        return 1
    fi
    base=$(find_python) || return 1
    if [ "$(cat "$venv/.made_by" 2>/dev/null)" != complete ]; then
        rm -rf "$venv" && mkdir "$venv" && echo installing >"$venv/.made_by" || return 1
        if ! "$base" -m venv "$venv"; then
            echo "error: '$base -m venv' failed; on Debian and Ubuntu install the package python3-venv." >&2
            return 1
        fi
    fi
    echo installing >"$venv/.made_by"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check \
        -r "$ROOT/requirements.txt" -c "$ROOT/constraints.txt"; then
        echo "error: the requirements could not be installed into $venv; the next run starts anew." >&2
        return 1
    fi
    missing=$(missing_requirements "$venv/bin/python") \
        || { echo "error: after the installation $venv still lacks $missing." >&2; return 1; }
    echo complete >"$venv/.made_by"
}

ensure_env() {
    local active missing="no python3 on PATH"
    [ -z "${PYTHON:-}" ] || return 0
    active=$(command -v python3 || command -v python) && missing=$(missing_requirements "$active") \
        && { PYTHON=$active; return 0; }
    if ! venv_is_complete; then
        echo "The active Python (${active:-none}) lacks ${missing##*$'\n'}: installing requirements.txt into" \
            "$ROOT/.venv, once. Your own environment stays as it is." >&2
        (
            # If two scripts start at once, the second waits for the first. File systems without locks: no wait.
            command -v flock >/dev/null && flock 9
            venv_is_complete || make_venv
        ) 9<"$ROOT" || return 1
    fi
    PYTHON=$ROOT/.venv/bin/python
    echo "Python: $PYTHON" >&2
}
