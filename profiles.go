package main

import (
	"net/http"
	"net/http/pprof"
	"runtime"
	"strings"
	"sync"
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
//
// There is no cmdline: flags may be secrets. And a page in a browser may ask for
// none, of whatever origin.
func withProfiles(next http.Handler) http.Handler {
	var locks sync.Mutex // held while what a mutex or block profile sets is set
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, profilesPath)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		if len(r.Header["Origin"]) > 0 || name == "cmdline" {
			http.NotFound(w, r)
			return
		}
		switch name {
		case "profile":
			pprof.Profile(w, r)
		case "symbol":
			pprof.Symbol(w, r)
		case "trace":
			pprof.Trace(w, r)
		case "mutex", "block":
			// Of these there is something to see only for ?seconds=: noting them
			// always would slow everyone down.
			locks.Lock()
			defer locks.Unlock()
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
