//go:build long

package test

import (
	"debug/elf"
	"net"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.yaml.in/yaml/v3"
)

func TestLongNginxIdle(t *testing.T) { testProxyIdle(t, startNginx) }
func TestLongCaddyIdle(t *testing.T) { testProxyIdle(t, startCaddy) }

// testProxyIdle keeps a WebSocket silent for longer than proxies wait by
// themselves.
func testProxyIdle(t *testing.T, start startProxy) {
	t.Parallel()
	server := testkit.StartBinary(t, "HEARTBEAT=10m", "TRUSTED_PROXIES=127.0.0.1")
	p := start(t, strings.TrimPrefix(server.Base, "http://"))
	client := p.from("127.0.0.2")
	appID := uuid.NewString()
	a, b := p.seat(client, appID, "A", "a"), p.seat(client, appID, "B", "b")
	b.awaits(`{"type":"room_full"`)
	time.Sleep(75 * time.Second)
	a.send(`{"type":"offer","sdp":"after a while"}`)
	b.awaits(`{"type":"offer","sdp":"after a while"}`)
	b.send(`{"type":"answer"}`)
	a.awaits(`{"type":"answer"}`)
}

// What an image may be: the binary, and the roots of certificates that Alpine
// ships in 220 KiB.
const (
	maxImage     = 15 << 20
	certificates = 256 << 10
)

// The image's binary, built as the Dockerfile says from what .dockerignore lets
// through, is static, small, and says what it is.
func TestLongImageBinary(t *testing.T) {
	source := t.TempDir()
	copyContext(t, source)
	command := regexp.MustCompile(`(?s)(GOOS=\$TARGETOS .*? -o )/parley \.`).FindStringSubmatch(readFile(t, "Dockerfile"))
	if command == nil {
		t.Fatal("Dockerfile has no line that builds /parley")
	}
	if !strings.Contains(readFile(t, "Dockerfile"), "ENV CGO_ENABLED=0\n") {
		t.Error("Dockerfile does not turn cgo off")
	}
	for _, arch := range []string{"amd64", "arm64"} {
		binary := filepath.Join(t.TempDir(), "parley")
		build := exec.Command("bash", "-euo", "pipefail", "-c", command[1]+`"$0" .`, binary)
		build.Dir = source
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "TARGETOS=linux", "TARGETARCH="+arch, "VERSION=v1.2.3", "COMMIT=abcdef")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", arch, err, out)
		}
		checkStatic(t, arch, binary)
		info, err := os.Stat(binary)
		if err != nil {
			t.Fatal(err)
		}
		size := info.Size() + certificates
		t.Logf("%s: %.2f MiB with certificates", arch, float64(size)/(1<<20))
		if size > maxImage {
			t.Errorf("%s: %d bytes are more than %d", arch, size, maxImage)
		}
		if arch == runtime.GOARCH && runtime.GOOS == "linux" {
			checkImageRuns(t, binary)
		}
	}
}

// checkStatic fails if a binary needs anything else to run.
func checkStatic(t *testing.T, arch, binary string) {
	t.Helper()
	f, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]; f.Machine != want {
		t.Errorf("a binary for %v, want %v", f.Machine, want)
	}
	libraries, _ := f.ImportedLibraries()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || len(libraries) > 0 {
			t.Errorf("%s: not static: it needs %v", arch, libraries)
		}
	}
}

// checkImageRuns starts the binary with nothing around it but the image's
// environment.
func checkImageRuns(t *testing.T, binary string) {
	t.Helper()
	port := testkit.QuietPort(t)
	var env []string
	for name, value := range imageEnvironment(t) {
		env = append(env, name+"="+value)
	}
	env = append(env, "HOST=127.0.0.1", "PORT="+port)
	server := exec.Command(binary)
	server.Env = env
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		server.Process.Kill()
		server.Wait()
	}()
	testkit.Eventually(t, "the image's binary is healthy", func() bool {
		check := exec.Command(binary, "healthcheck")
		check.Env = env
		return check.Run() == nil
	})
	p := &proxy{t: t, base: "http://" + net.JoinHostPort("127.0.0.1", port)}
	var v struct{ Version, Commit, Go string }
	p.call(p.from("127.0.0.1"), "GET", "/version", "", &v)
	if v.Version != "v1.2.3" || v.Commit != "abcdef" {
		t.Errorf("version: %+v", v)
	}
}

// copyContext copies what .dockerignore lets through into dir.
func copyContext(t *testing.T, dir string) {
	t.Helper()
	patterns := strings.Fields(regexp.MustCompile(`(?m)^#.*$`).ReplaceAllString(readFile(t, ".dockerignore"), ""))
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		ignored := false
		for _, pattern := range patterns { // the last one that matches decides
			name, kept := strings.CutPrefix(pattern, "!")
			if ok, _ := filepath.Match(name, e.Name()); ok {
				ignored = !kept
			}
		}
		switch to := filepath.Join(dir, e.Name()); {
		case ignored:
		case e.IsDir():
			err = os.CopyFS(to, os.DirFS(e.Name()))
		default:
			err = os.WriteFile(to, []byte(readFile(t, e.Name())), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// verify runs deploy/verify and returns what it prints.
func verify(t *testing.T, args ...string) (out string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"-C", "deploy/verify", "run", "."}, args...)...)
	cmd.Env = append(os.Environ(), "DOMAIN=parley.example", "TURN_SECRET=a secret")
	stderr := new(testkit.Output)
	cmd.Stderr = stderr
	printed, err := cmd.Output()
	if err != nil {
		t.Errorf("verify %s: %v\n%s", strings.Join(args, " "), err, stderr)
	}
	return string(printed)
}

func TestLongDockerFiles(t *testing.T) {
	verify(t, "dockerfile", "../../Dockerfile")
	for _, files := range composeStacks() {
		args := []string{"compose"}
		for _, file := range files {
			args = append(args, "../../"+file)
		}
		verify(t, args...)
	}
}

// Each kustomization builds, of fields that Kubernetes has, into pods that a
// namespace for restricted ones takes; and what it sets for parley are settings.
func TestLongKubernetes(t *testing.T) {
	for _, dir := range []string{"base", "overlays/tailscale"} {
		out, found := verify(t, "kubernetes", "../kubernetes/"+dir), false
		for manifest := range strings.SplitSeq(out, "\n---\n") {
			var configMap struct {
				Kind string
				Data map[string]string
			}
			if err := yaml.Unmarshal([]byte(manifest), &configMap); err != nil {
				t.Fatal(err)
			}
			if configMap.Kind == "ConfigMap" {
				found = true
				checkSettings(t, dir, configMap.Data)
			}
		}
		if !found {
			t.Errorf("%s has no settings:\n%s", dir, out)
		}
	}
}

// The systemd unit says nothing that systemd does not know, and exposes little.
func TestLongSystemdUnit(t *testing.T) {
	analyze := needTool(t, "systemd-analyze")
	unit := filepath.Join(t.TempDir(), "parley.service")
	testkit.WriteFile(t, unit, rendered(t, "deploy/systemd/parley.service", "ExecStart=/usr/local/bin/parley", "ExecStart="+testkit.BuildBinary(t)))
	for _, args := range [][]string{
		{"verify", "--man=no", unit},
		{"security", "--offline=yes", "--threshold=15", unit}, // of 100
	} {
		out, err := exec.Command(analyze, args...).CombinedOutput()
		if err != nil || args[0] == "verify" && len(out) > 0 {
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
}
