#!/usr/bin/env bash
# Converts SOURCE into TARGET on the Hub, in less room than either takes; the same command again continues where it stopped,
# on another machine too.
#   SOURCE=org/model TARGET=me/model-int4 bash convert.sh --bits 4 --group-size 128
# On Hugging Face's own machines, with an image of the Dockerfile:
#   hf jobs run --flavor cpu-upgrade --secrets HF_TOKEN IMAGE org/model --push-to-hub me/model-int4
set -euo pipefail
quantconvert "$SOURCE" --push-to-hub "$TARGET" --strict --verify "$@"
