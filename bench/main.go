// Command bench puts load on a signaling server and measures it.
//
//	go run ./bench -url http://localhost:1234
//	go run ./bench -url http://localhost:1234 relay idle
//
// runs all loads, or those that are named, one after the other: a line on
// standard error says which is running, at the end there is a table, and a JSON
// file with all figures. It exits with status 1 when a frame was lost or
// something failed, and with 2 when it was called wrongly.
//
//	go run ./bench compare
//	go run ./bench growth
//	go run ./bench turn
//
// start servers of their own. The first runs the same loads against parley, a
// PeerJS server, and a yardstick that only forwards; the second measures how the
// cost of parley grows with what it holds; the third relays by parley and by
// coturn. docs/performance.md has the figures.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// errFailed is for a run whose report says what is wrong.
var errFailed = errors.New("something was lost or failed")

// A misuse is an error in how the command was called.
type misuse struct{ error }

// run is main with its surroundings as parameters. It returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := runLoads
	if len(args) > 0 {
		switch args[0] {
		case "compare":
			command, args = runCompare, args[1:]
		case "growth":
			command, args = runGrowth, args[1:]
		case "turn":
			command, args = runTURN, args[1:]
		case "yardstick": // what compare starts
			command, args = runYardstick, args[1:]
		}
	}
	err := command(ctx, args, stdout, stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	fmt.Fprintln(stderr, "bench:", err)
	if wrong := new(misuse); errors.As(err, wrong) {
		return 2
	}
	return 1
}

// flags are those of the loads.
func (o *options) flags(name string) *flag.FlagSet {
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard) // help and errors are printed where they are handled
	f.DurationVar(&o.duration, "duration", o.duration, "how long each load is measured, at most 10m")
	f.DurationVar(&o.hold, "hold", o.hold, "how long idle connections are held before memory is read")
	f.IntVar(&o.conns, "conns", o.conns, "idle connections, at most 200000")
	f.IntVar(&o.pairs, "pairs", o.pairs, "pairs that relay, at most 10000")
	f.IntVar(&o.workers, "workers", o.workers, "pairings, mints and set-ups at a time, at most 256")
	f.IntVar(&o.members, "members", o.members, "members of a room, 2 to 16")
	f.IntVar(&o.rate, "rate", o.rate, "frames a second of latency, over all pairs, at most 200000")
	f.IntVar(&o.size, "size", o.size, "bytes of a frame, 100 to 65536")
	f.Int64Var(&o.bytes, "bytes", o.bytes, "most bytes that burst and slow send as fast as they can, each")
	return f
}

// parse parses flags, and checks that the options are within their bounds. usage
// is what stands above the flags when help is asked for.
func (o *options) parse(f *flag.FlagSet, args []string, stdout io.Writer, usage func(io.Writer)) error {
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		usage(stdout)
		fmt.Fprint(stdout, "\nFlags:\n")
		f.SetOutput(stdout)
		f.PrintDefaults()
		return err
	} else if err != nil {
		return misuse{err}
	}
	for _, b := range []struct {
		name             string
		value, low, high int64
	}{
		{"conns", int64(o.conns), 2, maxConns},
		{"pairs", int64(o.pairs), 1, maxPairs},
		{"workers", int64(o.workers), 1, maxWorkers},
		{"members", int64(o.members), 2, 16},
		{"rate", int64(o.rate), 2, maxRate},
		{"size", int64(o.size), minSize, maxSize},
		{"bytes", o.bytes, 1, maxBytes},
		{"rounds", int64(o.rounds), 1, maxRounds},
	} {
		if b.value < b.low || b.value > b.high {
			return misuse{fmt.Errorf("-%s %d: want %d to %d", b.name, b.value, b.low, b.high)}
		}
	}
	if o.duration <= 0 || o.duration > maxDuration || o.hold < 0 || o.hold > maxDuration {
		return misuse{fmt.Errorf("-duration %v -hold %v: want at most %v", o.duration, o.hold, maxDuration)}
	}
	return nil
}

func loadsUsage(w io.Writer) {
	fmt.Fprint(w, "usage: go run ./bench [flags] [load…]\n"+
		"       go run ./bench compare -h\n"+
		"       go run ./bench growth -h\n"+
		"       go run ./bench turn -h\n\nLoads, all unless some are named:\n")
	for _, l := range loads() {
		fmt.Fprintf(w, "  %-8s %s\n", l.name, l.what)
	}
}

// runLoads puts load on a server that someone else has started.
func runLoads(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	b := &bench{options: defaults()}
	f := b.flags("bench")
	url := f.String("url", "http://localhost:1234", "the server")
	anywhere := f.Bool("anywhere", false, "allow a server on another machine, if it is yours")
	pid := f.Int("pid", 0, "the server's process, if it is a Linux process of this machine; without, its CPU time and memory are taken from the metrics")
	metrics := f.String("metrics", "", "where the server's metrics are, if not at /metrics of -url")
	token := f.String("token", "", "JWT for minting and for opening rooms, where the server asks for one")
	file := f.String("json", filepath.Join(os.TempDir(), "parley-bench.json"), "file to write all figures to")
	if err := b.parse(f, args, stdout, loadsUsage); err != nil {
		return err
	}
	chosen, err := chooseLoads(f.Args())
	if err != nil {
		return misuse{err}
	}
	if b.target, err = newTarget(*url, parleyProtocol(), *anywhere); err != nil {
		return misuse{err}
	}
	b.target.token = *token
	rep := report{When: time.Now().UTC(), Server: *url, Machine: thisMachine(), Options: b.settings()}
	if rep.Version, err = b.target.probe(); err != nil {
		return err
	}
	if *metrics == "" {
		*metrics = b.target.base.JoinPath("metrics").String()
	}
	if b.meter, err = chooseMeter(*pid, *metrics); err != nil {
		return err
	}

	bar := newProgress(stderr)
	for i, l := range chosen {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		end := bar.begin(fmt.Sprintf("%s, %d of %d", l.name, i+1, len(chosen)))
		r := b.run(l)
		end()
		if len(f.Args()) == 0 {
			r.skipWhatIsOff()
		}
		rep.Results = append(rep.Results, r)
	}
	rep.writeTable(stdout)
	if err := writeJSON(*file, rep); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "all figures:", *file)
	if slices.ContainsFunc(rep.Results, func(r result) bool { return !r.ok() }) {
		return errFailed
	}
	return nil
}

// run runs a load.
func (b *bench) run(l load) result {
	defer b.target.hangUp()
	r := l.run(b)
	r.Load = l.name
	return r
}

// chooseLoads returns the loads of these names, or all.
func chooseLoads(names []string) (chosen []load, err error) {
	all := loads()
	if len(names) == 0 {
		return all, nil
	}
	for _, name := range names {
		i := slices.IndexFunc(all, func(l load) bool { return l.name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no load %q (flags go before the loads); there are %s", name, strings.Join(loadNames(), ", "))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

func loadNames() (names []string) {
	for _, l := range loads() {
		names = append(names, l.name)
	}
	return names
}
