#!/usr/bin/env bash
# Generate docs/settings.md and docs/environment.md from the comments in the settings' own file and
# in env.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
exec "$python" -m tests.reference_pages
