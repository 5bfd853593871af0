#!/usr/bin/env bash
# Look at the page of a run in a headless Chromium: tests/browser. A missing one is installed by
# apt-get, as root; elsewhere CHROMIUM names the program.
#
#   [CHROMIUM=/path/to/chromium] scripts/test-browser.sh [pytest's options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
browser=${CHROMIUM:-$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)}
if [[ -z $browser ]]; then
    command -v apt-get >/dev/null && [[ $EUID -eq 0 ]] ||
        die "no Chromium: install one, or name it in CHROMIUM"
    echo "installing Chromium"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null
    browser=$(command -v chromium)
fi
export CHROMIUM=$browser
exec "$python" -m pytest -q tests/browser/pages.py "${words[@]}" "$@"
