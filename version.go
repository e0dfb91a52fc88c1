package main

import (
	"cmp"
	"runtime"
	"runtime/debug"
)

// Set by the linker, which can only set package variables:
// go build -ldflags "-X main.version=v1.2.3 -X main.commit=abcdef". The commit
// need not be where Go finds it by itself, in a clone with git at hand.
var version, commit string

// unversioned is the version of a binary that was not stamped with one.
const unversioned = "dev"

// versionInfo is the answer to GET /version.
type versionInfo struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Go      string `json:"go"`
}

// buildVersion says what this binary was built from, as far as it knows.
func buildVersion() versionInfo {
	v := versionInfo{Version: version, Commit: commit, Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = new(debug.BuildInfo)
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v.Commit == "" {
			v.Commit = s.Value
		}
	}
	v.Commit = cmp.Or(v.Commit, "unknown")
	if v.Version == "" {
		v.Version = info.Main.Version
	}
	if v.Version == "" || v.Version == "(devel)" {
		v.Version = unversioned
	}
	return v
}
