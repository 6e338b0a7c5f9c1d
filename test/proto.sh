#!/usr/bin/env bash
# proto/: its style, that nothing in it breaks who speaks with an older crishim, and that what is generated is of it.
# proto/crishim.binpb is what it was when it was last released; test/proto.sh release writes it anew.
set -euo pipefail
cd "$(dirname "$0")/.."
buf() { go tool -modfile=test/tools/proto/go.mod buf "$@"; }

if [ "${1-}" = release ]; then
	exec go tool -modfile=test/tools/proto/go.mod buf build proto -o proto/crishim.binpb
fi
buf lint proto
buf breaking proto --against proto/crishim.binpb
generated=$(mktemp -d)
trap 'rm -rf "$generated"' EXIT
go build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
buf generate proto --template proto/buf.gen.yaml -o "$generated"
if ! diff -r --exclude='*.proto' "$generated/proto/crishim" proto/crishim; then
	echo 'proto/**/*.pb.go are not of proto/**/*.proto: make proto' >&2
	exit 1
fi
