package main

import (
	"context"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"time"
)

// memoryLook is the time between two looks at whether memory should be given
// back.
const memoryLook = 2 * time.Second

// returnMemory gives memory that a wave of connections has left behind back to
// the system, until ctx is done. By itself the collector would run again when as
// much again has been allocated, which idle connections do not do for hours.
func returnMemory(ctx context.Context) {
	var last, returned memoryUse
	every(ctx, memoryLook, func() {
		now := readMemoryUse()
		wave, quiet := now.grown(returned), !now.grown(last)
		if last = now; wave && quiet {
			debug.FreeOSMemory()
			returned = now
		}
	})
}

// memoryUse is what the runtime knows of its heap, in bytes.
type memoryUse struct {
	allocated uint64 // ever
	resident  uint64
}

func readMemoryUse() memoryUse {
	samples := []runtimemetrics.Sample{
		{Name: "/gc/heap/allocs:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	runtimemetrics.Read(samples)
	u := memoryUse{allocated: samples[0].Value.Uint64()}
	for _, s := range samples[1:] {
		u.resident += s.Value.Uint64()
	}
	return u
}

// grown reports whether since before so much was allocated that a collection is
// worth it: it costs as one of every eighth of the heap would.
func (u memoryUse) grown(before memoryUse) bool {
	return u.allocated-before.allocated > u.resident/8+4<<20
}
