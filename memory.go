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
		wave, quiet := now.allocatedSince(returned) > now.wave(), now.allocatedSince(last) < now.wave()/8
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

func (u memoryUse) allocatedSince(before memoryUse) uint64 { return u.allocated - before.allocated }

// wave is how much must have been allocated for a collection to be worth it: it
// costs as one of every eighth of the heap would.
func (u memoryUse) wave() uint64 { return u.resident/8 + 4<<20 }
