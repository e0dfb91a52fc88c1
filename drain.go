package main

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
)

// A clientSet is the open connections of a server, which http.Server forgets
// once they are hijacked.
type clientSet struct {
	mu sync.Mutex
	// guarded by mu
	all     map[*client]struct{}
	closed  bool          // nothing is added any more
	drained chan struct{} // closed once the set is closed and empty; nil before
}

// add reports false when the server is draining; the client is in the set all
// the same until it is removed, for it has to be told.
func (s *clientSet) add(c *client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all[c] = struct{}{}
	return !s.closed
}

func (s *clientSet) remove(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, c)
	if s.closed && len(s.all) == 0 {
		s.finish()
	}
}

// finish closes drained, once. The caller holds mu.
func (s *clientSet) finish() {
	select {
	case <-s.drained:
	default:
		close(s.drained)
	}
}

// close makes add report false, and returns a channel that is closed when the
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

// drain takes nothing new, closes every connection with 1001, and returns when
// they are gone. Those left when ctx is done, or closeGrace is over, are cut.
func (s *server) drain(ctx context.Context) {
	s.draining.Store(true)
	drained := s.clients.close()
	s.clients.each(func(c *client) { c.close(closeGoingAway, "server draining") })
	cut := time.NewTimer(closeGrace)
	defer cut.Stop()
	select {
	case <-drained:
		return
	case <-ctx.Done():
	case <-cut.C:
	}
	s.clients.each(func(c *client) { c.abort(closeGoingAway) })
	<-drained
	s.tasks.Wait()
}

// shutdown drains the server and stops web, within DRAIN_TIMEOUT. The listener
// stays until the sockets are closed, so that readyz can be seen to be 503.
func (s *server) shutdown(web *http.Server, served <-chan error) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.cfg.drainTimeout*9/10)
	defer cancel()
	s.drain(ctx)
	if err := web.Shutdown(ctx); err != nil {
		web.Close() // whoever has not finished asking by now
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
