#!/usr/bin/env bash
# Train with each tracker in its offline mode, and read back what it has written: tests/trackers.
# They are installed below build/versions, beside .venv, on first use.
#
#   scripts/test-trackers.sh [pytest's options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
folder=build/versions/trackers pins=scripts/requirements/trackers.txt
beside_venv "$folder" "$pins" --requirement "$pins"
exec "$folder/bin/python" -m pytest -q tests/trackers/offline.py "${words[@]}" "$@"
