#!/usr/bin/env bash
# Runs each fuzz target for the time given, as many at once as there are processors. The compiler lists them, so that none is forgotten.
set -euo pipefail
cd "$(dirname "$0")/.."
list() {
	git grep -lE '^func Fuzz' -- '*_test.go' | xargs -n 1 dirname | sort -u | while read -r dir; do
		binary=$(mktemp)
		go test -c -o "$binary" "./$dir" </dev/null
		# As go test runs it: where testdata is. Some packages' tests start themselves anew, and lists must not.
		(cd "$dir" && "$binary" -test.list '^Fuzz' | grep '^Fuzz' | sed "s|\$| $dir|")
		rm -f "$binary"
	done
}
one() {
	local output
	# Go's coordinator sometimes takes the end of the time for a failure (go.dev/issue/75804, mended in 1.27). An input that fails is always written down.
	for try in 1 2 3; do
		if output=$(go test -run '^$' -fuzz "^$2\$" -fuzztime "$1" -fuzzminimizetime 100x -parallel 1 "./$3" </dev/null 2>&1); then
			printf '== %s in %s: %s\n' "$2" "$3" "$(grep execs <<<"$output" | tail -n 1)"
			return
		fi
		if [[ $output != *$'\n    context deadline exceeded\n'* || $output == *'Failing input written'* ]]; then
			break
		fi
		printf '== %s in %s: the coordinator has failed, try %d\n' "$2" "$3" "$try"
	done
	printf '%s\n' "$output" >&2
	return 1
}
export -f one
list | xargs -P "$(nproc)" -L 1 bash -c 'one "$@"' one "$1"
