//go:build long

package test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLongDocs runs the commands of all documents as a new user would: in a fresh
// clone, with nothing downloaded or built before. The documents share what is
// downloaded and built, and port 1234, so they are run one after the other.
func TestLongDocs(t *testing.T) {
	env := newUser(t)
	for _, name := range runnableDocs(t) {
		t.Run(name, func(t *testing.T) {
			markdown, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			doc, err := parseDoc(string(markdown), docHealthURL)
			if err != nil {
				t.Fatal(err)
			}
			if name == "README.md" && (doc.foreground == 0 || doc.background == 0) {
				t.Errorf("README.md has %d blocks `sh run` and %d `sh run background`, want some of both", doc.foreground, doc.background)
			}
			if doc.foreground+doc.background == 0 {
				return // nothing in it is to be run
			}
			if doc.background > 0 {
				needPort1234(t)
			}
			clone := filepath.Join(t.TempDir(), "parley")
			cloneWorkTree(t, env, clone)
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
			defer cancel()
			start := time.Now()
			out, err := runDoc(ctx, t, name, doc, clone, env)
			if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, out)
			}
			t.Logf("%s: %d blocks and %d servers in %v", name, doc.foreground, doc.background, time.Since(start).Round(time.Second))
		})
	}
}

// newUser returns the environment of a user who has the tools and the settings of
// this machine, but has downloaded and built nothing yet.
func newUser(t *testing.T) (env []string) {
	t.Helper()
	home := t.TempDir()
	for _, setting := range os.Environ() {
		name, _, _ := strings.Cut(setting, "=")
		if !slices.Contains([]string{"HOME", "GOPATH", "GOCACHE", "GOMODCACHE", "GOFLAGS", "GOENV", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"}, name) {
			env = append(env, setting)
		}
	}
	goEnv := func(name string) string {
		out, err := exec.CommandContext(t.Context(), "go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	for _, name := range []string{"GOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "GOTOOLCHAIN"} { // perhaps set with go env -w
		env = append(env, name+"="+goEnv(name))
	}
	if npmrc := filepath.Join(os.Getenv("HOME"), ".npmrc"); os.Getenv("NPM_CONFIG_USERCONFIG") == "" {
		env = append(env, "NPM_CONFIG_USERCONFIG="+npmrc)
	}
	// The clone tested may belong to another user, which git would refuse.
	if err := os.WriteFile(filepath.Join(home, ".gitconfig"), []byte("[safe]\n\tdirectory = *\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return append(env,
		"HOME="+home, "GOENV=off",
		"GOPATH="+filepath.Join(home, "go"), "GOMODCACHE="+filepath.Join(home, "go", "pkg", "mod"), "GOCACHE="+filepath.Join(home, "build"),
		"GOFLAGS="+goEnv("GOFLAGS")+" -modcacherw", // or it could not be removed
	)
}

func needPort1234(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", ":1234")
	if err != nil {
		t.Fatalf("the documents' server listens on port 1234, which is not free: %v", err)
	}
	l.Close()
}

// cloneWorkTree clones the repository to dir, and brings over what is not
// committed yet.
func cloneWorkTree(t *testing.T, env []string, dir string) {
	t.Helper()
	git := func(args ...string) []byte {
		command := exec.CommandContext(t.Context(), "git", args...)
		command.Env = env
		var stderr bytes.Buffer
		command.Stderr = &stderr
		out, err := command.Output()
		if err != nil {
			t.Fatalf("%v: %v\n%s", command, err, &stderr)
		}
		return out
	}
	git("clone", "--quiet", "--no-hardlinks", ".", dir)
	inClone := strings.Split(string(git("-C", dir, "ls-files", "-z")), "\x00")
	here := strings.Split(string(git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")), "\x00")
	for _, name := range inClone {
		if name != "" && !slices.Contains(here, name) {
			os.Remove(filepath.Join(dir, name))
		}
	}
	for _, name := range here {
		info, err := os.Lstat(name)
		if err != nil || !info.Mode().IsRegular() { // the last, empty one too; or deleted
			if name != "" {
				os.Remove(filepath.Join(dir, name))
			}
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, content, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
}
