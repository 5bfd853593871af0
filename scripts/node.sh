#!/usr/bin/env bash
# One machine of a run that HOSTS started: qwen35/launch/hosts.py calls this over ssh, and nobody
# else need.
#
#   scripts/node.sh    its standard input: NAME=value …, nothing, arguments of finetune.sh …, nothing (each with a zero byte
#                      after it), then lines of orders: stop (save, and stop), kill
#
# At the end of its input, when whoever started it is gone, the run saves and stops too.
if (($# == 0)); then
    while IFS= read -r -d '' word && [[ -n $word ]]; do export "${word?}"; done
    arguments=()
    while IFS= read -r -d '' word && [[ -n $word ]]; do arguments+=("$word"); done
    exec 3<&0 </dev/null
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
(($# == 0)) || die "takes no arguments: see --help"

relay() { # where nobody reads any more, a run must not fail for want of a reader: it has to save
    cat || true
    exec cat >/dev/null
}

orders() {
    local order
    while read -r order; do
        case $order in
            stop) kill -TERM "$job" ;;
            kill) kill -KILL "$job" ;;
        esac
    done
    kill -TERM "$job"
}

export QWEN35_PARENT=$$ # the job ends with this script
export QWEN35_NODE=1 # and starts no other machines, whatever env.sh says here
trap '' HUP # of a connection that is lost: the end of the input says the same
bash scripts/finetune.sh "${arguments[@]}" 3<&- > >(relay 2>/dev/null) 2> >(relay >&2 2>/dev/null) &
job=$!
trap 'interrupted=1; kill -TERM "$job"' TERM
orders <&3 >/dev/null 2>&1 &
listener=$!
exec 3<&- >/dev/null 2>&1 # the run alone holds what ssh waits for
await "$job"
kill "$listener" || true
exit "$code"
