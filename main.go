// Command parley introduces two devices to each other: it mints short
// single-use codes, and relays the WebRTC signaling of the two that share one.
//
// # For the operator
//
// Everything is configured by environment variables or flags; parley -h lists
// them. With none it listens on port 1234, keeps all in memory, and accepts
// any browser origin, which is for development: set DEV=false and CORS_ORIGINS
// for everything else.
//
// It prints where it listens on standard output, and logs on standard error. With
// LOG_FORMAT=json each line of both is a JSON object. It
// exits with status 2 when the configuration is wrong, having named everything
// that is; with 1 when it cannot go on, for example because the port is taken;
// and with 0 when it was told to stop.
//
// parley check URL looks at a running server from outside, and says in words
// what is wrong with it, its proxy, or its STUN and TURN servers.
//
// parley healthcheck, with the environment or flags of a server on the same
// machine, exits with 0 when that answers, and otherwise says why not and exits
// with 1.
//
// parley version prints the version, the commit and the Go version of the binary.
//
// SIGTERM or SIGINT begins to drain: /readyz turns 503, nothing new is taken,
// every WebSocket is closed with 1001, and the process is gone within
// DRAIN_TIMEOUT. A second signal ends it at once.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
)

func main() {
	os.Exit(run(os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run is main with its surroundings as parameters. It returns the exit status.
func run(args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	if len(args) > 0 {
		switch args[0] {
		case "check":
			return runCheck(args[1:], stdout, stderr)
		case "healthcheck":
			return runHealthcheck(args[1:], lookup, stdout, stderr)
		case "version":
			fmt.Fprintln(stdout, buildVersion())
			return 0
		}
	}
	cfg, err := loadConfig(args, lookup)
	if errors.Is(err, flag.ErrHelp) {
		writeUsage(stdout)
		return 0
	} else if err != nil {
		reportProblems(stderr, err)
		return 2
	}
	log := newLogger(cfg.logFormat, cfg.logLevel, stderr)
	log.LogAttrs(context.Background(), slog.LevelInfo, "starting", append([]slog.Attr{slog.String("version", buildVersion().Version)}, cfg.startAttrs()...)...)
	for _, w := range cfg.warnings() {
		log.Warn(w)
	}

	stopping := make(chan os.Signal, 2)
	signal.Notify(stopping, syscall.SIGTERM, os.Interrupt)
	defer signal.Stop(stopping)
	if err := serve(cfg, log, stdout, stopping); err != nil {
		log.Error("stopped", "error", err)
		return 1
	}
	return 0
}

// reportProblems writes what is wrong with the configuration, a line each.
func reportProblems(w io.Writer, err error) {
	var bad *configError
	if !errors.As(err, &bad) || bad.logFormat != "json" {
		fmt.Fprintln(w, err)
		return
	}
	log := newLogger(bad.logFormat, slog.LevelError, w)
	for _, problem := range bad.problems {
		log.Error("the configuration is wrong", "error", problem)
	}
}

func newLogger(format string, level slog.Level, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// serve runs a server until stopping receives a signal, or something fails.
func serve(cfg *config, log *slog.Logger, stdout io.Writer, stopping <-chan os.Signal) error {
	p := newParley(cfg, log)
	if err := p.checkBackend(); err != nil {
		return err
	}
	fronts, err := p.openFronts()
	if err != nil {
		return err
	}
	background, stopBackground := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer stopBackground()
	tasks.Go(func() { p.run(background) })
	tasks.Go(func() { returnMemory(background) })
	failed := make(chan error, len(fronts))
	for _, f := range fronts {
		go func() { failed <- f.serve(background) }()
	}
	announce(stdout, cfg, fronts[0].listener.Addr())

	select {
	case err := <-failed:
		return err
	case sig := <-stopping:
		log.Info("draining", "signal", sig.String(), "timeout", cfg.drainTimeout)
	}
	go func() {
		<-stopping
		log.Warn("second signal: exiting at once")
		os.Exit(1)
	}()
	p.shutdown(fronts)
	return nil
}

// announce says where the server listens and what to try first: in words, or with
// LOG_FORMAT=json as a record.
func announce(w io.Writer, cfg *config, addr net.Addr) {
	scheme, curl := "http", "curl -fsS -X POST"
	if cfg.tlsCertFile != "" {
		scheme = "https"
	}
	where, url, others := "unix:"+addr.String(), scheme+"://localhost", ""
	if addr.Network() == "unix" {
		curl += " --unix-socket " + addr.String()
	} else {
		host, port, _ := net.SplitHostPort(addr.String())
		if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
			host = "localhost"
			if local := localNetworkAddress(); cfg.dev && local != "" {
				others = "on other devices: " + scheme + "://" + net.JoinHostPort(local, port) + "\n"
			}
		}
		url = scheme + "://" + net.JoinHostPort(host, port)
		where = url
	}
	version := buildVersion().Version
	if cfg.logFormat == "json" {
		newLogger(cfg.logFormat, slog.LevelInfo, w).Info("listening", "version", version, "address", where)
		return
	}
	text := fmt.Sprintf("parley %s listens on %s\n%stry: %s %s/rendezvous/code\n", version, where, others, curl, url)
	if cfg.dev {
		text = "\n" + text + "\n" // so that a person sees it below the log
	}
	io.WriteString(w, text)
}

// localNetworkAddress returns an address that other devices of a home or office
// network reach this machine at, or "".
func localNetworkAddress() string {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return ""
}

// newParley puts a server together, with everything in this process's memory or
// in the Redis that is configured.
func newParley(cfg *config, log *slog.Logger) *server {
	m := newMetrics()
	queued := &budget{limit: cfg.maxQueuedBytes}
	l := newLimits(cfg)
	code := codeOptions{
		digits: cfg.codeDigits, maxDigits: cfg.codeDigitsMax,
		failures: l.failures.count,
		grown:    func(digits int) { log.Info("new codes have another length", "digits", digits) },
	}
	o := hubOptions{
		maxSessions: cfg.maxSessions,
		sessionTTL:  cfg.sessionTTL,
		resumeTTL:   cfg.resumeTTL,

		roomEmptyTTL: cfg.roomEmptyTTL,
		holdBytes:    1 << 20,
		slowBytes:    max(1<<20, 2*cfg.maxMessage),
		queued:       queued,
		owners:       l.codes,
		dropped:      m.drop,
	}
	if cfg.redisAddress.given() {
		store := newRedisStore(cfg.redisAddress, log, newRedisMetrics(m))
		h, c := newRedisHub(o, store, cfg.heartbeat, redisClock), newRedisCodes(code, store, redisClock)
		m.watch(gauges{
			codes:    c.stats,
			sessions: func() int { return int(h.counts.sessions.Load()) },
			rooms:    func() int { return int(h.counts.rooms.Load()) },
			queued:   func() int64 { return h.counts.queued.Load() + queued.used.Load() },
		})
		s := newServer(cfg, log, m, h, c, l, queued)
		s.backend = store
		return s
	}
	o.frameCost = frameCost
	table, h := newCodeTable(code), newMemoryHub(o)
	m.watch(gauges{
		codes:    table.stats,
		sessions: func() int { return int(h.sessions.Load()) },
		rooms:    func() int { return int(h.rooms.Load()) },
		queued:   queued.used.Load,
	})
	return newServer(cfg, log, m, h, table, l, queued)
}

// Set by the linker, which can only set package variables:
// go build -ldflags "-X main.version=v1.2.3 -X main.commit=abcdef". The commit
// need not be where Go finds it by itself, in a clone with git at hand.
var version, commit string

// unversioned is the version of a binary that was not stamped with one.
const unversioned = "dev"

// versionInfo is the answer to GET /version.
type versionInfo struct {
	Version string `json:"version"`
	Commit  string `json:"commit"`
	Go      string `json:"go"`
}

func (v versionInfo) String() string {
	return fmt.Sprintf("parley %s (commit %s, %s)", v.Version, v.Commit, v.Go)
}

// buildVersion says what this binary was built from, as far as it knows.
func buildVersion() versionInfo {
	v := versionInfo{Version: version, Commit: commit, Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = new(debug.BuildInfo)
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v.Commit == "" {
			v.Commit = s.Value
		}
	}
	v.Commit = cmp.Or(v.Commit, "unknown")
	if v.Version == "" {
		v.Version = info.Main.Version
	}
	if v.Version == "" || v.Version == "(devel)" {
		v.Version = unversioned
	}
	return v
}
