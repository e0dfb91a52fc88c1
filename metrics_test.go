package main

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// Memory is given back once when a wave is over, not while it goes on, and never
// for nothing.
func TestReturnMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go returnMemory(ctx)
		collections := func() uint32 {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.NumForcedGC
		}
		sleep := func(looks int) { time.Sleep(time.Duration(looks) * memoryLook) }
		time.Sleep(memoryLook / 2) // between two looks
		sleep(3)                   // what the tests before have left
		before := collections()
		expect := func(what string, n uint32) {
			t.Helper()
			synctest.Wait()
			if got := collections() - before; got != n {
				t.Errorf("%s: memory was given back %d times, want %d", what, got, n)
			}
		}
		sleep(10)
		expect("nothing happened", 0)
		for range 3 {
			wave := make([][]byte, readMemoryUse().resident/2>>10+16<<10)
			for i := range wave {
				wave[i] = make([]byte, 1<<10)
			}
			runtime.KeepAlive(wave)
			sleep(1)
		}
		expect("during the wave", 0)
		for range 20 { // of which each look alone is far from a wave
			even := make([]byte, readMemoryUse().wave()/4)
			runtime.KeepAlive(even)
			sleep(1)
		}
		expect("under an even load", 0)
		sleep(10)
		expect("after the wave", 1)
	})
}
