package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Every load finds nothing wrong with the real server, measures something, and
// what it says it sent is what the server says it relayed.
func TestLoads(t *testing.T) {
	t.Parallel()
	for _, l := range loads() {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			server := startParley(t)
			b := newBench(t, server.url)
			r := b.run(l)
			if !r.ok() {
				t.Errorf("not ok: %+v", r)
			}
			if l.name == "idle" {
				if r.Connections != b.conns || r.MemoryPerConnection == nil {
					t.Errorf("%d connections of %v bytes, want %d", r.Connections, r.MemoryPerConnection, b.conns)
				}
				return
			}
			if r.Done == 0 || r.PerSecond == 0 || r.ServerCPU == nil {
				t.Errorf("measured nothing: %+v", r)
			}
			if l.name == "slow" { // its flood is not among the frames sent
				return
			}
			relayed := scrape(t, server.url, `parley_frames_total{direction="out",type="ice"}`, `parley_frames_total{direction="out",type="candidate"}`)
			if r.Sent > 0 && relayed != r.Sent {
				t.Errorf("sent %d frames, and the server relayed %d", r.Sent, relayed)
			}
			if codes := scrape(t, server.url, "parley_codes_minted_total"); l.name == "mint" && (2*codes < r.Done || 2*codes > r.Done+2) {
				t.Errorf("%d operations, and the server minted %d codes", r.Done, codes)
			}
		})
	}
}

// scrape adds up metrics of the server.
func scrape(t *testing.T, url string, names ...string) (sum uint64) {
	t.Helper()
	res, err := http.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	for lines := bufio.NewScanner(res.Body); lines.Scan(); {
		for _, name := range names {
			if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
				number, err := strconv.ParseFloat(value, 64)
				if err != nil {
					t.Fatal(err)
				}
				sum += uint64(number)
			}
		}
	}
	return sum
}

// Sessions that only codes lead to are joined by codes.
func TestMintedSessions(t *testing.T) {
	t.Parallel()
	server := startParley(t, "DEV=false")
	b := newBench(t, server.url)
	if !b.target.minted {
		t.Fatal("any session can be joined")
	}
	if r := b.latency(); !r.ok() || r.Connections != 2*b.pairs {
		t.Errorf("%+v", r)
	}
}

// What a server does wrong is in the report.
func TestFaultsAreReported(t *testing.T) {
	t.Parallel()
	every := func(n int64, bad [][]byte, frame []byte) ([][]byte, bool) {
		if n%7 == 0 {
			return bad, false
		}
		return [][]byte{frame}, false
	}
	for _, test := range []struct {
		name    string
		fault   fault
		missing bool // frames are waited for that do not come
		found   func(*result) bool
	}{
		{"none", func(n int64, f []byte) ([][]byte, bool) { return [][]byte{f}, false }, false, func(r *result) bool { return r.ok() }},
		{"lost", func(n int64, f []byte) ([][]byte, bool) { return every(n, nil, f) }, true, func(r *result) bool { return r.Lost > 0 }},
		{"twice", func(n int64, f []byte) ([][]byte, bool) { return every(n, [][]byte{f, f}, f) }, false, func(r *result) bool { return r.Wrong > 0 && r.Lost == 0 }},
		{"longer", func(n int64, f []byte) ([][]byte, bool) {
			return every(n, [][]byte{append(f[:len(f):len(f)], ' ')}, f)
		}, true, func(r *result) bool { return r.Wrong > 0 }},
		{"hangs up", func(n int64, f []byte) ([][]byte, bool) { return [][]byte{f}, n == 30 }, true, func(r *result) bool { return r.Closed > 0 }},
	} {
		for _, name := range []string{"relay", "burst"} {
			t.Run(test.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				chosen, err := chooseLoads([]string{name})
				if err != nil {
					t.Fatal(err)
				}
				b := newBench(t, startBadServer(t, test.fault))
				b.bytes = 50 << 10
				if test.missing {
					b.duration, b.quiet = 100*time.Millisecond, 200*time.Millisecond
				}
				r := b.run(chosen[0])
				if !test.found(&r) || r.ok() != (test.name == "none") {
					t.Errorf("%+v", r)
				}
				if r.ServerCPU != nil || r.MemoryPeak != nil {
					t.Errorf("CPU %v and memory %v of a server without metrics", r.ServerCPU, r.MemoryPeak)
				}
			})
		}
	}
}

// A pairing compares what comes with what was sent.
func TestChangedMessage(t *testing.T) {
	b := newBench(t, startBadServer(t, func(_ int64, f []byte) ([][]byte, bool) {
		return [][]byte{[]byte(strings.Replace(string(f), "typ srflx", "typ relay", 1))}, false
	}))
	x, y, err := b.target.pair(b.target, false)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(x, y)
	if err := b.exchange(x, y); err == nil || !strings.Contains(err.Error(), "typ relay") {
		t.Error(err)
	}
}

// The command says in its exit status and its table what it found, and writes it
// to a file.
func TestCommand(t *testing.T) {
	t.Parallel()
	lossy := func(n int64, f []byte) ([][]byte, bool) { return [][]byte{f}[:min(1, n%5)], false }
	sound := func(_ int64, f []byte) ([][]byte, bool) { return [][]byte{f}, false }
	for _, test := range []struct {
		name   string
		fault  fault
		status int
	}{{"sound", sound, 0}, {"lossy", lossy, 1}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "bench.json")
			status, stdout, stderr := call(t, "-url", startBadServer(t, test.fault), "-duration", "100ms", "-hold", "0s",
				"-conns", "4", "-pairs", "2", "-rate", "100", "-json", file, "latency", "idle")
			if status != test.status {
				t.Errorf("exit status %d, want %d", status, test.status)
			}
			wantContains(t, stdout, "CPU µs each", "latency", "–", file)
			wantContains(t, stderr, "latency, 1 of 2", "idle, 2 of 2")
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var rep report
			if err := json.Unmarshal(text, &rep); err != nil {
				t.Fatal(err)
			}
			if len(rep.Results) != 2 || rep.Version != "bad" || rep.Options.Conns != 4 || rep.Machine.CPUs == 0 {
				t.Errorf("%s", text)
			}
			if r := rep.Results[0]; r.Load != "latency" || r.Sent == 0 || (r.Lost > 0) != (test.status > 0) {
				t.Errorf("%s", text)
			}
		})
	}
}

// Nothing is sent anywhere before the call is known to be right.
func TestMisuse(t *testing.T) {
	for _, test := range []struct {
		args string
		says string
	}{
		{"-url http://192.0.2.1:1234", "add -anywhere"},
		{"-url http://parley.example", "add -anywhere"},
		{"-url http://localhost.example:1234", "add -anywhere"},
		{"-url http://[2001:db8::1]:1234", "add -anywhere"},
		{"-url https://localhost", "TLS"},
		{"-url localhost:1234", "want http://host:port"},
		{"-url http://localhost:1234/ws", "want http://host:port"},
		{"-conns 1000000", "want 2 to 200000"},
		{"-bytes 0", "want 1 to"},
		{"-duration 1h", "want at most 10m"},
		{"-members 17", "want 2 to 16"},
		{"-size 10", "want 100 to"},
		{"-nothing", "not defined"},
		{"relays", "there are idle, relay"},
		{"compare -servers nginx relay", "no nginx"},
		{"compare -rounds 0", "want 1 to 100"},
		{"compare nothing", "no load"},
		{"growth nothing", "nothing grows"},
		{"yardstick", "usage"},
	} {
		status, stdout, stderr := call(t, strings.Fields(test.args)...)
		if status != 2 || !strings.Contains(stderr, test.says) || stdout != "" {
			t.Errorf("%s: exit status %d, want 2; %s%s", test.args, status, stdout, stderr)
		}
	}
}

func TestAnywhere(t *testing.T) {
	for url, ok := range map[string]bool{
		"http://localhost": true, "http://127.0.0.1:1": true, "http://127.9.9.9:1": true, "http://[::1]:1": true,
		"http://0.0.0.0:1": false, "http://10.0.0.1:1": false, "http://127.0.0.1.example:1": false,
	} {
		if _, err := newTarget(url, parleyProtocol(), false); (err == nil) != ok {
			t.Errorf("%s: %v", url, err)
		}
		if _, err := newTarget(url, parleyProtocol(), true); err != nil {
			t.Errorf("%s -anywhere: %v", url, err)
		}
	}
}

func TestHelp(t *testing.T) {
	status, stdout, _ := call(t, "-h")
	if status != 0 {
		t.Error("exit status", status)
	}
	wantContains(t, stdout, append(loadNames(), "-anywhere", "-pid", "compare", "growth")...)
	for _, command := range []string{"compare", "growth", "turn"} {
		if status, stdout, _ := call(t, command, "-h"); status != 0 || !strings.Contains(stdout, "-rounds") {
			t.Errorf("%s: exit status %d, %s", command, status, stdout)
		}
	}
}

// A limit that is in the way of a load is reported with what to do about it.
func TestHints(t *testing.T) {
	t.Parallel()
	server := startParley(t, "ROOMS=off", "MAX_SESSIONS=5")
	b := newBench(t, server.url)
	rooms := b.rooms()
	if rooms.Error != errRoomsOff.Error() || rooms.ok() {
		t.Errorf("rooms that are off: %+v", rooms)
	}
	if rooms.skipWhatIsOff(); !rooms.ok() || !rooms.Skipped {
		t.Errorf("rooms that nobody asked for count as a failure: %+v", rooms)
	}
	full := b.mint()
	if full.skipWhatIsOff(); full.ok() || full.Skipped {
		t.Errorf("no capacity: %+v", full)
	}
	wantContains(t, full.Error, "503 at_capacity", "MAX_SESSIONS")
}

// A server that is no parley, or no server.
func TestNoParley(t *testing.T) {
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	status, _, stderr := call(t, "-url", "http://127.0.0.1:"+port, "-pid", "1")
	if status != 1 || !strings.Contains(stderr, "does not answer as parley does") {
		t.Errorf("exit status %d: %s", status, stderr)
	}
}

// A process can be measured where its metrics are not to be had.
func TestMeters(t *testing.T) {
	t.Parallel()
	server := startParley(t, "METRICS_ROUTE=/secret")
	for name, m := range map[string]meter{"process": server.meter, "metrics": metricsMeter(server.url + "/secret")} {
		if u, err := m(); err != nil || u.resident < 1<<20 || u.cpu < 0 || u.cpu > time.Minute {
			t.Errorf("%s: %+v, %v", name, u, err)
		}
	}
	if m, err := chooseMeter(0, server.url+"/metrics"); err != nil {
		t.Error(err)
	} else if _, err := m(); err == nil {
		t.Error("what has no metrics is known all the same")
	}
	if _, err := chooseMeter(1<<30, ""); err == nil {
		t.Error("a process that does not exist is accepted")
	}
}

// The comparison starts its servers, and the ratios are to the yardstick.
func TestCompare(t *testing.T) {
	t.Parallel()
	w := testWorkshop(t)
	servers, err := w.contenders(t.Context(), []string{"yardstick", "parley"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	chosen, err := chooseLoads([]string{"relay", "pairing", "mint"})
	if err != nil {
		t.Fatal(err)
	}
	c := comparison{Rounds: 1}
	var progress, table strings.Builder
	if err := c.measure(t.Context(), small(), servers, chosen, newProgress(&progress)); err != nil {
		t.Fatal(err)
	}
	for _, r := range c.Runs {
		if !r.ok() {
			t.Errorf("%s on %s: %+v", r.Load, r.Server, r.result)
		}
	}
	c.fill()
	c.writeTable(&table, servers)
	wantContains(t, table.String(), "| | yardstick | parley | × |", "server CPU of a whole pairing, µs |", "mint or redeem, µs | – |")
	wantContains(t, progress.String(), "round 1 of 1: pairing on yardstick")
}

func TestComparisonFigures(t *testing.T) {
	run := func(round int, server, load string, cpu float64) oneRun {
		return oneRun{Round: round, Server: server, result: result{Load: load, ServerCPU: &cpu, Done: 1}}
	}
	c := comparison{Runs: []oneRun{
		run(1, "yardstick", "relay", 4), run(2, "yardstick", "relay", 40), run(3, "yardstick", "relay", 5),
		run(1, "parley", "relay", 12), run(2, "parley", "relay", 80), run(3, "parley", "relay", 5),
		run(1, "yardstick", "pairing", 200), run(1, "parley", "mint", 20),
	}}
	c.fill()
	got := map[string]string{}
	for _, r := range c.Rows {
		if cell := r.Servers["parley"]; cell != nil {
			got[r.Load] = fmt.Sprintf("%v %v to %s", cell.Median, *cell.Ratio, r.Against)
		}
	}
	if got["relay"] != "12 2 to relay" || got["mint"] != "20 0.1 to pairing" {
		t.Errorf("%v", got)
	}
}

func TestGrowth(t *testing.T) {
	t.Parallel()
	w := testWorkshop(t)
	var progress strings.Builder
	g := &growth{options: small(), server: w.parleyServer(), source: w.source, bar: newProgress(&progress)}
	g.duration = 200 * time.Millisecond
	g.plan = plan{idle: []int{0, 20}, digits: 4, taken: []int{0, 10}, members: []int{2, 3}}
	rep, err := g.measure(t.Context(), []string{"relay", "mint", "rooms"})
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Curves) != 3 {
		t.Fatalf("%+v", rep)
	}
	for _, c := range rep.Curves {
		if len(c.Points) != 2 || len(c.Points[1].Runs) != 1 {
			t.Errorf("%+v", c)
		}
	}
	var table strings.Builder
	rep.writeTable(&table)
	wantContains(t, table.String(), "idle sessions", "codes taken, %", "members of the room")
}

func TestParseJanitor(t *testing.T) {
	const line = "BenchmarkJanitor-2   	      20	  20962918 ns/op	   3935493 max-lock-ns	     81671 p50-lock-ns	    167108 p99-lock-ns\nPASS\n"
	j, err := parseJanitor([]byte("goos: linux\n" + line))
	if err != nil || *j != (janitor{100_000, 20962.918, 81.671, 167.108, 3935.493}) {
		t.Errorf("%+v, %v", j, err)
	}
	if _, err := parseJanitor([]byte("PASS\n")); err == nil {
		t.Error("no result is accepted")
	}
}
