//go:build long

package test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestLongRelease makes the files of a release: the server compiles for every
// platform, and the one that runs here says its version.
func TestLongRelease(t *testing.T) {
	const version = "v0.0.0-test.1"
	dir := t.TempDir()
	dist := exec.CommandContext(t.Context(), "make", "dist", "DIST="+dir)
	dist.Env = append(os.Environ(), "VERSION="+version)
	if out, err := dist.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", dist, err, out)
	}
	sums := string(mustReadFile(t, filepath.Join(dir, "SHA256SUMS")))
	var want string
	for _, platform := range []string{"darwin-amd64", "darwin-arm64", "linux-amd64", "linux-arm64", "windows-amd64.exe", "windows-arm64.exe"} {
		name := "parley-" + version + "-" + platform
		content := mustReadFile(t, filepath.Join(dir, name))
		want += fmt.Sprintf("%x  %s\n", sha256.Sum256(content), name)
		if !bytes.Contains(content, []byte(version)) {
			t.Errorf("%s does not know its version", name)
		}
	}
	if sums != want {
		t.Errorf("SHA256SUMS is\n%s\nwant\n%s", sums, want)
	}

	if runtime.GOOS != "linux" {
		return
	}
	p := testkit.StartFile(t, filepath.Join(dir, "parley-"+version+"-linux-"+runtime.GOARCH))
	if want := "parley " + version + " listens on "; !strings.Contains(p.Output(), want) {
		t.Errorf("it does not say %q", want)
	}

	refused := exec.CommandContext(t.Context(), "make", "dist", "DIST="+t.TempDir())
	refused.Env = append(os.Environ(), "VERSION=v1$(echo)")
	if out, err := refused.CombinedOutput(); err == nil || !strings.Contains(string(out), "must be like v1.2.3") {
		t.Errorf("a version that is none: %v\n%s", err, out)
	}
}

func mustReadFile(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}
