package main

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
)

// newBenchHandler returns the routes of a server that is not otherwise running.
func newBenchHandler(b testing.TB) http.Handler {
	cfg, err := loadConfig(nil, lookupIn([]string{"CODE_DIGITS=8", "MAX_SESSIONS=0"}))
	if err != nil {
		b.Fatal(err)
	}
	return newParley(cfg, slog.New(slog.DiscardHandler)).handler()
}

// A call is a request that is made again and again, and its answer. Making it
// allocates nothing that net/http would not.
type call struct {
	handler http.Handler
	request *http.Request
	body    *bytes.Reader
	header  http.Header
	status  int
	answer  bytes.Buffer
}

func newCall(h http.Handler, path string) *call {
	c := &call{handler: h, body: new(bytes.Reader), header: make(http.Header)}
	c.request = httptest.NewRequest("POST", path, http.NoBody)
	c.request.Header.Set("Content-Type", "application/json")
	c.request.Header.Set("User-Agent", "bench")
	return c
}

func (c *call) Header() http.Header         { return c.header }
func (c *call) WriteHeader(status int)      { c.status = status }
func (c *call) Write(p []byte) (int, error) { return c.answer.Write(p) }

func (c *call) make(b *testing.B, body []byte) []byte {
	clear(c.header)
	c.answer.Reset()
	if c.request.Body = http.NoBody; body != nil {
		c.body.Reset(body)
		c.request.Body = io.NopCloser(c.body)
	}
	c.request.ContentLength = int64(len(body))
	c.handler.ServeHTTP(c, c.request)
	if c.status != http.StatusOK {
		b.Fatal(c.status, c.answer.String())
	}
	return c.answer.Bytes()
}

// BenchmarkCalls is what POST /rendezvous/code and /rendezvous/redeem, one after
// the other, cost besides HTTP itself.
func BenchmarkCalls(b *testing.B) {
	handler := newBenchHandler(b)
	mint, redeem := newCall(handler, "/rendezvous/code"), newCall(handler, "/rendezvous/redeem")
	body := []byte(`{"code":"00000000"}`)
	b.ReportAllocs()
	for b.Loop() {
		_, code, _ := bytes.Cut(mint.make(b, nil), []byte(`"code":"`))
		copy(body[len(`{"code":"`):], code[:8])
		redeem.make(b, body)
	}
}
