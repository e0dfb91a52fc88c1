package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
)

// A result is what one load measured. What is a pointer is null where it is not
// known, or does not belong to the load.
type result struct {
	Load              string   `json:"load"`
	Error             string   `json:"error,omitempty"` // the first
	Skipped           bool     `json:"skipped,omitempty"`
	Seconds           float64  `json:"seconds"` // that were measured
	Connections       int      `json:"connections"`
	ConnectsPerSecond float64  `json:"connects_per_second"`
	Done              uint64   `json:"done"` // frames received, or operations, while measuring
	PerSecond         float64  `json:"per_second"`
	Latency           *latency `json:"latency_us"`
	ServerCPU         *float64 `json:"server_cpu_us"` // of each of those; of each connection that is held
	ServerCores       *float64 `json:"server_cores"`

	MemoryPerConnection *float64 `json:"memory_bytes_per_connection"`
	MemoryPeak          *int64   `json:"memory_peak_bytes"`
	MemoryKept          *float64 `json:"memory_bytes_kept_per_operation"`

	Sent   uint64      `json:"frames_sent"` // times receivers, from the first to the last
	Lost   uint64      `json:"frames_lost"`
	Wrong  uint64      `json:"frames_wrong"`  // received twice, too late, or with another length
	Unsent uint64      `json:"frames_unsent"` // left out, because their sender's earlier ones had not arrived
	Failed int         `json:"failed"`        // pairs, rooms or operations
	Closed int         `json:"closed"`        // connections, by the server
	Slow   *slowReader `json:"slow,omitempty"`
}

// A slowReader is what a reader that stopped reading did to the server.
type slowReader struct {
	Before          *latency `json:"latency_before_us"`
	MemoryGrown     *int64   `json:"memory_grown_bytes"`
	Flooded         int64    `json:"flooded_bytes"`     // towards the one that does not read
	CutAfter        *float64 `json:"cut_after_seconds"` // by the server
	Newcomers       int      `json:"newcomers"`
	NewcomersFailed int      `json:"newcomers_failed"`
	NewcomerSlowest float64  `json:"newcomer_slowest_us"`
}

var errRoomsOff = errors.New("the server has no rooms: start it with ROOMS=open, or with a JWT key and give -token")

// fail notes the first error.
func (r *result) fail(err error) {
	if err != nil && r.Error == "" {
		r.Error = err.Error()
	}
}

// skipWhatIsOff makes no failure of a server without rooms, for when it is not
// rooms that one asked for.
func (r *result) skipWhatIsOff() {
	if r.Error == errRoomsOff.Error() {
		*r = result{Load: r.Load, Error: r.Error, Skipped: true}
	}
}

// spent notes what n things took.
func (r *result) spent(s *span, n uint64) {
	took, cpu := s.used(n)
	r.Done, r.Seconds, r.PerSecond, r.ServerCPU = n, took.Seconds(), perSecond(n, took), cpu
	if cpu != nil {
		cores := *cpu * float64(n) / micros(took)
		r.ServerCores = &cores
	}
}

// count notes what became of all frames.
func (r *result) count(t tally) {
	r.Sent, r.Lost, r.Wrong, r.Closed = t.sent, t.lost, t.wrong, t.closed
}

func perSecond(n uint64, took time.Duration) float64 { return float64(n) / max(took.Seconds(), 1e-9) }

// ok reports whether nothing was lost and nothing failed.
func (r *result) ok() bool {
	if r.Skipped {
		return true
	}
	slow := r.Slow != nil && r.Slow.NewcomersFailed > 0
	nothing := r.Done == 0 && r.Load != "idle"
	return r.Lost == 0 && r.Wrong == 0 && r.Failed == 0 && r.Closed == 0 && !slow && !nothing && r.Error == ""
}

// A report is the results of a run.
type report struct {
	When    time.Time `json:"when"`
	Server  string    `json:"server"`
	Version string    `json:"version"`
	Machine machine   `json:"machine"`
	Options settings  `json:"options"`
	Results []result  `json:"results"`
}

// settings are the options in a report.
type settings struct {
	Seconds float64 `json:"seconds"`
	Hold    float64 `json:"hold_seconds"`
	Conns   int     `json:"conns"`
	Pairs   int     `json:"pairs"`
	Workers int     `json:"workers"`
	Members int     `json:"members"`
	Rate    int     `json:"frames_per_second"`
	Size    int     `json:"frame_bytes"`
	Bytes   int64   `json:"most_bytes"`
}

func (o *options) settings() settings {
	return settings{o.duration.Seconds(), o.hold.Seconds(), o.conns, o.pairs, o.workers, o.members, o.rate, o.size, o.bytes}
}

// A machine is where the load came from, and as a rule the server runs.
type machine struct {
	OS          string `json:"os"`
	Arch        string `json:"arch"`
	CPUs        int    `json:"cpus"`
	Go          string `json:"go"`
	LoadAverage string `json:"load_average"` // of 1, 5 and 15 minutes, "" where that is not known
}

func thisMachine() machine {
	m := machine{OS: runtime.GOOS, Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), Go: runtime.Version()}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		if fields := strings.Fields(string(text)); len(fields) >= 3 {
			m.LoadAverage = strings.Join(fields[:3], " ")
		}
	}
	return m
}

// writeTable writes the results for people.
func (rep *report) writeTable(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "load\tconns\tdone/s\tp50 µs\tp99 µs\tCPU µs each\tmemory\tlost\tfailed\t")
	for _, r := range rep.Results {
		p50, p99 := "–", "–"
		if r.Latency != nil {
			p50, p99 = fmt.Sprintf("%.0f", r.Latency.P50), fmt.Sprintf("%.0f", r.Latency.P99)
		}
		fmt.Fprintf(table, "%s\t%d\t%.0f\t%s\t%s\t%s\t%s\t%d\t%d\t\n", r.Load, r.Connections, r.PerSecond,
			p50, p99, number2(r.ServerCPU), r.memory(), r.Lost+r.Wrong, r.Failed+r.Closed)
	}
	table.Flush()
	for _, r := range rep.Results {
		for _, note := range r.notes() {
			fmt.Fprintf(w, "%s: %s\n", r.Load, note)
		}
	}
}

// memory is the one figure of memory that says the most about this load.
func (r *result) memory() string {
	switch {
	case r.MemoryPerConnection != nil:
		return fmt.Sprintf("%.0f B/conn", *r.MemoryPerConnection)
	case r.MemoryKept != nil:
		return fmt.Sprintf("%.0f B kept each", *r.MemoryKept)
	case r.MemoryPeak != nil:
		return fmt.Sprintf("%.1f MB peak", float64(*r.MemoryPeak)/1e6)
	}
	return "–"
}

// notes are what does not fit into the table.
func (r *result) notes() (notes []string) {
	if r.Skipped {
		notes = append(notes, "skipped: "+r.Error)
	} else if r.Error != "" {
		notes = append(notes, r.Error)
	}
	if r.Wrong > 0 {
		notes = append(notes, fmt.Sprintf("%d frames came twice, too late, or with another length", r.Wrong))
	}
	if r.Closed > 0 {
		notes = append(notes, fmt.Sprintf("the server closed %d connections", r.Closed))
	}
	if r.Unsent > 0 {
		notes = append(notes, fmt.Sprintf("%d frames were left out: %d of their sender had not arrived yet", r.Unsent, inFlight))
	}
	if r.Slow != nil {
		notes = append(notes, r.Slow.String())
	}
	return notes
}

func (s *slowReader) String() string {
	text := fmt.Sprintf("%d newcomers, %d failed, the slowest took %.1f ms; ", s.Newcomers, s.NewcomersFailed, s.NewcomerSlowest/1e3)
	if s.Before != nil {
		text += fmt.Sprintf("the others' p99 was %.0f µs before; ", s.Before.P99)
	}
	if s.MemoryGrown != nil {
		text += fmt.Sprintf("memory grew by %.1f MB; ", float64(*s.MemoryGrown)/1e6)
	}
	if s.CutAfter == nil {
		return text + "who does not read was not cut off in this time"
	}
	return text + fmt.Sprintf("who does not read was cut off after %.1f s", *s.CutAfter)
}

// number2 is a number with two significant digits or more, or a dash.
func number2(n *float64) string {
	switch {
	case n == nil:
		return "–"
	case *n < 10:
		return fmt.Sprintf("%.2f", *n)
	case *n < 100:
		return fmt.Sprintf("%.1f", *n)
	}
	return fmt.Sprintf("%.0f", *n)
}

// writeJSON writes v to a file.
func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
