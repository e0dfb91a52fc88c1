package main

import (
	"cmp"
	"context"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// An absentSeat is a seat whose hub does not answer until it is back.
type absentSeat struct {
	seat
	err   error
	back  atomic.Bool
	asked atomic.Int32
}

func (s *absentSeat) Take(_ context.Context, _ uint64, _ int, buf []frame) ([]frame, bool, error) {
	s.asked.Add(1)
	if !s.back.Load() {
		return buf, false, s.err
	}
	return append(buf, frame{typ: typeIce, data: []byte(`{"type":"ice"}`)}), false, nil
}

// A remoteSource is the source of a connection that holds nothing but a seat.
type remoteSource struct {
	endlessSource
	seat *remoteSeat
}

func (s *remoteSource) take(buf []frame, budget int) ([]frame, bool) {
	buf, more, _ := s.seat.Take(context.Background(), noMail, budget, buf)
	return buf, more
}

// What could not be fetched is fetched as soon as the hub is back, though nobody
// says that there is anything; and nobody asks for it without end, or when it is
// too late.
func TestRemoteFetchAgain(t *testing.T) {
	for _, tc := range []struct {
		name    string
		err     error
		closing bool
		back    time.Duration // when the hub is
		within  time.Duration // after which the frame is there; 0 for never
		most    int32         // times that it is asked until it is back
	}{
		{"soon", errBackend, false, time.Second, time.Second, 3},
		{"later", errBackend, false, 2 * time.Minute, 20 * time.Second, 20}, // each ping asks, too
		{"seat lost", errReplaced, false, time.Minute, 0, 1},
		{"closing", errBackend, true, time.Minute, 0, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t) // with a heartbeat of 20 s
				far, near := newMemConns(ts.net.Addr(), ts.net.Addr())
				hub := &absentSeat{err: tc.err}
				c := &conn{connOptions: &ts.connOptions, net: near}
				remote := newRemoteSeat(c)
				remote.seat = hub
				c.src = &remoteSource{seat: remote}
				c.begin(nil)
				t.Cleanup(func() {
					c.abort(closeAbnormal)
					c.timer.Stop()
					synctest.Wait()
				})
				var received lockedBuffer
				go io.Copy(&received, far)
				synctest.Wait()
				if tc.closing {
					c.close(closeGoingAway, "")
				}
				for begin := time.Now(); time.Since(begin) < tc.back; time.Sleep(time.Second) {
					c.touch() // somebody has to be heard of meanwhile
				}
				if n := hub.asked.Load(); n > tc.most || n == 0 {
					t.Errorf("asked %d times, want at most %d", n, tc.most)
				}
				hub.back.Store(true)
				time.Sleep(cmp.Or(tc.within, time.Minute/2))
				synctest.Wait()
				if got := strings.Contains(received.String(), `{"type":"ice"}`); got != (tc.within > 0) {
					t.Errorf("delivered within %v: %v", tc.within, got)
				}
			})
		})
	}
}
