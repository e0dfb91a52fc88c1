package main

import (
	"runtime"
	"runtime/debug"
)

// version is set by the linker, which can only set a package variable:
// go build -ldflags "-X main.version=v1.2.3".
var version string

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
	v := versionInfo{Version: version, Commit: "unknown", Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = new(debug.BuildInfo)
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v.Commit = s.Value
		}
	}
	if v.Version == "" {
		v.Version = info.Main.Version
	}
	if v.Version == "" || v.Version == "(devel)" {
		v.Version = unversioned
	}
	return v
}
