package main

import (
	"bufio"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
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
// each of them.
func checkSettings(t *testing.T, where string, env map[string]string) *config {
	t.Helper()
	known := []string{"GOMEMLIMIT"} // which Go's runtime reads
	for _, o := range configOptions(new(config)) {
		known = append(known, o.names()...)
	}
	for name := range env {
		if !slices.Contains(known, name) {
			t.Errorf("%s sets %s, which parley does not read", where, name)
		}
	}
	c, err := loadConfig(nil, func(name string) (string, bool) {
		value, ok := env[name]
		return value, ok
	})
	if err != nil {
		t.Errorf("%s: %v", where, err)
		return new(config)
	}
	return c
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
	if c := checkSettings(t, "Dockerfile", imageEnvironment(t)); c.dev || !c.demo || c.port != 1234 {
		t.Errorf("the image runs with DEV=%t DEMO=%t PORT=%d", c.dev, c.demo, c.port)
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
	ts, _ := newLoopServer(t, env...)
	const host = "Host: 192.168.1.20:1234"
	if a := ts.call("GET", "/", "", host); a.status != 200 || !strings.Contains(a.header.Get("Content-Type"), "text/html") {
		t.Errorf("the page: %d", a.status)
	}
	for origin, status := range map[string]int{"http://192.168.1.20:1234": 200, "http://evil.example": 403} {
		if a := ts.call("POST", "/rendezvous/code", "", host, "Origin: "+origin); a.status != status {
			t.Errorf("a page of %s mints: %d, want %d", origin, a.status, status)
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
		{"deploy/compose/caddy.yaml", "deploy/compose/coturn.yaml"}, {"deploy/compose/redis.yaml"}}
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
				if !strings.HasSuffix(port, fmt.Sprint(":", c.port)) {
					t.Errorf("%s publishes %s of a server on %d", where, port, c.port)
				}
			}
			for _, front := range stack.Services {
				if front.Environment["UPSTREAM"] == "" {
					continue
				}
				if upstream := fmt.Sprintf("%s:%d", name, c.port); !slices.Contains(strings.Fields(front.Environment["UPSTREAM"]), upstream) {
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
	if timeout, err := time.ParseDuration(stop[1]); err != nil || timeout <= c.drainTimeout {
		t.Errorf("TimeoutStopSec=%s cuts off DRAIN_TIMEOUT=%v", stop[1], c.drainTimeout)
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
	if _, err := loadConfig(nil, func(name string) (string, bool) { v, ok := env[name]; return v, ok }); err == nil {
		t.Error("the template is accepted as it is, secrets and all")
	}
	env["JWT_SECRET"] = strings.Repeat("filled in", 4)
	for _, literal := range component.Generators[0].Literals {
		name, value, _ := strings.Cut(literal, "=")
		env[name] = value
	}
	if with := checkSettings(t, dir+"components/redis", env); !with.redisAddress.given() || len(with.turnSecrets) == 0 {
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
		want := map[string]string{"http": fmt.Sprintf(":%d", c.port), "metrics": c.metricsAddr}[port.Name]
		if fmt.Sprintf(":%d", port.Port) != want {
			t.Errorf("port %s is %d, and the server listens on %s", port.Name, port.Port, want)
		}
	}
	if scraped := ":" + pod.Metadata.Annotations["prometheus.io/port"]; scraped != c.metricsAddr {
		t.Errorf("Prometheus asks %s, metrics are on %s", scraped, c.metricsAddr)
	}
	stop := time.Duration(container.Lifecycle.PreStop.Sleep.Seconds)*time.Second + c.drainTimeout
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
	dir, port := t.TempDir(), quietPort(t)
	conf := filepath.Join(dir, "turnserver.conf")
	writeFile(t, conf, rendered(t, "deploy/turnserver.conf", "listening-port=3478", "listening-port="+port)+
		"realm=parley.test\nstatic-auth-secret="+coturnSecret+"\nlistening-ip=127.0.0.1\nrelay-ip=127.0.0.1\nallow-loopback-peers\nallowed-peer-ip=127.0.0.1\n")
	out := startProgram(t, "127.0.0.1:"+port, nil, needTool(t, "turnserver"), "-c", conf,
		"--userdb="+filepath.Join(dir, "turndb"), "--pidfile="+filepath.Join(dir, "pid"))
	if text := out.String(); strings.Contains(text, "Bad configuration format") || strings.Contains(text, "WARNING: unknown") {
		t.Errorf("coturn complains:\n%s", text)
	}
	server := startBinary(t, "STUN_URLS=stun:127.0.0.1:"+port, "TURN_URLS=turn:127.0.0.1:"+port, "TURN_SECRET="+coturnSecret)
	var said strings.Builder
	if runCheck([]string{server.base}, &said, &said) != 0 || !strings.Contains(said.String(), " relays, from ") {
		t.Errorf("parley check says\n%s", said.String())
	}

	_, _, servers := mintWithServers(t.Context(), t, server)
	turn := servers[len(servers)-1]
	uri, err := stun.ParseURI(turn.URLs[0])
	if err != nil {
		t.Fatal(err)
	}
	uri.Username, uri.Password = turn.Username, turn.Credential
	client, closeAll, err := dialICE(uri)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll()
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
