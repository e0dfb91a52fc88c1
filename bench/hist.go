package main

import (
	"math/bits"
	"time"
)

// A histogram counts durations in buckets of which none is more than 1.6 % wide.
type histogram struct {
	n      uint64
	max    time.Duration
	bucket [64 * 64]uint64
}

func (h *histogram) add(d time.Duration) {
	h.n++
	h.max = max(h.max, d)
	h.bucket[bucketOf(uint64(max(d, 0)))]++
}

func (h *histogram) merge(other *histogram) {
	h.n += other.n
	h.max = max(h.max, other.max)
	for i, n := range other.bucket {
		h.bucket[i] += n
	}
}

// Below 128 ns each nanosecond has its bucket, and from there on each power of
// two has 64.
func bucketOf(ns uint64) int {
	width := bits.Len64(ns)
	if width <= 7 {
		return int(ns)
	}
	return (width-6)<<6 | int(ns>>(width-7))&63
}

// middleOf returns the middle of a bucket.
func middleOf(bucket int) time.Duration {
	if bucket < 128 {
		return time.Duration(bucket)
	}
	shift := bucket>>6 - 1
	low := uint64(64+bucket&63) << shift
	return time.Duration(low + 1<<shift/2)
}

func (h *histogram) quantile(q float64) time.Duration {
	rank, seen := uint64(q*float64(h.n)), uint64(0)
	for i, n := range h.bucket {
		if seen += n; seen > rank {
			return min(h.max, middleOf(i))
		}
	}
	return h.max
}

// A latency is a histogram in a report, in microseconds.
type latency struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

func (h *histogram) latency() *latency {
	if h.n == 0 {
		return nil
	}
	return &latency{P50: micros(h.quantile(.50)), P99: micros(h.quantile(.99)), Max: micros(h.max)}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
