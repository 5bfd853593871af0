#!/usr/bin/env bash
# Train with each tracker in its offline mode, and read back what it has written: tests/trackers.
# They are installed below build/versions, beside .venv, on first use.
#
#   scripts/test-trackers.sh [pytest's options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
folder=build/versions/trackers pins=scripts/requirements/trackers.txt
if [[ ! -e $folder/.made || $pins -nt $folder/.made || .venv/.installed -nt $folder/.made ]]; then
    echo "making $folder"
    "$python" -m venv --clear "$folder"
    site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/behind.pth"
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-input --requirement "$pins"
    touch "$folder/.made"
fi
exec "$folder/bin/python" -m pytest -q tests/trackers/offline.py "${words[@]}" "$@"
