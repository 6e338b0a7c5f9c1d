#!/usr/bin/env bash
# Reads the output of `go test -v`, shows what matters of it, and fails if a test was skipped: with everything installed,
# a skipped test is a test that silently no longer runs.
set -euo pipefail
output=$(mktemp)
trap 'rm -f "$output"' EXIT
# CRIU's log of each dump that was to fail has thousands of lines; what it says is in the error as well.
tee "$output" | grep -vE "^(=== (RUN|PAUSE|CONT|NAME)|\s*--- PASS)|msg=\"criu's log: " || true
if grep -E '^\s*--- SKIP' "$output"; then
	echo "tests were skipped that must run here" >&2
	exit 1
fi
# Once more, without the logs around: the end of a long output is what one sees of it.
awk '
	/^=== (RUN|NAME|CONT)/ { name = $3 }
	/^ +[A-Za-z0-9_]+\.go:[0-9]+: / && count[name]++ < 20 { said[name] = said[name] substr($0, 1, 300) "\n" }
	/^ *--- FAIL: / { print $0; printf "%s", said[$3] }
' "$output"
printf '%s passed, %s failed\n' "$(grep -cE '^--- PASS' "$output")" "$(grep -cE '^--- FAIL' "$output" || true)"
