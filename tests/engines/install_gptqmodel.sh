#!/usr/bin/env bash
# The environment of tests/engines/test_gptqmodel.py: GPTQModel, transformers and quantconvert itself.
#
#   bash tests/engines/install_gptqmodel.sh .venv-gptqmodel     (from the root of the repository; PYTHON picks another)
#   .venv-gptqmodel/bin/python -m pytest tests/engines/test_gptqmodel.py
#
# GPTQModel 7.7 asks for a newer torch than it needs and pins its build tools, so it can stand in no extra of ours: its
# small requirements come first, then the package without them. Everything is for the CPU.
set -euo pipefail
venv=${1:?usage: bash tests/engines/install_gptqmodel.sh PATH_OF_THE_NEW_ENVIRONMENT}

"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install -q "$@"; }

pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 compressed-tensors==0.20.0
pip . "pytest>=8" "numpy>=1.26"
pip threadpoolctl "packaging>=26.3" device-smi pillow requests logbar jinja2 ninja maturin datasets pyarrow dill pypcre \
    wheel einops
pip --no-deps tokenicer defuser torchao==0.18.0 "setuptools>=84.2.1,<85" "optimum>=2.3.0"
pip --no-deps --no-build-isolation gptqmodel==7.7.0
"$venv/bin/python" -c 'from importlib.metadata import version; print("gptqmodel", version("gptqmodel"))'
