# Sourced by the launch scripts, with ROOT (this folder) set. Leaves in PYTHON an interpreter that has requirements.txt:
#   1. PYTHON, where the caller set it: used as it is, unchecked;
#   2. the active python3, where it has the requirements;
#   3. ROOT/.venv, created on first use. No other environment is ever changed.
# `.venv/.made_by` marks the folder as ours: `installing` (an interrupted one is rebuilt) or `complete`.

REQUIREMENTS_CHECK='
import platform, re, sys
from importlib import metadata

FACTS = {"python_version": "%d.%d" % sys.version_info[:2], "sys_platform": sys.platform, "platform_machine": platform.machine()}

def version(text):  # the release numbers alone: a local build such as 2.13.0+cpu is a 2.13.0
    numbers = [int(n) for n in re.match(r"\d+(\.\d+)*", text)[0].split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return numbers

def holds(have, comparison):
    operator, want = re.match(r"\s*(==|>=|<=|!=|>|<)\s*\"?([\d.]+)", comparison).groups()
    a, b = version(have), version(want)
    return {"==": a == b, ">=": a >= b, "<=": a <= b, "!=": a != b, ">": a > b, "<": a < b}[operator]

def applies(marker):  # comparisons, all of which hold; numbers of python_version only
    for fact, operator, want in re.findall(r"(\w+)\s*([=!<>]+)\s*\"([^\"]+)\"", marker):
        if not (holds(FACTS[fact], operator + want) if fact == "python_version" else (FACTS[fact] == want) == (operator == "==")):
            return False
    return True

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer")
missing = []
for line in open(sys.argv[1], encoding="utf-8"):
    requirement, _, marker = line.split("#")[0].strip().partition(";")
    if not requirement or not applies(marker):
        continue
    name, comparisons = re.match(r"([\w.-]+)\s*(.*)", requirement).groups()
    try:
        have = metadata.version(name)
        fits = have is not None and all(holds(have, c) for c in comparisons.split(",") if c)
    except metadata.PackageNotFoundError:
        fits = False
    if not fits:
        missing.append(requirement.strip())
if missing:
    sys.exit(missing[0] + (" and %d more" % (len(missing) - 1) if missing[1:] else ""))
'

# Prints what is missing and fails, unless interpreter $1 has the requirements.
missing_requirements() { "$1" -c "$REQUIREMENTS_CHECK" "$ROOT/requirements.txt" 2>&1; }

venv_is_complete() {
    [ -x "$ROOT/.venv/bin/python" ] && [ "$(cat "$ROOT/.venv/.made_by" 2>/dev/null)" != installing ] && missing_requirements "$ROOT/.venv/bin/python" >/dev/null
}

make_venv() {
    local venv="$ROOT/.venv" base missing candidate
    if [ -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/.made_by" ]; then
        missing=$(missing_requirements "$venv/bin/python")
        echo "error: $venv lacks $missing, and was not made by this script. Run '$venv/bin/python -m pip install -r requirements.txt', or move it away." >&2
        return 1
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python3.13 python; do
        command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && base=$candidate && break
    done
    [ -n "${base:-}" ] || { echo "error: Python 3.10 or newer is needed, and none was found on PATH." >&2; return 1; }
    if [ "$(cat "$venv/.made_by" 2>/dev/null)" != complete ]; then
        rm -rf "$venv" && mkdir "$venv" && echo installing >"$venv/.made_by" || return 1
        "$base" -m venv "$venv" || { echo "error: '$base -m venv' failed; on Debian and Ubuntu install the package python3-venv." >&2; return 1; }
    fi
    echo installing >"$venv/.made_by"
    "$venv/bin/python" -m pip install --disable-pip-version-check -r "$ROOT/requirements.txt" \
        || { echo "error: the requirements could not be installed into $venv; the next run starts it anew." >&2; return 1; }
    missing=$(missing_requirements "$venv/bin/python") || { echo "error: after the installation $venv still lacks $missing." >&2; return 1; }
    echo complete >"$venv/.made_by"
}

ensure_env() {
    local active missing="no python3 on PATH"
    [ -z "${PYTHON:-}" ] || return 0
    active=$(command -v python3 || command -v python) && missing=$(missing_requirements "$active") && { PYTHON=$active; return 0; }
    if ! venv_is_complete; then
        echo "The active Python (${active:-none}) lacks ${missing##*$'\n'}: installing requirements.txt into $ROOT/.venv, once. Your own environment stays as it is." >&2
        (
            # Two scripts started at once: the second waits for the first. Some network file systems cannot lock; then we go on without.
            command -v flock >/dev/null && flock 9
            venv_is_complete || make_venv
        ) 9<"$ROOT" || return 1
    fi
    PYTHON=$ROOT/.venv/bin/python
    echo "Python: $PYTHON" >&2
}
