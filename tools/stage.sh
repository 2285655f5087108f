#!/usr/bin/env bash
# Runs a command and says what it is for, and every twenty seconds that it is still running:
#
#   tools/stage.sh TITLE COMMAND...
set -uo pipefail
title=$1
shift
printf '==> %s\n' "$title" >&2
begin=$SECONDS
while sleep 20 >/dev/null 2>&1; do printf '    ... %s s: %s\n' "$((SECONDS - begin))" "$title" >&2; done &
clock=$!
trap 'kill "$clock" 2>/dev/null' EXIT
"$@"
