#!/usr/bin/env bash
# Converts SOURCE and pushes it to TARGET; the same command again continues where it stopped.
#   SOURCE=org/model TARGET=me/model-int4 bash convert.sh --bits 4 --group-size 128
# On Hugging Face's own machines, with an image of the Dockerfile:
#   hf jobs run --flavor cpu-upgrade --secrets HF_TOKEN IMAGE org/model out --push-to-hub me/model-int4
set -euo pipefail
out=${OUT:-$(basename "$TARGET")}
if [ ! -f "$out/quantconvert.json" ]; then
    quantconvert "$SOURCE" "$out" --strict --verify "$@"
fi
quantconvert push "$out" "$TARGET"
