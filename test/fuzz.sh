#!/usr/bin/env bash
# Runs each fuzz target in turn for the time given. The compiler lists them, so that none is forgotten.
set -euo pipefail
cd "$(dirname "$0")/.."
git grep -lE '^func Fuzz' -- '*_test.go' | xargs -n 1 dirname | sort -u | while read -r dir; do
	binary=$(mktemp)
	go test -c -o "$binary" "./$dir" </dev/null
	# As go test runs it: where testdata is. Some packages' tests start themselves anew, and lists must not.
	targets=$(cd "$dir" && "$binary" -test.list '^Fuzz' | grep '^Fuzz')
	rm -f "$binary"
	for target in $targets; do
		echo "== $target in $dir"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$1" -fuzzminimizetime 100x "./$dir" </dev/null
	done
done
