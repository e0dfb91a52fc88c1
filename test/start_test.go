package test

import (
	"net"
	"os"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"testing"
)

func TestStartsOnlyWithWhatItNeeds(t *testing.T) {
	dir := t.TempDir()
	pair := testkit.WritePair(t, dir, 1)
	other := testkit.WritePair(t, t.TempDir(), 2)
	ordinary := filepath.Join(dir, "ordinary")
	testkit.WriteFile(t, ordinary, "kept")
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	for _, tc := range []struct {
		name string
		env  []string
		exit int
		says []string
	}{
		{"certificate alone", []string{"TLS_CERT_FILE=" + pair.CertFile}, 2, []string{"TLS_CERT_FILE needs TLS_KEY_FILE"}},
		{"key alone", []string{"TLS_KEY_FILE=" + pair.KeyFile}, 2, []string{"TLS_KEY_FILE needs TLS_CERT_FILE"}},
		{"no such certificate", []string{"TLS_CERT_FILE=" + dir + "/none", "TLS_KEY_FILE=" + pair.KeyFile}, 1, []string{"TLS_CERT_FILE", dir + "/none"}},
		{"no such key", []string{"TLS_CERT_FILE=" + pair.CertFile, "TLS_KEY_FILE=" + dir + "/none"}, 1, []string{"TLS_KEY_FILE", dir + "/none"}},
		{"a directory", []string{"TLS_CERT_FILE=" + dir, "TLS_KEY_FILE=" + pair.KeyFile}, 1, []string{"TLS_CERT_FILE", dir}},
		{"another's key", []string{"TLS_CERT_FILE=" + pair.CertFile, "TLS_KEY_FILE=" + other.KeyFile}, 1, []string{"TLS_CERT_FILE", "private key does not match"}},
		{"no PEM", []string{"TLS_CERT_FILE=" + ordinary, "TLS_KEY_FILE=" + pair.KeyFile}, 1, []string{"TLS_CERT_FILE", "PEM"}},
		{"port taken", []string{"PORT=" + port}, 1, []string{"address already in use", port}},
		{"metrics port taken", []string{"METRICS_ADDR=127.0.0.1:" + port}, 1, []string{"METRICS_ADDR", "address already in use"}},
		{"ordinary file", []string{"HOST=unix:" + ordinary}, 1, []string{ordinary, "is no socket"}},
		{"no directory", []string{"HOST=unix:" + dir + "/none/socket"}, 1, []string{dir + "/none/socket", "no such file or directory"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			exit, stdout, stderr := testkit.RunBinary(t, nil, tc.env...)
			lines := strings.Split(strings.TrimSpace(stderr), "\n")
			for _, part := range tc.says {
				if !strings.Contains(lines[len(lines)-1], part) {
					t.Errorf("the last line lacks %q:\n%s", part, stderr)
				}
			}
			if exit != tc.exit || stdout != "" {
				t.Errorf("exit status %d with %q on stdout, want %d and nothing", exit, stdout, tc.exit)
			}
		})
	}
	if kept, _ := os.ReadFile(ordinary); string(kept) != "kept" {
		t.Errorf("the ordinary file now holds %q", kept)
	}
}
