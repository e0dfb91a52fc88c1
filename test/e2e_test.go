package test

import (
	"cmp"
	"context"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"testing"
	"time"
)

// What JavaScript does with the server is tested in JavaScript, against the real
// binary: by the client that parley replaces the server of, by our own, and by
// the demo page in a browser. They mostly wait, and so run beside each other.

// TestPublishedClients runs the npm client of the pair protocol.
func TestPublishedClients(t *testing.T) {
	t.Parallel()
	server := testkit.StartBinary(t)
	runNode(t, "mailbox.test.mjs", "PARLEY_URL="+server.URL(""))
}

func TestJavaScriptClient(t *testing.T) {
	t.Parallel()
	runNode(t, "client.test.mjs", "PARLEY_BIN="+testkit.BuildBinary(t))
	for _, file := range []string{"types", "vendor", "verify", "transfer"} {
		runNode(t, file+".test.mjs")
	}
}

// TestBrowser has the client connect pages of a real browser with each other.
func TestBrowser(t *testing.T) {
	t.Parallel()
	runNode(t, "browser.test.mjs", "PARLEY_BIN="+testkit.BuildBinary(t), "CHROMIUM="+needChromium(t),
		"TURN_ADDR="+testkit.StartCoturn(t, coturnSecret), "TURN_SECRET="+coturnSecret)
}

// TestDemo uses the demo page in a real browser, as people do, breaks what it
// stands on, and puts a man in the middle.
func TestDemo(t *testing.T) {
	for _, file := range []string{"demo", "outage", "attack"} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			runNode(t, file+".test.mjs", "PARLEY_BIN="+testkit.BuildBinary(t), "CHROMIUM="+needChromium(t))
		})
	}
}

// TestExampleBrowser has two pages of another origin chat, as the example does.
func TestExampleBrowser(t *testing.T) {
	t.Parallel()
	runNode(t, "examples.test.mjs", "PARLEY_BIN="+testkit.BuildBinary(t), "CHROMIUM="+needChromium(t))
}

func needChromium(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath(cmp.Or(os.Getenv("CHROMIUM"), "chromium"))
	if err != nil {
		t.Fatal("chromium is not installed: `make test` installs it; CHROMIUM may name another of its kind")
	}
	return path
}

// runNode runs the tests of one file of test/e2e/ and shows what they say.
func runNode(t *testing.T, file string, env ...string) {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatal("node is not installed: `make test` installs it")
	}
	if _, err := os.Stat(filepath.Join("test/e2e", "node_modules", ".installed")); err != nil {
		t.Fatal("the packages of test/e2e/package-lock.json are not installed: `make test` installs them")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	run := exec.CommandContext(ctx, node, "--test", file)
	run.Dir = "test/e2e"
	run.Env = append(os.Environ(), env...)
	run.WaitDelay = 5 * time.Second
	out, err := run.CombinedOutput()
	if err != nil {
		t.Fatalf("node --test %s: %v\n%s", file, err, out)
	}
	t.Logf("%s", out)
}
