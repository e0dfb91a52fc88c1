package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

// A growth measures how the cost of one thing grows with how much of another
// there is.
type growth struct {
	options
	plan   plan
	server contender
	source string // of parley
	bar    *progress
}

// A plan says how much there is.
type plan struct {
	idle    []int // sessions beside a relay
	digits  int   // of a code
	taken   []int // percent of all codes, rising
	members []int // of a room
	sweeps  int   // of the janitor
}

func fullPlan() plan {
	return plan{
		idle:   []int{0, 100, 1_000, 10_000},
		digits: 6, taken: []int{0, 50, 90},
		members: []int{2, 4, 8, 16},
		sweeps:  100,
	}
}

// A growthReport is the report of growth, and what bench/plot draws.
type growthReport struct {
	When    time.Time `json:"when"`
	Machine machine   `json:"machine"`
	Rounds  int       `json:"rounds"`
	Options settings  `json:"options"`
	Curves  []curve   `json:"curves"`
	Janitor *janitor  `json:"janitor,omitempty"`
}

// A curve is a cost as a function of something.
type curve struct {
	Name   string  `json:"name"`
	X      string  `json:"x"`
	Y      string  `json:"y"`
	Points []point `json:"points"`
}

type point struct {
	X      float64   `json:"x"`
	Median float64   `json:"median_us"`
	Runs   []float64 `json:"runs_us"`
	P99    float64   `json:"p99_us,omitempty"` // of the latency, median of the runs; in a closed loop it goes by the throughput
}

// A janitor is what a pass over all sessions, none of which has ended, costs,
// and for how long it keeps others waiting for a lock.
type janitor struct {
	Sessions int     `json:"sessions"`
	Pass     float64 `json:"pass_us"`
	P50      float64 `json:"p50_lock_us"`
	P99      float64 `json:"p99_lock_us"`
	Max      float64 `json:"max_lock_us"`
}

func growthUsage(w io.Writer) {
	fmt.Fprint(w, "usage: go run ./bench growth [flags] [relay|mint|rooms|janitor…]\n\n"+
		"Starts parley anew for each measurement. What costs how much:\n"+
		"  relay    a relayed frame, beside 0 to 10,000 idle sessions\n"+
		"  mint     a mint or redeem, with 0 to 90 % of a million codes taken (minting those takes a minute)\n"+
		"  rooms    a frame to one member, in rooms of 2 to 16\n"+
		"  janitor  a pass over 100,000 sessions (a benchmark of parley's own)\n")
}

// runGrowth measures all, or what is named.
func runGrowth(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	g := &growth{options: defaults(), plan: fullPlan(), bar: newProgress(stderr)}
	f := g.flags("bench growth")
	f.IntVar(&g.rounds, "rounds", g.rounds, "times that everything is measured")
	file := f.String("json", filepath.Join(os.TempDir(), "parley-growth.json"), "file to write all figures to")
	if err := g.parse(f, args, stdout, growthUsage); err != nil {
		return err
	}
	all := []string{"relay", "mint", "rooms", "janitor"}
	chosen := f.Args()
	if len(chosen) == 0 {
		chosen = all
	}
	for _, name := range chosen {
		if !slices.Contains(all, name) {
			return misuse{fmt.Errorf("nothing grows under the name %q; there are %s", name, strings.Join(all, ", "))}
		}
	}
	ctx, stop := untilInterrupted(ctx)
	defer stop()
	w, err := openWorkshop(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	g.server, g.source = w.parleyServer(), w.source
	rep, err := g.measure(ctx, chosen)
	if err != nil {
		return err
	}
	rep.writeTable(stdout)
	if err := writeJSON(*file, rep); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "all figures:", *file)
	return nil
}

func (g *growth) measure(ctx context.Context, chosen []string) (*growthReport, error) {
	rep := &growthReport{When: time.Now().UTC(), Machine: thisMachine(), Rounds: g.rounds, Options: g.settings()}
	curves := map[string]func(context.Context) (curve, error){"relay": g.relay, "mint": g.mint, "rooms": g.rooms}
	for _, name := range chosen {
		if name == "janitor" {
			j, err := g.janitor(ctx)
			if err != nil {
				return nil, err
			}
			rep.Janitor = j
			continue
		}
		c, err := curves[name](ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		c.Name = name
		rep.Curves = append(rep.Curves, c)
	}
	return rep, nil
}

// relay alternates: each round measures every number of sessions once.
func (g *growth) relay(ctx context.Context) (curve, error) {
	c := curve{X: "idle sessions", Y: "server CPU of a relayed frame, µs"}
	err := g.alternate(ctx, &c, g.plan.idle, (*bench).relayBeside)
	return c, err
}

func (g *growth) rooms(ctx context.Context) (curve, error) {
	c := curve{X: "members of the room", Y: "server CPU of a frame to one member, µs"}
	err := g.alternate(ctx, &c, g.plan.members, func(b *bench, members int) result {
		b.members = members
		return b.rooms()
	})
	return c, err
}

// alternate measures a load at each x, against a new server, and all of them
// again in each round.
func (g *growth) alternate(ctx context.Context, c *curve, xs []int, load func(*bench, int) result) error {
	results := make([][]result, len(xs))
	for round := range g.rounds {
		for i, x := range xs {
			end := g.bar.begin(fmt.Sprintf("round %d of %d: %d %s", round+1, g.rounds, x, c.X))
			err := g.withServer(ctx, func(b *bench) error {
				r := load(b, x)
				results[i] = append(results[i], r)
				return r.problem()
			})
			end()
			if err != nil {
				return err
			}
		}
	}
	for i, x := range xs {
		c.add(float64(x), results[i])
	}
	return nil
}

// mint fills one server up, and measures on the way.
func (g *growth) mint(ctx context.Context) (curve, error) {
	c := curve{X: "codes taken, %", Y: "server CPU of a mint or redeem, µs"}
	space := 1
	for range g.plan.digits {
		space *= 10
	}
	err := g.withServer(ctx, func(b *bench) error {
		b.duration = min(b.duration, time.Second) // what is minted while measuring stays taken too
		minted := 0
		for _, percent := range g.plan.taken {
			end := g.bar.begin(fmt.Sprintf("minting until %d %% of %d codes are taken", percent, space))
			err := b.mintMany(max(0, space/100*percent-minted))
			end()
			if err != nil {
				return err
			}
			minted = max(minted, space/100*percent)
			var results []result
			for range g.rounds {
				r := b.mint()
				if err := r.problem(); err != nil {
					return err
				}
				minted += int(r.Done) / 2
				results = append(results, r)
			}
			c.add(float64(percent), results)
		}
		return nil
	}, fmt.Sprintf("CODE_DIGITS=%d", g.plan.digits))
	return c, err
}

// mintMany mints n codes, which are not redeemed.
func (b *bench) mintMany(n int) error {
	var minted atomic.Int64
	var failed atomic.Pointer[error]
	var workers sync.WaitGroup
	for range b.workers {
		workers.Go(func() {
			for minted.Add(1) <= int64(n) && failed.Load() == nil {
				var code struct{}
				if err := b.target.call(http.MethodPost, "/rendezvous/code", "", &code); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	workers.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// withServer starts parley for the length of one call.
func (g *growth) withServer(ctx context.Context, measure func(*bench) error, env ...string) error {
	server, err := g.server.start(ctx, env...)
	if err != nil {
		return err
	}
	defer server.stop()
	t, err := newTarget(server.url, g.server.protocol(), false)
	if err != nil {
		return err
	}
	defer t.hangUp()
	if err := measure(&bench{options: g.options, target: t, meter: server.meter}); err != nil {
		return err
	}
	return ctx.Err()
}

// problem returns what was lost or failed.
func (r *result) problem() error {
	if r.ok() {
		return nil
	}
	return fmt.Errorf("%w: %d frames lost, %d wrong, %d failed, %d closed. %s", errFailed, r.Lost, r.Wrong, r.Failed, r.Closed, r.Error)
}

// add adds the point of these results.
func (c *curve) add(x float64, results []result) {
	p := point{X: x}
	var p99s []float64
	for _, r := range results {
		if r.ServerCPU != nil {
			p.Runs = append(p.Runs, *r.ServerCPU)
		}
		if r.Latency != nil {
			p99s = append(p99s, r.Latency.P99)
		}
	}
	if len(p.Runs) > 0 {
		p.Median = median(p.Runs)
	}
	if len(p99s) > 0 {
		p.P99 = median(p99s)
	}
	c.Points = append(c.Points, p)
}

// janitor runs parley's own benchmark: from outside a pass cannot be told from
// anything else that takes time.
func (g *growth) janitor(ctx context.Context) (*janitor, error) {
	defer g.bar.begin("the janitor's passes")()
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkJanitor$", "-benchtime", strconv.Itoa(g.plan.sweeps)+"x", ".")
	cmd.Dir = g.source
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go test -bench: %w\n%s", err, out)
	}
	return parseJanitor(out)
}

// parseJanitor reads the line of a benchmark: its name, how often it ran, and
// then numbers with their units.
func parseJanitor(out []byte) (*janitor, error) {
	for line := range bytes.Lines(out) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 || !strings.HasPrefix(fields[0], "BenchmarkJanitor") {
			continue
		}
		j := &janitor{Sessions: 100_000}
		units := map[string]*float64{"ns/op": &j.Pass, "p50-lock-ns": &j.P50, "p99-lock-ns": &j.P99, "max-lock-ns": &j.Max}
		for i := 2; i+1 < len(fields); i += 2 {
			if value := units[fields[i+1]]; value != nil {
				ns, err := strconv.ParseFloat(fields[i], 64)
				if err != nil {
					return nil, err
				}
				*value = ns / 1e3
			}
		}
		return j, nil
	}
	return nil, fmt.Errorf("the benchmark printed no result:\n%s", out)
}

func (rep *growthReport) writeTable(w io.Writer) {
	for _, c := range rep.Curves {
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintf(table, "%s\t%s\truns\t\n", c.X, c.Y)
		for _, p := range c.Points {
			var runs []string
			for _, run := range p.Runs {
				runs = append(runs, number2(&run))
			}
			fmt.Fprintf(table, "%.0f\t%s\t%s\t\n", p.X, number2(&p.Median), strings.Join(runs, " "))
		}
		table.Flush()
	}
	if j := rep.Janitor; j != nil {
		fmt.Fprintf(w, "janitor, %d sessions: a pass takes %.0f µs; it holds one lock for %.0f µs (p50), %.0f µs (p99), %.0f µs at the most\n",
			j.Sessions, j.Pass, j.P50, j.P99, j.Max)
	}
}
