package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// The published clients of the pair protocol are JavaScript; they are tested in
// their own language, against the real binary.
func TestPublishedClients(t *testing.T) {
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatal("node is not installed: `make test` installs it, and the packages of e2e/")
	}
	for _, dependency := range []string{"ws", "@noisytransfer/transport"} {
		if _, err := os.Stat(filepath.Join("e2e", "node_modules", dependency)); err != nil {
			t.Fatalf("the package %s is not installed in e2e/node_modules: `make test` installs it", dependency)
		}
	}
	server := startBinary(t)

	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	run := exec.CommandContext(ctx, node, "--test")
	run.Dir = "e2e" // which is what it searches for tests, past node_modules
	run.Env = append(os.Environ(), "PARLEY_URL="+server.url(""))
	run.WaitDelay = 5 * time.Second
	out, err := run.CombinedOutput()
	if err != nil {
		t.Fatalf("node --test: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}
