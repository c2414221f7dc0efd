#!/usr/bin/env bash
# What an installed wheel does without its clone: build wheel and sdist, install the wheel alone into a fresh environment, and run the
# README's Python lines and `lfm-edge run` there. After scripts/test.sh, which makes .venv and build/test-bundle.
set -euo pipefail
cd "$(dirname "$0")/../.."
clone=$PWD

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/uv build --quiet --out-dir "$work/dist"
[ "$(ls "$work"/dist/*.whl "$work"/dist/*.tar.gz | wc -l)" = 2 ]
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$work"/dist/*.whl
[ -d build/test-bundle ] || .venv/bin/lfm-edge export demo/checkpoint -o build/test-bundle --quiet

cd "$work" # nothing of the clone is at hand
echo "== every package, with the runtime's four dependencies alone"
venv/bin/python - <<'PY'
import importlib
import pkgutil
import sys

EXTRAS = {  # what needs more than the runtime's four, by the extra that brings it
    "export": ["lfm_export"],
    "quantize": ["lfm_quantize"],
    "report": ["lfm_audit.report", "lfm_quantize.judge.plot"],
    "package": ["lfm_package.sbom", "lfm_package.wheelhouse", "lfm_package.pack", "lfm_package.stick", "lfm_package.targets"],
}
ABOVE = tuple(name for names in EXTRAS.values() for name in names)
imported = 0
for package in ("lfm_profiles", "lfm_runtime", "lfm_audit", "lfm_package"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.startswith(ABOVE) and not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            imported += 1
strangers = sorted(
    {name.partition(".")[0] for name, module in sys.modules.items() if "site-packages" in str(getattr(module, "__file__", ""))}
    - {"lfm_profiles", "lfm_runtime", "lfm_audit", "lfm_package", "numpy", "onnxruntime", "PIL", "psutil", "tomli"}
)
# onnxruntime brings its own; _distutils_hack is pip's.
strangers = [name for name in strangers if name not in ("flatbuffers", "google", "packaging", "_distutils_hack", "coloredlogs", "sympy")]
assert not strangers, strangers
print(f"{imported} modules, no other package")
PY
echo "== the README's lines, and the command"
sed -n '/^```python$/,/^```$/p' "$clone/README.md" | sed '1d;$d' | sed "s#\"demo/#\"$clone/demo/#; s#$clone/demo/bundle#$clone/build/test-bundle#" >lines.py
[ "$(venv/bin/python lines.py)" = "red cross, orange circle" ]
venv/bin/lfm-edge run "$clone/build/test-bundle" "$clone/demo/eval/images/0000.png" -p "What is in this image?" --variant fp32
venv/bin/lfm-edge export "$clone/demo/checkpoint" -o bundle 2>said || true
grep -q "export needs the Python package .* -m pip install '" said && ! grep -q "lfm-edge\[" said || { cat said && exit 1; }
echo "the wheel is well: $(ls "$work"/dist)"
