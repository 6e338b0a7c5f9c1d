# crishim: make help lists the targets.
SHELL := /bin/bash -o pipefail
GO ?= go
PREFIX ?= /usr/local
DESTDIR ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unreleased)
COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
# What is made for others says when its source was written, not when it was made: the same source gives the same bytes.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
export SOURCE_DATE_EPOCH
BINARY ?= bin/crishim
# One set of flags for every binary, so that they share what is compiled: a cold build is most of the first run's time.
BUILD = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false
LDFLAGS = -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
# Packages whose tests run anywhere; what needs a node skips itself outside of one.
PACKAGES = ./cmd/... ./criu/... ./proto/... ./shim/...

.PHONY: all
all: build ## what is worth doing by default

.PHONY: build
build: $(BINARY) ## build bin/crishim

.PHONY: $(BINARY)
$(BINARY):
	$(BUILD) -ldflags '$(LDFLAGS)' -o $@ ./cmd/crishim

.PHONY: setup
setup:
	test/setup.sh

.PHONY: setup-vm
setup-vm:
	test/setup.sh vm

.PHONY: setup-disks
setup-disks:
	test/setup.sh disks

.PHONY: bin/testnode
bin/testnode: setup
	$(BUILD) -o $@.$$$$ ./test/cmd/testnode && mv $@.$$$$ $@ # somebody may be running the one that is there

.PHONY: unit
unit: ## the quick tests: no root, no node
	timeout 10m $(GO) test -race $(PACKAGES)

# The virtual machine has one processor, which is emulated: it runs beside the nodes, and before them where there is not enough for all.
.PHONY: test
test: setup setup-vm lint build fuzz ## all tests; as root, installs what it needs
	$(MAKE) --no-print-directory -j 2 test-nodes test-machines

.PHONY: test-nodes
test-nodes:
	for lane in test-node test-e2e test-conformance test-crash test-soak test-matrix; do $(MAKE) --no-print-directory $$lane || exit 1; done

.PHONY: test-machines
test-machines:
	for lane in test-vm test-vm-matrix; do nice -n -10 $(MAKE) --no-print-directory $$lane || exit 1; done

# The same packages as `unit`, as root inside a node with containerd, runc, crun and CRIU; what knows of cgroups once more
# where there is cgroup v2 alone; and what knows of a runtime's mounts with later runtimes.
.PHONY: test-node
test-node: bin/testnode
	bin/testnode build
	timeout 20m $(GO) test -count=1 -race -v -exec '$(CURDIR)/bin/testnode run --' $(PACKAGES) | test/no-skips.sh
	timeout 15m $(GO) test -count=1 -race -v -exec '$(CURDIR)/bin/testnode run --cgroup-v2 --' \
		./criu ./shim/container ./shim/checkpoint | test/no-skips.sh
	timeout 5m $(GO) test -count=1 -race -v -run 'TestWithinTheLimits/masked' -exec '$(CURDIR)/bin/testnode run --root=containerd-2 --' \
		./shim/checkpoint | test/no-skips.sh

# Whole nodes with a kubelet, driven from the host. Go's cache of results does not know of the binary that they build: -count=1.
.PHONY: test-e2e
test-e2e: setup-vm bin/testnode
	bin/testnode build
	timeout 35m $(GO) test -count=1 -race -v -p 1 -timeout 34m $$($(GO) list ./test/... | grep -vE '/test/(conformance|crash|matrix|soak|vm)$$') | test/no-skips.sh

# Kubernetes' own node e2e suite in front of crishim: the spec that checkpoints, and some for each way in which a kubelet uses a runtime.
.PHONY: test-conformance
test-conformance: bin/testnode
	bin/testnode build
	timeout 10m $(GO) test -count=1 -race -v -timeout 9m ./test/conformance | test/no-skips.sh

.PHONY: conformance
conformance: bin/testnode ## run Kubernetes' NodeConformance specs directly and through crishim; as root, takes a quarter of an hour
	bin/testnode build
	timeout 60m $(GO) test -count=1 -race -v -timeout 59m ./test/conformance -long | test/no-skips.sh

# Daemon, helper and criu killed at each step and at any moment. What it takes is a seed, see test/crash: -args -seed=N.
.PHONY: test-crash
test-crash: bin/testnode
	bin/testnode build
	timeout 16m $(GO) test -count=1 -race -v -timeout 15m ./test/crash | test/no-skips.sh

.PHONY: crash
crash: bin/testnode ## kill daemon, helper and criu 1,000 times (KILLS); as root, takes half an hour
	bin/testnode build
	$(GO) test -count=1 -race -v -timeout 3h -run TestKillsAtAnyMoment ./test/crash -args -kills=$(KILLS) | test/no-skips.sh
KILLS ?= 1000

# 200 calls a second, pods that come and go, and checkpoints, for three minutes; what crishim and its node take does not rise.
.PHONY: test-soak
test-soak: bin/testnode
	timeout 10m $(GO) test -count=1 -race -v -timeout 9m ./test/soak | test/no-skips.sh

.PHONY: soak
MINUTES ?= 30
soak: bin/testnode ## the same for MINUTES=30; as root
	$(GO) test -count=1 -race -v -timeout 0 ./test/soak -minutes $(MINUTES) | test/no-skips.sh

# Under systemd, in a virtual machine: the services as they are installed. Without the race detector, with which it takes far longer;
# crishim itself has none there anyway.
.PHONY: test-vm
test-vm: setup-vm bin/testnode
	bin/testnode build
	rm -rf bin/vm
	$(MAKE) --no-print-directory packages RELEASE=bin/vm ARCHES=amd64
	timeout 46m $(GO) test -count=1 -v -p 1 -timeout 45m \
		-exec "$(CURDIR)/bin/testnode vm $$(printf -- '--copy=%s ' $(CURDIR)/bin/vm/*.deb $(CURDIR)/bin/vm/*.rpm) --" ./test/vm | test/no-skips.sh

# Those kinds of containers that need what few machines have, on cgroup v2, in a virtual machine of their own.
.PHONY: test-vm-matrix
test-vm-matrix: setup-vm bin/testnode
	bin/testnode build
	timeout 16m $(GO) test -count=1 -v -timeout 15m -run TestMatrix -exec '$(CURDIR)/bin/testnode vm --' ./test/matrix | test/no-skips.sh

# Each other kind of container that docs/compatibility.md names, with runc and crun, on cgroup v1 and v2.
.PHONY: test-matrix
test-matrix: bin/testnode
	bin/testnode build
	timeout 30m $(GO) test -count=1 -race -v -timeout 29m ./test/matrix | test/no-skips.sh

.PHONY: compatibility
compatibility: bin/testnode test-vm-matrix ## write docs/compatibility.md anew, from what the tests see
	bin/testnode build
	timeout 25m $(GO) test -count=1 -v -timeout 24m ./test/matrix -update | test/no-skips.sh

# One command, every peer in the same run. Its tables and plots are what the README's figures come from.
.PHONY: bench
bench: bin/bench setup-disks ## measure crishim beside its peers, and write docs/benchmarks; as root, takes an hour
	bin/bench --out docs/benchmarks bin/crishim
	bin/plot docs/benchmarks
	for fs in xfs btrfs; do \
		bin/bench --only checkpoint --engines 'criu dump alone,crishim' --fs $$fs --out docs/benchmarks/$$fs bin/crishim && \
		bin/plot docs/benchmarks/$$fs || exit 1; done

.PHONY: bench-short
bench-short: bin/bench ## the same with few rounds and small containers, to see that it works; writes bin/benchmarks
	bin/bench --short --out bin/benchmarks bin/crishim
	bin/plot bin/benchmarks

.PHONY: bin/bench
bin/bench: setup build
	$(BUILD) -o $@ ./test/bench
	cd test/tools/plot && $(BUILD) -o $(CURDIR)/bin/plot .

.PHONY: demo
demo: setup build ## show the main job on a real node; as root, installs what it needs
	$(BUILD) -o bin/demo ./test/cmd/demo
	bin/demo bin/crishim

.PHONY: lint
lint: ## formatting, vet, staticcheck, and what this project bans
	test/lint.sh

.PHONY: fuzz
FUZZTIME ?= 30s
fuzz: ## run each fuzz target for FUZZTIME (30s, as make test does)
	test/fuzz.sh $(FUZZTIME)

.PHONY: proto
proto: ## generate proto/**/*.pb.go again
	$(GO) build -o bin/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	$(GO) tool -modfile=test/tools/proto/go.mod buf generate proto --template proto/buf.gen.yaml

.PHONY: man
man: ## write man pages and completions to bin/documents
	env -u GOARCH $(GO) test -count=1 -run '^TestDocuments$$' -ldflags '$(LDFLAGS)' ./cmd/crishim -args -documents '$(CURDIR)/bin/documents'

.PHONY: install
install: build man ## install binary, units, man pages, completions and, if there is none, the configuration file (DESTDIR, PREFIX)
	install -D -m 0755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/crishim
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|@BINDIR@|$(PREFIX)/bin|' systemd/crishim.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/crishim.service
	chmod 0644 $(DESTDIR)$(PREFIX)/lib/systemd/system/crishim.service
	install -m 0644 systemd/crishim.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/crishim.socket
	install -D -m 0644 systemd/tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/crishim.conf
	test -e $(DESTDIR)/etc/crishim/config.toml || install -D -m 0644 systemd/config.toml $(DESTDIR)/etc/crishim/config.toml
	install -d $(DESTDIR)$(PREFIX)/share/man/man5 $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 0644 bin/documents/man/*.5 $(DESTDIR)$(PREFIX)/share/man/man5
	install -m 0644 bin/documents/man/*.8 $(DESTDIR)$(PREFIX)/share/man/man8
	install -D -m 0644 bin/documents/completions/crishim.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/crishim
	install -D -m 0644 bin/documents/completions/_crishim $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_crishim
	install -D -m 0644 bin/documents/completions/crishim.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/crishim.fish

# What a version is called in packages: 1.2.3 of v1.2.3, 1.2.3+4.gabc of what comes after that, 0.0.0+abc where there is none.
PACKAGE_VERSION = $(shell echo '$(VERSION)' | sed -E 's/^v//; /^[0-9]+\./!s/^/0.0.0+/; s/-/+/; s/-/./g')
RELEASE ?= bin/release
ARCHES ?= amd64 arm64
FORMATS ?= deb rpm

.PHONY: packages
packages: $(ARCHES:%=package-%) ## make packages for ARCHES="amd64 arm64" and FORMATS="deb rpm", with a list of what is in them, in bin/release

.PHONY: bin/nfpm
bin/nfpm:
	cd test/tools/nfpm && $(BUILD) -o $(CURDIR)/$@ github.com/goreleaser/nfpm/v2/cmd/nfpm
	cd test/tools/sbom && $(BUILD) -o $(CURDIR)/bin/sbom .

package-%: bin/nfpm
	rm -rf $(RELEASE)/$*
	$(MAKE) --no-print-directory install GOOS=linux GOARCH=$* BINARY=$(RELEASE)/$*/crishim DESTDIR=$(abspath $(RELEASE))/$*/stage PREFIX=/usr
	bin/sbom $(VERSION) $(RELEASE)/$*/crishim > $(RELEASE)/$*/stage/sbom.json
	install -d $(RELEASE)/$*/stage/usr/share/doc/crishim
	cp -r README.md SECURITY.md ARCHITECTURE.md CONTRIBUTING.md CHANGELOG.md docs $(RELEASE)/$*/stage/usr/share/doc/crishim
	find $(RELEASE)/$*/stage/usr/share/man -type f -exec gzip -9n {} +
	mv $(RELEASE)/$*/stage/usr/share/zsh/site-functions/_crishim $(RELEASE)/$*/stage/_crishim
	rm -r $(RELEASE)/$*/stage/usr/share/zsh
	chmod -R u=rwX,go=rX $(RELEASE)/$*/stage
	find $(RELEASE)/$*/stage -exec touch -d @$(SOURCE_DATE_EPOCH) {} +
	for format in $(FORMATS); do STAGE=$(RELEASE)/$*/stage ARCH=$* PACKAGE_VERSION=$(PACKAGE_VERSION) \
		bin/nfpm package -f systemd/package/nfpm.yaml -p $$format -t $(RELEASE)/ || exit 1; done
	mv $(RELEASE)/$*/crishim $(RELEASE)/crishim-linux-$*
	mv $(RELEASE)/$*/stage/sbom.json $(RELEASE)/crishim-linux-$*.cdx.json
	rm -r $(RELEASE)/$*

.PHONY: release
release: packages ## what is published: packages, binaries, what is in them, and checksums of all that, in bin/release
	cd $(RELEASE) && sha256sum $$(ls | grep -v SHA256SUMS) > SHA256SUMS

.PHONY: clean
clean: ## remove what was built here; the cache outside the tree stays
	rm -rf bin

.PHONY: help
help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
