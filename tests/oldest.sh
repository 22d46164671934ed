#!/usr/bin/env bash
# The short selection with the oldest versions that pyproject.toml admits, on its oldest Python, in a fresh environment:
#   tests/oldest.sh [PYTHON] > tests/oldest.txt
# PYTHON (python3.10) runs the package; python3, 3.11 or later, reads pyproject.toml. torch comes from PyPI with CUDA: gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 - > "$work/oldest.txt" <<'EOF'
import re, tomllib

with open("pyproject.toml", "rb") as file:
    described = tomllib.load(file)
project = described["project"]
for line in described["build-system"]["requires"] + project["dependencies"] + project["optional-dependencies"]["peft"]:
    name, bounds, marker = re.fullmatch(r"([\w-]+)([^;]*)(;.*)?", line).groups()
    print(f"{name}=={re.search(r'>=([0-9.]+)', bounds)[1]}{marker or ''}")
EOF
"${1:-python3.10}" -m venv "$work/venv"
source "$work/venv/bin/activate"
pip install -q -r "$work/oldest.txt" >&2
DQO_KERNELS_CUDA=0 pip install -q --no-build-isolation . -r "$work/oldest.txt" >&2
echo "$(date +%F), $(python --version), $(uname -m):"
tests/short.sh > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
tail -1 "$work/log"
pip freeze | grep -iE "^($(sed 's/==.*//' "$work/oldest.txt" | paste -sd '|')|huggingface.hub|tokenizers)=="
