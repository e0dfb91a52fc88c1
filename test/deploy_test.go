package test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pion/stun/v3"
	"go.yaml.in/yaml/v3"
)

// What deploy/ and the files beside the code tell others to run.

// checkSettings fails unless parley would start with these variables, and knows
// each of them. It returns the settings in effect, secrets masked.
func checkSettings(t *testing.T, where string, env map[string]string) (settings map[string]string) {
	t.Helper()
	settings, problems := effective(t, env)
	if problems != "" {
		t.Errorf("%s: %s", where, problems)
	}
	for name := range env {
		if _, known := settings[strings.TrimSuffix(name, "_FILE")]; !known && name != "GOMEMLIMIT" { // which Go's runtime reads
			t.Errorf("%s sets %s, which parley does not read", where, name)
		}
	}
	return settings
}

// effective has parley start with these variables at an address that is not this
// machine's, and returns the settings that it logs, or what is wrong with them.
func effective(t *testing.T, env map[string]string) (settings map[string]string, problems string) {
	t.Helper()
	pairs := []string{"PORT="} // the default
	for name, value := range env {
		pairs = append(pairs, name+"="+value)
	}
	exit, _, stderr := testkit.RunBinary(t, []string{"-host", "192.0.2.1", "-log-format", "json"}, pairs...)
	if exit != 1 {
		return nil, stderr
	}
	first, _, _ := strings.Cut(stderr, "\n")
	if err := json.Unmarshal([]byte(first), &settings); err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	return settings, ""
}

func drainTimeout(t *testing.T, settings map[string]string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(settings["DRAIN_TIMEOUT"])
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// imageEnvironment is what the image sets.
func imageEnvironment(t *testing.T) map[string]string {
	t.Helper()
	env := map[string]string{}
	for _, pair := range strings.Fields(dockerfile(t)["ENV"]) {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return env
}

// dockerfile returns the arguments of each instruction of the last stage.
func dockerfile(t *testing.T) map[string]string {
	t.Helper()
	instructions := map[string]string{}
	for line := range strings.Lines(strings.ReplaceAll(readFile(t, "Dockerfile"), "\\\n", "")) {
		name, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "FROM" {
			clear(instructions)
		}
		instructions[name] = args
	}
	return instructions
}

func TestDockerfile(t *testing.T) {
	last := dockerfile(t)
	for name, want := range map[string]string{
		"FROM": "scratch", "EXPOSE": "1234", "ENTRYPOINT": `["/parley"]`,
	} {
		if last[name] != want {
			t.Errorf("%s %s, want %s", name, last[name], want)
		}
	}
	if !regexp.MustCompile(`^[1-9]\d*:[1-9]\d*$`).MatchString(last["USER"]) {
		t.Errorf("USER %s is not a number", last["USER"])
	}
	if !strings.HasSuffix(last["HEALTHCHECK"], `CMD ["/parley", "healthcheck"]`) {
		t.Errorf("HEALTHCHECK %s", last["HEALTHCHECK"])
	}
	if c := checkSettings(t, "Dockerfile", imageEnvironment(t)); c["DEV"] != "false" || c["DEMO"] != "true" || c["PORT"] != "1234" {
		t.Errorf("the image runs with DEV=%s DEMO=%s PORT=%s", c["DEV"], c["DEMO"], c["PORT"])
	}
	// The Go of the image is that of go.mod.
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(readFile(t, "go.mod"))
	if !strings.Contains(readFile(t, "Dockerfile"), "golang:"+version[1]+"-alpine AS build") {
		t.Errorf("Dockerfile does not build with Go %s", version[1])
	}
}

// Whoever starts the image can use its demo page from another machine, where
// only pages of its own origin may call.
func TestImageDemoPage(t *testing.T) {
	var env []string
	for name, value := range imageEnvironment(t) {
		env = append(env, name+"="+value)
	}
	server := testkit.StartBinary(t, append(env, "HOST=127.0.0.1", "PORT=0")...)
	call := func(method, path, origin string) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, server.URL(path), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "192.168.1.20:1234"
		if origin != "" {
			req.Header.Set("Origin", origin)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res
	}
	if res := call("GET", "/", ""); res.StatusCode != 200 || !strings.Contains(res.Header.Get("Content-Type"), "text/html") {
		t.Errorf("the page: %d", res.StatusCode)
	}
	for origin, status := range map[string]int{"http://192.168.1.20:1234": 200, "http://evil.example": 403} {
		if res := call("POST", "/rendezvous/code", origin); res.StatusCode != status {
			t.Errorf("a page of %s mints: %d, want %d", origin, res.StatusCode, status)
		}
	}
}

// A composeFile is what is looked at of a compose file.
type composeFile struct {
	Services map[string]composeService
	Networks map[string]struct {
		IPAM struct{ Config []struct{ Subnet string } }
	}
}

type composeService struct {
	Build struct {
		Context string
		Args    map[string]string
	}
	Image       string
	Environment map[string]string
	Ports       []string
	Volumes     []string
	Networks    []string
}

// composed reads compose files as docker compose -f … -f … does, of which those
// after the first only add services, and variables to services.
func composed(t *testing.T, files ...string) composeFile {
	t.Helper()
	stack := readCompose(t, files[0])
	for _, file := range files[1:] {
		for name, service := range readCompose(t, file).Services {
			before, ok := stack.Services[name]
			if !ok {
				stack.Services[name] = service
				continue
			}
			for k, v := range service.Environment {
				before.Environment[k] = v
			}
		}
	}
	return stack
}

// readCompose reads a compose file with values for what it asks of the operator.
func readCompose(t *testing.T, file string) (c composeFile) {
	t.Helper()
	text := regexp.MustCompile(`\$\{(\w+)[^}]*\}`).ReplaceAllStringFunc(readFile(t, file), func(asked string) string {
		for name, value := range map[string]string{"DOMAIN": "parley.example", "TURN_SECRET": "a secret"} {
			if asked == "${"+name+"}" || strings.HasPrefix(asked, "${"+name+":?") {
				return value
			}
		}
		if asked == "${VERSION:-}" { // an argument of the Dockerfile
			return ""
		}
		t.Errorf("%s asks for %s", file, asked)
		return asked
	})
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return c
}

// composeStacks are the compose files that are used together.
func composeStacks() [][]string {
	return [][]string{{"docker-compose.yml"}, {"deploy/compose/caddy.yaml"},
		{"deploy/compose/caddy.yaml", "deploy/compose/turn.yaml"}, {"deploy/compose/caddy.yaml", "deploy/compose/coturn.yaml"}, {"deploy/compose/redis.yaml"}}
}

func TestComposeFiles(t *testing.T) {
	var used []string
	for _, files := range composeStacks() {
		where := strings.Join(files, " and ")
		used = append(used, files...)
		stack := composed(t, files...)
		instances := 0
		for name, service := range stack.Services {
			if service.Build.Context == "" {
				for _, volume := range service.Volumes {
					if file, _, _ := strings.Cut(volume, ":"); strings.HasPrefix(file, "..") {
						readFile(t, filepath.Join(filepath.Dir(files[0]), file))
					}
				}
				continue
			}
			instances++
			if service.Image != "parley:local" {
				t.Errorf("%s: %s is built as %s", where, name, service.Image)
			}
			for arg := range service.Build.Args {
				if !strings.Contains(readFile(t, "Dockerfile"), " "+arg) {
					t.Errorf("%s: the Dockerfile has no argument %s", where, arg)
				}
			}
			readFile(t, filepath.Join(filepath.Dir(files[0]), service.Build.Context, "Dockerfile"))
			env := imageEnvironment(t)
			for k, v := range service.Environment {
				env[k] = v
			}
			c := checkSettings(t, where, env)
			for _, port := range service.Ports {
				relay := c["TURN"] == "on" && strings.HasSuffix(strings.TrimSuffix(port, "/udp"), ":"+c["TURN_PORT"])
				if !relay && !strings.HasSuffix(port, ":"+c["PORT"]) {
					t.Errorf("%s publishes %s of a server on %s", where, port, c["PORT"])
				}
			}
			for _, front := range stack.Services {
				if front.Environment["UPSTREAM"] == "" {
					continue
				}
				if upstream := name + ":" + c["PORT"]; !slices.Contains(strings.Fields(front.Environment["UPSTREAM"]), upstream) {
					t.Errorf("%s: the proxy does not know of %s", where, upstream)
				}
				// Proxy and server share a network, whose addresses are trusted.
				subnet := stack.Networks["web"].IPAM.Config[0].Subnet
				if !slices.Equal(service.Networks, front.Networks) || !slices.Contains(strings.Split(env["TRUSTED_PROXIES"], ","), subnet) {
					t.Errorf("%s: TRUSTED_PROXIES=%s, and the proxy is in %s", where, env["TRUSTED_PROXIES"], subnet)
				}
			}
		}
		if instances == 0 {
			t.Errorf("%s runs no parley", where)
		}
	}
	all, _ := filepath.Glob("deploy/compose/*.yaml")
	for _, file := range all {
		if !slices.Contains(used, file) {
			t.Errorf("%s is not looked at", file)
		}
	}
}

// readEnvFile reads an environment file as systemd does, and those lines too
// that are commented out: they are there to be used.
func readEnvFile(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	env := map[string]string{}
	assignment := regexp.MustCompile(`^#?([A-Z][A-Z0-9_]*)=(.*)$`)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if m := assignment.FindStringSubmatch(lines.Text()); m != nil {
			env[m[1]] = m[2]
		} else if !strings.HasPrefix(lines.Text(), "# ") && lines.Text() != "" {
			t.Errorf("%s: not a comment, not a setting: %s", file, lines.Text())
		}
	}
	return env
}

// The systemd unit waits for a drain, and has settings that the server starts with.
func TestSystemdUnit(t *testing.T) {
	c := checkSettings(t, "deploy/systemd/parley.env", readEnvFile(t, "deploy/systemd/parley.env"))
	stop := regexp.MustCompile(`(?m)^TimeoutStopSec=(\S+)$`).FindStringSubmatch(readFile(t, "deploy/systemd/parley.service"))
	if stop == nil {
		t.Fatal("the unit has no TimeoutStopSec")
	}
	if timeout, err := time.ParseDuration(stop[1]); err != nil || timeout <= drainTimeout(t, c) {
		t.Errorf("TimeoutStopSec=%s cuts off DRAIN_TIMEOUT=%s", stop[1], c["DRAIN_TIMEOUT"])
	}
}

// rendered returns a file of deploy/ with some of its text replaced, all of
// which must be there.
func rendered(t *testing.T, file string, oldnew ...string) string {
	t.Helper()
	text := readFile(t, file)
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			t.Fatalf("%s has no %q", file, oldnew[i])
		}
		text = strings.ReplaceAll(text, oldnew[i], oldnew[i+1])
	}
	return text
}

func readFile(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// needTool returns the path of a program that make test, or test-long, installs.
func needTool(t testing.TB, name string) string {
	t.Helper()
	for _, file := range []string{name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(file); err == nil {
			return path
		}
	}
	t.Fatalf("%s is not installed: `make test`, or `make test-long`, installs it", name)
	return ""
}

// A kubernetesPod is what is looked at of a Deployment.
type kubernetesPod struct {
	Spec struct {
		Template struct {
			Metadata struct{ Annotations map[string]string }
			Spec     struct {
				SecurityContext struct {
					RunAsUser  int `yaml:"runAsUser"`
					RunAsGroup int `yaml:"runAsGroup"`
				} `yaml:"securityContext"`
				Grace      int `yaml:"terminationGracePeriodSeconds"`
				Containers []struct {
					Ports []struct {
						Name string
						Port int `yaml:"containerPort"`
					}
					Lifecycle struct {
						PreStop struct{ Sleep struct{ Seconds int } } `yaml:"preStop"`
					}
				}
			}
		}
	}
}

// The settings for Kubernetes are settings, and agree with those of the pod.
func TestKubernetesSettings(t *testing.T) {
	const dir = "deploy/kubernetes/"
	env := imageEnvironment(t)
	maps.Copy(env, readEnvFile(t, dir+"base/parley.env"))
	c := checkSettings(t, dir+"base", env)

	var secret struct {
		StringData map[string]string `yaml:"stringData"`
	}
	readYAML(t, dir+"secret.example.yaml", &secret)
	var component struct {
		Generators []struct{ Literals []string } `yaml:"configMapGenerator"`
	}
	readYAML(t, dir+"components/redis/kustomization.yaml", &component)
	maps.Copy(env, secret.StringData)
	if _, problems := effective(t, env); problems == "" {
		t.Error("the template is accepted as it is, secrets and all")
	}
	env["JWT_SECRET"] = strings.Repeat("filled in", 4)
	for _, literal := range component.Generators[0].Literals {
		name, value, _ := strings.Cut(literal, "=")
		env[name] = value
	}
	if with := checkSettings(t, dir+"components/redis", env); with["REDIS_URL"] == "" || with["TURN_SECRET"] == "" {
		t.Error("the component sets no REDIS_URL, or the template no TURN_SECRET")
	}

	var deployment kubernetesPod
	readYAML(t, dir+"base/deployment.yaml", &deployment)
	pod := deployment.Spec.Template
	user := fmt.Sprintf("%d:%d", pod.Spec.SecurityContext.RunAsUser, pod.Spec.SecurityContext.RunAsGroup)
	if want := dockerfile(t)["USER"]; user != want {
		t.Errorf("the pod runs as %s, the image as %s", user, want)
	}
	container := pod.Spec.Containers[0]
	for _, port := range container.Ports {
		want := map[string]string{"http": ":" + c["PORT"], "metrics": c["METRICS_ADDR"]}[port.Name]
		if fmt.Sprintf(":%d", port.Port) != want {
			t.Errorf("port %s is %d, and the server listens on %s", port.Name, port.Port, want)
		}
	}
	if scraped := ":" + pod.Metadata.Annotations["prometheus.io/port"]; scraped != c["METRICS_ADDR"] {
		t.Errorf("Prometheus asks %s, metrics are on %s", scraped, c["METRICS_ADDR"])
	}
	stop := time.Duration(container.Lifecycle.PreStop.Sleep.Seconds)*time.Second + drainTimeout(t, c)
	if grace := time.Duration(pod.Spec.Grace) * time.Second; grace <= stop {
		t.Errorf("the pod has %v to end, of which it needs %v", grace, stop)
	}
}

func readYAML(t *testing.T, file string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(readFile(t, file)), into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// coturn with our settings, and its own address as docs/deploy.md says, takes
// parley's credentials, and relays to nobody else in the networks that it stands
// in.
func TestTurnserverConf(t *testing.T) {
	t.Parallel()
	dir, port := t.TempDir(), testkit.QuietPort(t)
	conf := filepath.Join(dir, "turnserver.conf")
	testkit.WriteFile(t, conf, rendered(t, "deploy/turnserver.conf", "listening-port=3478", "listening-port="+port)+
		"realm=parley.test\nstatic-auth-secret="+coturnSecret+"\nlistening-ip=127.0.0.1\nrelay-ip=127.0.0.1\nallow-loopback-peers\nallowed-peer-ip=127.0.0.1\n")
	out := testkit.StartProgram(t, "127.0.0.1:"+port, nil, needTool(t, "turnserver"), "-c", conf,
		"--userdb="+filepath.Join(dir, "turndb"), "--pidfile="+filepath.Join(dir, "pid"))
	if text := out.String(); strings.Contains(text, "Bad configuration format") || strings.Contains(text, "WARNING: unknown") {
		t.Errorf("coturn complains:\n%s", text)
	}
	server := testkit.StartBinary(t, "STUN_URLS=stun:127.0.0.1:"+port, "TURN_URLS=turn:127.0.0.1:"+port, "TURN_SECRET="+coturnSecret)
	if exit, said, _ := testkit.RunBinary(t, []string{"check", server.Base}); exit != 0 || !strings.Contains(said, " relays, from ") {
		t.Errorf("parley check says\n%s", said)
	}

	_, _, servers := mintWithServers(t.Context(), t, server)
	turn := servers[len(servers)-1]
	uri, err := stun.ParseURI(turn.URLs[0])
	if err != nil {
		t.Fatal(err)
	}
	uri.Username, uri.Password = turn.Username, turn.Credential
	client := dialTURN(t, uri)
	relayed, err := client.Allocate()
	if err != nil {
		t.Fatal(err)
	}
	defer relayed.Close()
	for ip, allowed := range map[string]bool{
		"203.0.113.1": true, "127.0.0.1": true, "127.0.0.2": false, "10.0.0.1": false, "172.16.0.1": false, "192.168.1.1": false,
		"169.254.169.254": false, "100.64.0.1": false, "0.0.0.0": false, "224.0.0.1": false,
	} {
		err := client.CreatePermission(&net.UDPAddr{IP: net.ParseIP(ip), Port: 80})
		if (err == nil) != allowed {
			t.Errorf("a peer at %s: %v", ip, err)
		}
	}
}
