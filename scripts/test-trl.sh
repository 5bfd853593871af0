#!/usr/bin/env bash
# Compare the losses and gradients of preference pairs with those of trl's own DPOTrainer. It is
# installed below build/versions, beside .venv, on first use, with pandas and pyarrow: 270 MB.
#
#   scripts/test-trl.sh [pytest's options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "trl needs Python 3.11, and .venv has an older one: make install PYTHON=python3.11"
split "${ARGS:-}"
folder=build/versions/trl pins=scripts/requirements/trl.txt
beside_venv "$folder" "$pins" --requirement "$pins"
exec "$folder/bin/python" -m pytest -q tests/training/beside_trl.py "${words[@]}" "$@"
