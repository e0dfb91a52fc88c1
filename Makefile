# make test is what a change must pass, make test-long what a release must.

SHELL := bash
# nginx is in a directory that only root looks into by itself.
export PATH := $(PATH):/usr/sbin

# What the tests run besides Go, one line each: the command looked for, and the
# Debian package that brings it. -race needs the C compiler.
NEEDS := \
	gcc:build-essential \
	node:nodejs \
	npm:npm \
	curl:curl \
	git:git \
	turnserver:coturn \
	redis-server:redis-server \
	chromium:chromium

# And what make test-long runs besides, to try what is in deploy/.
NEEDS_LONG := $(NEEDS) \
	nginx:nginx \
	caddy:caddy \
	promtool:prometheus \
	systemd-analyze:systemd \
	ip:iproute2 \
	nft:nftables

# What a release is built for, and where to.
PLATFORMS := linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64 windows/arm64
DIST ?= dist

FUZZTIME ?= 30s
BENCH ?= .

# npm ci again only when the packages asked for have changed.
E2E := $(if $(wildcard test/e2e/package.json),test/e2e/node_modules/.installed)

.PHONY: test test-long fuzz lint bench dist tools tools-long

# The tests of the whole come after those of the package, not beside them, and two at
# once: more browsers than cores take no less time, and now and then far more.
test: tools $(E2E)
	go test -race -count=1 -parallel 4 -timeout 10m $$(go list ./... | grep -v /test$$)
	go test -race -count=1 -parallel 2 -timeout 10m ./test

# Soak, fault and documentation tests live in *_long_test.go files with the build
# tag long and have Long in their names. After them, each fuzz target.
test-long: tools-long $(E2E)
	go test -race -count=1 -tags long -run Long -parallel 4 -timeout 40m ./...
	@bash -c "$$fuzz_script"

# FUZZTIME for each fuzz target.
fuzz:
	@bash -c "$$fuzz_script"

lint:
	@echo 'gofmt -l'; files=$$(find . -name node_modules -prune -o -name '*.go' -exec gofmt -l {} +) || exit 1; \
	if [ -n "$$files" ]; then printf 'gofmt would change:\n%s\n' "$$files" >&2; exit 1; fi
	go vet ./...
	go vet -tags long ./...
	go -C bench/plot vet ./...
	go -C deploy/verify vet ./...
	go tool staticcheck ./...
	go tool staticcheck -tags long ./...

bench:
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...

# The files of a release: VERSION=v1.2.3 make dist
dist:
	@bash -c "$$dist_script"

tools:
	@needs='$(NEEDS)' bash -c "$$install_script"

tools-long:
	@needs='$(NEEDS_LONG)' bash -c "$$install_script"

test/e2e/node_modules/.installed: $(wildcard test/e2e/package*.json) | tools
	cd test/e2e && npm ci --no-audit --no-fund || { echo 'make: npm could not install the packages of test/e2e/package-lock.json.' >&2; exit 1; }
	@mkdir -p $(@D) && touch $@

define install_script
set -euo pipefail

missing() {
	for need in $$needs; do
		command -v "$${need%%:*}" >/dev/null || echo "$$need"
	done
}

as_root() {
	if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo -n "$$@"; fi
}

# The tests start servers of their own, on other ports: those of the packages are
# not to start by themselves, which Debian asks policy-rc.d about.
install_idle() (
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$$policy" ]; then
		trap 'as_root rm -f "$$policy"' EXIT
		printf '#!/bin/sh\nexit 101\n' | as_root tee "$$policy" >/dev/null
		as_root chmod +x "$$policy"
	fi
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$packages </dev/null
)

if ! command -v go >/dev/null; then
	echo 'make: the go command is missing; go.mod says which version is needed, https://go.dev/dl/ has it.' >&2
	exit 1
fi
lacks=$$(missing)
[ -n "$$lacks" ] || exit 0
packages=$$(sed 's/.*://' <<<"$$lacks" | sort -u | xargs)
if command -v apt-get >/dev/null; then
	echo "make: installing $$packages"
	as_root apt-get update -q </dev/null || true
	install_idle || true
fi
hash -r
lacks=$$(missing)
[ -n "$$lacks" ] || exit 0
echo "make: missing and could not be installed: $$(sed 's/:.*//' <<<"$$lacks" | xargs)." \
	"On Debian, as root: apt-get install $$packages" >&2
exit 1
endef
export install_script

define fuzz_script
set -euo pipefail
log=$$(mktemp)
trap 'rm -f "$$log"' EXIT

fuzz() {
	echo "go test -run '^$$' -fuzz '^$$2$$' -fuzztime $(FUZZTIME) $$1"
	go test -tags long -run '^$$' -fuzz "^$$2$$" -fuzztime $(FUZZTIME) "$$1" 2>&1 | tee "$$log"
}

# Before Go 1.27 a target can fail with nothing but this as its time ends, with no
# input to blame (https://go.dev/issue/75804). It gets one more try.
only_ran_out_of_time() {
	grep -q '^    context deadline exceeded$$' "$$log" && ! grep -qE 'Failing input|panic:|_test\.go:' "$$log"
}

packages=$$(go list -tags long ./...)
for package in $$packages; do
	targets=$$(go test -tags long -list '^Fuzz' "$$package" | sed -n '/^Fuzz/p')
	for target in $$targets; do
		fuzz "$$package" "$$target" && continue
		only_ran_out_of_time || exit 1
		echo "make: $$target found nothing and ran into go.dev/issue/75804; once more"
		fuzz "$$package" "$$target"
	done
done
endef
export fuzz_script

# VERSION is read from the environment: a tag can have any name, and make would
# expand it.
define dist_script
set -euo pipefail
if ! [[ $${VERSION:-} =~ ^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?$$ ]]; then
	echo "make: VERSION is '$${VERSION:-}', and must be like v1.2.3 or v1.2.3-rc.1" >&2
	exit 2
fi
rm -rf "$(DIST)"
mkdir -p "$(DIST)"
for platform in $(PLATFORMS); do
	export CGO_ENABLED=0 GOOS=$${platform%/*} GOARCH=$${platform#*/}
	name=parley-$$VERSION-$$GOOS-$$GOARCH
	[ "$$GOOS" != windows ] || name+=.exe
	echo "make: $(DIST)/$$name"
	go build -trimpath -ldflags "-s -w -X main.version=$$VERSION" -o "$(DIST)/$$name" .
done
cp LICENSE "$(DIST)"
cd "$(DIST)"
sha256sum parley-* >SHA256SUMS
endef
export dist_script
