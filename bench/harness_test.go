package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"
)

// TestMain also is the yardstick's process, which is this program in any run.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "yardstick" {
		main()
		return
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if shared.workshop != nil {
			shared.close()
		}
		os.Exit(code)
	}))
}

// shared is the one workshop of all tests, which builds parley once.
var shared struct {
	once sync.Once
	*workshop
	err error
}

func testWorkshop(t *testing.T) *workshop {
	t.Helper()
	shared.once.Do(func() { shared.workshop, shared.err = openWorkshop(context.Background()) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.workshop
}

// startParley starts the real server, and returns its address.
func startParley(t *testing.T, env ...string) *child {
	t.Helper()
	c, err := testWorkshop(t).parleyServer().start(t.Context(), env...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.stop)
	return c
}

// small is a load that is over at once. On a busy machine a frame can take long,
// and is waited for.
func small() options {
	o := defaults()
	o.duration, o.hold, o.quiet = 200*time.Millisecond, 20*time.Millisecond, 5*time.Second
	o.conns, o.pairs, o.bursting, o.workers, o.members = 20, 5, 2, 4, 3
	o.rate, o.bytes, o.rounds = 500, 1<<20, 1
	return o
}

// newBench is a small load on a server.
func newBench(t *testing.T, url string) *bench {
	t.Helper()
	target, err := newTarget(url, parleyProtocol(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(target.hangUp)
	if _, err := target.probe(); err != nil {
		t.Fatal(err)
	}
	m, err := chooseMeter(0, url+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	return &bench{options: small(), target: target, meter: m}
}

// A fault says what a bad server makes of the n-th frame it should relay: the
// frames to relay instead, or to hang up.
type fault func(n int64, frame []byte) (frames [][]byte, hangUp bool)

// A badServer pairs as parley does, and relays with a fault.
type badServer struct {
	fault fault
	n     atomic.Int64 // frames to relay so far

	mu    sync.Mutex
	sides map[string][]*websocket.Conn // by session
}

// startBadServer returns its address.
func startBadServer(t *testing.T, f fault) string {
	t.Helper()
	s := &badServer{fault: f, sides: map[string][]*websocket.Conn{}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"version":"bad"}`) })
	mux.HandleFunc("GET /ws", s.serve)
	web := httptest.NewServer(mux)
	t.Cleanup(web.Close)
	return web.URL
}

func (s *badServer) serve(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer c.CloseNow()
	session := r.URL.Query().Get("appID")
	s.mu.Lock()
	s.sides[session] = append(s.sides[session], c)
	sides := s.sides[session]
	s.mu.Unlock()
	if len(sides) == 2 {
		for _, side := range sides {
			side.Write(r.Context(), websocket.MessageText, []byte(`{"type":"room_full"}`))
		}
	}
	for {
		_, frame, err := c.Read(r.Context())
		if err != nil {
			return
		}
		frames, hangUp := s.fault(s.n.Add(1), frame)
		if hangUp {
			return
		}
		for _, frame := range frames {
			s.partner(session, c).Write(r.Context(), websocket.MessageText, frame)
		}
	}
}

func (s *badServer) partner(session string, c *websocket.Conn) *websocket.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sides := s.sides[session]; sides[0] != c {
		return sides[0]
	}
	return s.sides[session][1]
}

// call runs the command, and returns its exit status and what it printed.
func call(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, &out, &errs)
	return status, out.String(), errs.String()
}

func wantContains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in\n%s", part, text)
		}
	}
}
