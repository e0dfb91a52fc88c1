package main

import (
	"net/http"
	"net/http/pprof"
	"runtime"
	"strings"
)

// profilesPath is where the listener of METRICS_ADDR has the runtime's profiles
// (https://go.dev/blog/pprof), which are nowhere else: they tell too much, and
// cost too much, to be had by anyone.
const profilesPath = "/debug/pprof/"

// How often locks and waits are noted while a profile of them is taken: each
// event, and each that blocks for so long.
const (
	mutexFraction = 1
	blockRate     = 10_000 // ns
)

// withProfiles serves profiles, and everything else by next.
func withProfiles(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, profilesPath)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		switch name {
		case "cmdline":
			pprof.Cmdline(w, r)
		case "profile":
			pprof.Profile(w, r)
		case "symbol":
			pprof.Symbol(w, r)
		case "trace":
			pprof.Trace(w, r)
		case "mutex", "block":
			// Of these there is something to see only for ?seconds=: noting them
			// always would slow everyone down.
			runtime.SetMutexProfileFraction(mutexFraction)
			runtime.SetBlockProfileRate(blockRate)
			defer runtime.SetMutexProfileFraction(0)
			defer runtime.SetBlockProfileRate(0)
			pprof.Index(w, r)
		default:
			pprof.Index(w, r)
		}
	})
}
