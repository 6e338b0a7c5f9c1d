#!/usr/bin/env bash
# Formatting, vet, staticcheck, the protocols, and what this project bans.
set -euo pipefail
cd "$(dirname "$0")/.."

unformatted=$(git ls-files -co --exclude-standard '*.go' | grep -v '\.pb\.go$' | xargs gofmt -l)
if [ -n "$unformatted" ]; then
	printf 'not formatted, run gofmt -w:\n%s\n' "$unformatted" >&2
	exit 1
fi
go vet ./...
go mod tidy -diff
go tool -modfile=test/tools/lint/go.mod staticcheck ./...
test/proto.sh
# The programs of modules of their own.
for module in plot sbom; do
	(cd "test/tools/$module" && go vet ./... && go mod tidy -diff)
done

# os.Create follows symlinks and truncates what it finds: where another user can write to the directory, that is a way to
# overwrite any file (CVE-2024-45310 was of this kind). Tests are no exception: they are read to learn from.
if git grep -nE '\bos\.Create\(' -- '*.go'; then
	echo 'os.Create is banned: open with O_EXCL|O_NOFOLLOW instead' >&2
	exit 1
fi
# The leaves must stay usable by themselves: whatever they import, and by whatever way.
for rule in 'criu ^crishim/(shim|cmd)' 'shim/archive ^crishim/(criu|proto|cmd|shim/(container|rootfs|relay|checkpoint))' \
	'shim/rootfs ^crishim/' 'shim/container ^crishim/' 'shim/relay ^crishim/' 'shim/retention ^crishim/' 'shim/kubelet ^crishim/(cmd|shim|proto|systemd|criu$|criu/image)' 'criu/unixdiag ^crishim/' \
	'shim/config ^crishim/(cmd|shim$|shim/relay)' \
	'shim/checkpoint ^crishim/(shim/(relay|admin|config|retention)|cmd)' 'shim/history ^crishim/(criu|cmd|shim)'; do
	read -r dir banned <<<"$rule"
	if go list -deps "./$dir" | grep -vx "crishim/$dir" | grep -E "$banned"; then
		echo "$dir must not import this: see ARCHITECTURE.md" >&2
		exit 1
	fi
done
