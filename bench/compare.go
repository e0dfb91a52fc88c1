package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A figure is one number of a result that servers are compared by.
type figure struct {
	load, name, unit string
	value            func(*result) *float64
	// against is the yardstick's load that the ratio is to, if not the same:
	// a yardstick mints no codes, and has no rooms.
	against string
}

func figures() []figure {
	cpu := func(r *result) *float64 { return r.ServerCPU }
	return []figure{
		{"idle", "memory of an idle connection", "bytes", func(r *result) *float64 { return r.MemoryPerConnection }, ""},
		{"relay", "server CPU of a relayed frame", "µs", cpu, ""},
		{"latency", "latency, p50", "µs", func(r *result) *float64 { return p50(r.Latency) }, ""},
		{"latency", "latency, p99", "µs", func(r *result) *float64 { return p99(r.Latency) }, ""},
		{"burst", "burst, server CPU of a frame", "µs", cpu, ""},
		{"burst", "burst, frames lost", "%", lostPercent, ""},
		{"pairing", "server CPU of a whole pairing", "µs", cpu, ""},
		{"mint", "server CPU of a mint or redeem", "µs", cpu, "pairing"},
		{"slow", "beside a slow reader, p99 before", "µs", func(r *result) *float64 { return p99(r.Slow.before()) }, ""},
		{"slow", "beside a slow reader, p99 during", "µs", func(r *result) *float64 { return p99(r.Latency) }, ""},
		{"slow", "beside a slow reader, memory grown", "MB", memoryGrown, ""},
		{"rooms", "server CPU of a frame to one member of a room", "µs", cpu, "relay"},
	}
}

func (s *slowReader) before() *latency {
	if s == nil {
		return nil
	}
	return s.Before
}

func p50(l *latency) *float64 {
	if l == nil {
		return nil
	}
	return &l.P50
}

func p99(l *latency) *float64 {
	if l == nil {
		return nil
	}
	return &l.P99
}

func lostPercent(r *result) *float64 {
	if r.Sent == 0 {
		return nil
	}
	percent := 100 * float64(r.Lost) / float64(r.Sent)
	return &percent
}

func memoryGrown(r *result) *float64 {
	if r.Slow == nil || r.Slow.MemoryGrown == nil {
		return nil
	}
	grown := float64(*r.Slow.MemoryGrown) / 1e6
	return &grown
}

// A comparison is the report of compare.
type comparison struct {
	When    time.Time `json:"when"`
	Machine machine   `json:"machine"`
	Rounds  int       `json:"rounds"`
	Options settings  `json:"options"`
	Rows    []row     `json:"rows"`
	Runs    []oneRun  `json:"runs"`
}

// A row is a figure of all servers.
type row struct {
	Load    string           `json:"load"`
	Figure  string           `json:"figure"`
	Unit    string           `json:"unit"`
	Against string           `json:"ratio_to_yardstick_load"`
	Servers map[string]*cell `json:"servers"`
}

type cell struct {
	Median float64   `json:"median"`
	Ratio  *float64  `json:"ratio"` // to the yardstick, median of those of the rounds
	Runs   []float64 `json:"runs"`
	ratios []float64
}

// A oneRun is a load on one server in one round.
type oneRun struct {
	Round  int    `json:"round"`
	Server string `json:"server"`
	result
}

func compareUsage(w io.Writer) {
	fmt.Fprint(w, "usage: go run ./bench compare [flags] [load…]\n\n"+
		"Starts each server anew for each load, in turn, and prints medians and their ratios to\nthe yardstick's, as Markdown.\n")
}

// runCompare runs the same loads against several servers.
func runCompare(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o := defaults()
	f := o.flags("bench compare")
	f.IntVar(&o.rounds, "rounds", o.rounds, "times that everything is measured")
	names := f.String("servers", "yardstick,parley,peerjs", "servers to compare, separated by commas")
	file := f.String("json", filepath.Join(os.TempDir(), "parley-compare.json"), "file to write all figures to")
	if err := o.parse(f, args, stdout, compareUsage); err != nil {
		return err
	}
	chosen, err := chooseLoads(f.Args())
	if err != nil {
		return misuse{err}
	}
	known := []string{"yardstick", "parley", "peerjs"}
	wanted := strings.Split(*names, ",")
	for _, name := range wanted {
		if !slices.Contains(known, name) {
			return misuse{fmt.Errorf("-servers: there is no %s; there are %s", name, strings.Join(known, ", "))}
		}
	}
	ctx, stop := untilInterrupted(ctx)
	defer stop()
	w, err := openWorkshop(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	servers, err := w.contenders(ctx, wanted, stderr)
	if err != nil {
		return err
	}

	c := comparison{When: time.Now().UTC(), Machine: thisMachine(), Rounds: o.rounds, Options: o.settings()}
	if err := c.measure(ctx, o, servers, chosen, newProgress(stderr)); err != nil {
		return err
	}
	c.fill()
	c.writeTable(stdout, servers)
	if err := writeJSON(*file, c); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "\nall figures:", *file)
	if slices.ContainsFunc(c.Runs, func(r oneRun) bool { return r.Server == "parley" && !r.ok() }) {
		return errFailed
	}
	return nil
}

// measure runs every load against every server in each round.
func (c *comparison) measure(ctx context.Context, o options, servers []contender, chosen []load, bar *progress) error {
	for round := range c.Rounds {
		for _, l := range chosen {
			for i := range servers {
				s := servers[(i+round)%len(servers)] // each round another one is the first
				if !s.has(l) {
					continue
				}
				end := bar.begin(fmt.Sprintf("round %d of %d: %s on %s", round+1, c.Rounds, l.name, s.name))
				r, err := s.measure(ctx, o, l)
				end()
				if err != nil {
					return err
				}
				c.Runs = append(c.Runs, oneRun{round + 1, s.name, r})
			}
		}
	}
	return nil
}

// contenders returns the servers of these names.
func (w *workshop) contenders(ctx context.Context, names []string, stderr io.Writer) (servers []contender, err error) {
	for _, name := range names {
		var s contender
		switch name {
		case "yardstick":
			s, err = w.yardstickServer()
		case "parley":
			s = w.parleyServer()
		case "peerjs":
			s, err = w.peerJSServer(ctx, stderr)
		}
		if err != nil {
			return nil, err
		}
		servers = append(servers, s)
	}
	return servers, nil
}

// has reports whether the server does what the load asks of it.
func (c contender) has(l load) bool {
	return c.name == "parley" || l.name != "mint" && l.name != "rooms"
}

// measure runs a load against a new server.
func (c contender) measure(ctx context.Context, o options, l load) (result, error) {
	server, err := c.start(ctx)
	if err != nil {
		return result{}, err
	}
	defer server.stop()
	t, err := newTarget(server.url, c.protocol(), false)
	if err != nil {
		return result{}, err
	}
	b := &bench{options: o, target: t, meter: server.meter}
	r := b.run(l)
	return r, ctx.Err()
}

// fill makes the rows from the runs.
func (c *comparison) fill() {
	for _, f := range figures() {
		w := row{Load: f.load, Figure: f.name, Unit: f.unit, Against: f.load, Servers: map[string]*cell{}}
		if f.against != "" {
			w.Against = f.against
		}
		base := map[int]float64{} // of the yardstick, by round
		for _, r := range c.Runs {
			if v := f.value(&r.result); v != nil && r.Server == "yardstick" && r.Load == w.Against {
				base[r.Round] = *v
			}
		}
		for _, r := range c.Runs {
			if v := f.value(&r.result); v != nil && r.Load == f.load {
				w.add(r.Server, *v, base[r.Round])
			}
		}
		for _, cell := range w.Servers {
			cell.finish()
		}
		if len(w.Servers) > 0 {
			c.Rows = append(c.Rows, w)
		}
	}
}

// add adds what a server needed in one round, and the yardstick in the same.
func (r *row) add(server string, value, yardstick float64) {
	if r.Servers[server] == nil {
		r.Servers[server] = new(cell)
	}
	cell := r.Servers[server]
	cell.Runs = append(cell.Runs, value)
	if yardstick > 0 {
		cell.ratios = append(cell.ratios, value/yardstick)
	}
}

// finish takes the medians. That of the ratios is not the ratio of the medians:
// one machine is busier in one round than in another, for all servers alike.
func (c *cell) finish() {
	c.Median = median(c.Runs)
	if len(c.ratios) > 0 {
		ratio := median(c.ratios)
		c.Ratio = &ratio
	}
}

// median returns the middle one, of an even number the lower of two.
func median(all []float64) float64 {
	return slices.Sorted(slices.Values(all))[(len(all)-1)/2]
}

func (c *comparison) writeTable(w io.Writer, servers []contender) {
	head, line := "| |", "| --- |"
	for _, s := range servers {
		head += " " + s.name + " |"
		line += " ---: |"
		if s.name != "yardstick" {
			head += " × |"
			line += " ---: |"
		}
	}
	fmt.Fprintf(w, "%s\n%s\n", head, line)
	for _, r := range c.Rows {
		fmt.Fprintf(w, "| %s, %s |", r.Figure, r.Unit)
		for _, s := range servers {
			var value, ratio *float64
			if cell := r.Servers[s.name]; cell != nil {
				value, ratio = &cell.Median, cell.Ratio
			}
			fmt.Fprintf(w, " %s |", number2(value))
			if s.name != "yardstick" {
				fmt.Fprintf(w, " %s |", number2(ratio))
			}
		}
		fmt.Fprintln(w)
	}
	for _, r := range c.Runs {
		if !r.ok() {
			fmt.Fprintf(w, "\nround %d, %s on %s: %d frames lost, %d wrong, %d failed, %d closed. %s\n",
				r.Round, r.Load, r.Server, r.Lost, r.Wrong, r.Failed, r.Closed, r.Error)
		}
	}
}
