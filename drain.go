package main

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// A clientSet is the open connections of a server, which http.Server forgets
// once they are hijacked.
type clientSet struct {
	max int // 0 for no limit

	mu sync.Mutex
	// guarded by mu
	all     map[*client]struct{}
	closed  bool          // nothing is added any more
	drained chan struct{} // closed once the set is closed and empty; nil before
}

// errConns refuses a connection; like the other limits on connections it is
// always answered as HTTP.
var errConns = &apiError{status: http.StatusServiceUnavailable, code: "at_capacity",
	text: "the server has as many connections as it may"}

// add fails with errConns, and, when the server is draining, with errDraining:
// then the client is in the set all the same, for it may have to be told.
func (s *clientSet) add(c *client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.max > 0 && len(s.all) >= s.max {
		return errConns
	}
	s.all[c] = struct{}{}
	if s.closed {
		return errDraining
	}
	return nil
}

func (s *clientSet) remove(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, c)
	if s.closed && len(s.all) == 0 {
		s.finish()
	}
}

func (s *clientSet) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all)
}

// finish closes drained, once. The caller holds mu.
func (s *clientSet) finish() {
	select {
	case <-s.drained:
	default:
		close(s.drained)
	}
}

// close makes add fail, and returns a channel that is closed when the
// set is empty.
func (s *clientSet) close() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.drained == nil {
		s.drained = make(chan struct{})
	}
	if len(s.all) == 0 {
		s.finish()
	}
	return s.drained
}

// each calls f for every client that is in the set now.
func (s *clientSet) each(f func(*client)) {
	s.mu.Lock()
	all := make([]*client, 0, len(s.all))
	for c := range s.all {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		f(c)
	}
}

// A taskGroup counts goroutines that work for connections. Unlike with a
// sync.WaitGroup more may begin while somebody waits: whoever is refused during a
// drain is told, which may take one.
type taskGroup struct {
	running atomic.Int64
	idle    chan struct{} // of capacity 1: has a token if none ran at some time
}

func newTaskGroup() *taskGroup { return &taskGroup{idle: make(chan struct{}, 1)} }

// Go runs f in a goroutine.
func (g *taskGroup) Go(f func()) {
	g.running.Add(1)
	go func() {
		defer g.done()
		f()
	}()
}

func (g *taskGroup) done() {
	if g.running.Add(-1) > 0 {
		return
	}
	select {
	case g.idle <- struct{}{}:
	default:
	}
}

// wait returns once there was a moment at which none ran. One may wait at a time.
func (g *taskGroup) wait() {
	for g.running.Load() > 0 {
		<-g.idle
	}
}

// drain takes nothing new, closes every connection with 1001, and returns when
// they are gone, and all that worked for them. Those left when ctx is done, or
// closeGrace is over, are cut. What hangs even then is left behind.
func (s *server) drain(ctx context.Context) {
	s.draining.Store(true)
	drained := s.clients.close()
	s.clients.each(func(c *client) { c.close(closeGoingAway, "server draining") })
	graceful, cancel := context.WithTimeout(ctx, closeGrace)
	defer cancel()
	select {
	case <-drained:
	case <-graceful.Done():
		s.clients.each(func(c *client) { c.abort(closeGoingAway) })
	}
	finished := make(chan struct{})
	go func() {
		<-drained
		s.tasks.wait()
		close(finished)
	}()
	select {
	case <-finished:
		return
	case <-ctx.Done(): // their seats cannot be left in time
	}
	if s.backend != nil {
		s.backend.close()
	}
	last := time.NewTimer(s.cfg.drainTimeout / 20)
	defer last.Stop()
	select {
	case <-finished:
	case <-last.C:
		s.log.Warn("not everything ended in time", "connections", s.clients.count())
	}
}

// shutdown drains the server and stops listening, within DRAIN_TIMEOUT. The
// listeners stay until the sockets are closed, so that readyz can be seen to be
// 503.
func (s *server) shutdown(fronts []front) {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.drainTimeout*9/10)
	defer cancel()
	s.drain(ctx)
	for _, f := range fronts {
		if err := f.web.Shutdown(ctx); err != nil {
			f.web.Close() // whoever has not finished asking by now
		}
	}
	if s.turn != nil {
		s.turn.close() // last, so that peers who are told have time to leave
	}
}
