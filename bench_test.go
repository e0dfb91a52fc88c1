package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"parley/test/testkit"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// withoutRace says that this run is without the race detector.
var withoutRace bool

// TestWithoutRace runs the tests that the race detector would make meaningless
// in a run of their own.
func TestWithoutRace(t *testing.T) {
	t.Parallel()
	if withoutRace {
		return // they are part of this one
	}
	run := exec.CommandContext(t.Context(), "go", "test", "-race=false", "-vet=off", "-count=1", "-run", "^TestAllocs", "-benchtime", "2000x", ".")
	out, err := run.CombinedOutput()
	if err != nil || strings.Contains(string(out), "no tests to run") {
		t.Errorf("%v\n%s", err, out)
	}
}

// iceFrame is a frame of 500 bytes as browsers send them.
var iceFrame = func() []byte {
	candidate := "candidate:842163049 1 udp 1677729535 203.0.113.77 46154 typ srflx raddr 192.168.1.7 rport 46154 generation 0 ufrag "
	const head, tail = `{"type":"ice","candidate":{"candidate":"`, `","sdpMid":"0","sdpMLineIndex":0,"usernameFragment":"kW3d"}}`
	return []byte(head + candidate + strings.Repeat("x", 500-len(head)-len(candidate)-len(tail)) + tail)
}()

// newBenchHub returns a hub that bounds what waits and nothing else.
func newBenchHub(queued *budget) *memoryHub {
	return newMemoryHub(hubOptions{
		sessionTTL: time.Minute, resumeTTL: time.Minute, roomEmptyTTL: time.Minute, holdBytes: 1 << 20, slowBytes: 1 << 20,
		queued: queued, frameCost: frameCost, owners: newQuota(0), dropped: func(dropReason, int) {},
	})
}

// A relay is two seated connections and what frames pass between them, without
// the sockets.
type relay struct {
	t        testing.TB
	a, b     seat
	buffers  bufferPool
	decoders *sync.Pool
	queued   *budget
	taken    []frame
}

func newRelay(t testing.TB) *relay {
	r := &relay{t: t, decoders: newFrameDecoderPool(), queued: new(budget), taken: make([]frame, 0, 16)}
	h := newBenchHub(r.queued)
	id := uuid.New()
	for name, s := range map[string]*seat{"A": &r.a, "B": &r.b} {
		var err error
		if *s, _, err = h.Join(ctx, id, joinRequest{name: name, create: true}, func(error) {}); err != nil {
			t.Fatal(err)
		}
	}
	r.take()
	return r
}

// one relays a frame as a connection does, and lets the other side take it.
func (r *relay) one(take bool) {
	buf := r.buffers.get(len(iceFrame))
	data := buf.b[:copy(buf.b, iceFrame)]
	d := r.decoders.Get().(*frameDecoder)
	m, err := d.decode(data)
	r.decoders.Put(d)
	if err != nil || m.typ != typeIce {
		r.t.Fatal(m.typ, err)
	}
	if _, err := r.a.Post(ctx, "B", frame{typ: m.typ, data: data, buf: buf}, !take); err != nil {
		r.t.Fatal(err)
	}
	if take && r.take() != 1 {
		r.t.Fatal("the frame is not there")
	}
}

func (r *relay) take() int {
	taken, _, err := r.b.Take(ctx, noMail, 64<<10, r.taken)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range taken {
		taken[i].release()
	}
	return len(taken)
}

func BenchmarkDecodeFrame(b *testing.B) {
	if len(iceFrame) != 500 || !json.Valid(iceFrame) {
		b.Fatalf("%d bytes", len(iceFrame))
	}
	d := newFrameDecoderPool().New().(*frameDecoder)
	b.ReportAllocs()
	b.SetBytes(int64(len(iceFrame)))
	for b.Loop() {
		if _, err := d.decode(iceFrame); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRelay is what a relayed frame costs besides reading and writing it.
func BenchmarkRelay(b *testing.B) {
	r := newRelay(b)
	b.ReportAllocs()
	for b.Loop() {
		r.one(true)
	}
}

// BenchmarkWire is a frame through the kernel from one client to the other, and
// one back, in some 64 sessions at once; the clients are a part of what it costs.
func BenchmarkWire(b *testing.B) {
	_, base := newSocketServer(b, "LOG_LEVEL=error")
	frame, size := masked(finText, string(iceFrame)), len(appendText(nil, iceFrame))
	perProcessor := max(1, 64/runtime.GOMAXPROCS(0))
	pairs := make([]struct{ left, right *rawClient }, perProcessor*runtime.GOMAXPROCS(0))
	for i := range pairs {
		pairs[i].left, pairs[i].right = socketPair(b, base, uuid.NewString(), nil)
	}
	var next atomic.Int32
	b.ReportAllocs()
	b.SetParallelism(perProcessor)
	b.ResetTimer()
	before := processorTime(b)
	b.RunParallel(func(p *testing.PB) {
		pair := pairs[next.Add(1)-1]
		buf := make([]byte, size)
		pass := func(from, to *rawClient) error {
			if _, err := from.conn.Write(frame); err != nil {
				return err
			}
			_, err := io.ReadFull(to.br, buf)
			return err
		}
		for p.Next() {
			if err := errors.Join(pass(pair.left, pair.right), pass(pair.right, pair.left)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(processorTime(b)-before)/float64(b.N), "cpu-ns/op")
}

// processorTime is what this process has used.
func processorTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkJoin is a client's whole visit: connect, upgrade, take a seat, leave.
// The client's own part is in it.
func BenchmarkJoin(b *testing.B) {
	_, base := newSocketServer(b, "LOG_LEVEL=error")
	addr := strings.TrimPrefix(base, "http://")
	hello := []byte("GET /ws?appID=" + uuid.NewString() + "&side=A HTTP/1.1\r\nHost: " + addr +
		"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
	bye := masked(0x80|opClose, "\x03\xe8")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		conn.Write(hello)
		if n, err := conn.Read(buf); !bytes.HasPrefix(buf[:n], []byte("HTTP/1.1 101")) {
			b.Fatal(string(buf[:n]), err)
		}
		conn.Write(bye)
		if _, err := io.Copy(io.Discard, conn); err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}

// BenchmarkMail is one message from a mailbox's entrance to its acknowledgement.
func BenchmarkMail(b *testing.B) {
	r := newRelay(b)
	b.ReportAllocs()
	for b.Loop() {
		buf := r.buffers.get(len(iceFrame))
		data := buf.b[:copy(buf.b, iceFrame)]
		receipt, err := r.a.Post(ctx, "B", frame{kind: kindMail, data: data, buf: buf}, false)
		if err != nil {
			b.Fatal(err)
		}
		taken, _, err := r.b.Take(ctx, receipt.seq-1, 64<<10, r.taken)
		if err != nil || len(taken) != 1 {
			b.Fatal(len(taken), err)
		}
		if err := r.b.Ack(ctx, receipt.seq); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRoom is a frame of one member to all others of a room.
func BenchmarkRoom(b *testing.B) {
	for _, members := range []int{2, 4, 16} {
		b.Run(fmt.Sprint(members), func(b *testing.B) { benchRoom(b, members) })
	}
}

func benchRoom(b *testing.B, members int) {
	h := newBenchHub(new(budget))
	m := meta{ID: uuid.New(), Expires: time.Now().Add(time.Hour), Room: &roomMeta{Code: "ABC234", Max: members}}
	if err := h.Open(ctx, m); err != nil {
		b.Fatal(err)
	}
	seats := make([]seat, members)
	buf := make([]frame, 0, 64)
	takeAll := func() {
		for _, s := range seats[1:] {
			taken, _, err := s.Take(ctx, noMail, 64<<10, buf)
			if err != nil || len(taken) == 0 {
				b.Fatal(len(taken), err)
			}
			for i := range taken {
				taken[i].release()
			}
		}
	}
	for i := range seats {
		var err error
		r := joinRequest{room: true, name: uuid.NewString(), displayName: "x", claim: claim{byte(i + 1)}}
		if seats[i], _, err = h.Join(ctx, m.ID, r, func(error) {}); err != nil {
			b.Fatal(err)
		}
	}
	for i := range seats { // each saw the later ones come
		if _, _, err := seats[i].Take(ctx, noMail, 64<<10, buf); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := seats[0].Post(ctx, "", frame{typ: typeOffer, data: iceFrame}, false); err != nil {
			b.Fatal(err)
		}
		takeAll()
	}
}

// BenchmarkCaller is what finding out who calls costs, and counting it.
func BenchmarkCaller(b *testing.B) {
	cfg, err := loadConfig(nil, lookupIn([]string{"DEV=false", "TRUSTED_PROXIES=10.0.0.0/8", "HTTP_RATE_PER_MIN=1000000000"}))
	if err != nil {
		b.Fatal(err)
	}
	callers, l := newCallerPolicy(cfg, slog.New(slog.DiscardHandler), newMetrics().untrusted), newLimits(cfg)
	r := httptest.NewRequest("POST", "/rendezvous/redeem", nil)
	r.RemoteAddr = "10.0.0.1:1234"
	r.Header.Set("X-Forwarded-For", "203.0.113.77")
	b.ReportAllocs()
	for b.Loop() {
		c := callers.identify(r)
		if ok, _ := l.http.allow(c.network); !ok {
			b.Fatal("not allowed")
		}
		done, _ := l.guesses.begin(ctx, c.network, "2802")
		done(false)
	}
}

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

// BenchmarkMintRedeem is the whole life of a code, from mint to reclaim, with
// more and more of the others taken. The ratio is to the time in an empty table.
func BenchmarkMintRedeem(b *testing.B) {
	var empty float64
	for _, taken := range []int{0, 9_000, 9_990} {
		b.Run(fmt.Sprintf("taken=%d", taken), func(b *testing.B) {
			table := newTestTable(4, 4)
			fillCodes(table, 4, taken, time.Now().Add(time.Hour))
			session := uuid.New()
			b.ReportAllocs()
			for b.Loop() {
				code, expires, err := table.Mint(ctx, session, time.Minute)
				if err != nil {
					b.Fatal(err)
				}
				if _, _, err := table.Redeem(ctx, code); err != nil {
					b.Fatal(err)
				}
				table.mu.Lock()
				table.reclaim(expires.Sub(table.start)) // of just this one
				table.mu.Unlock()
			}
			perOp := float64(b.Elapsed()) / float64(b.N)
			if taken == 0 {
				empty = perOp
			}
			if empty > 0 {
				b.ReportMetric(perOp/empty, "x-empty")
			}
		})
	}
}

// BenchmarkJanitor is a pass over 100,000 sessions none of which has ended.
func BenchmarkJanitor(b *testing.B) {
	h := newBenchHub(new(budget))
	for i := range 100_000 {
		id := uuid.New()
		if err := h.Open(ctx, meta{ID: id, Expires: time.Now().Add(time.Hour)}); err != nil {
			b.Fatal(err)
		}
		if i%2 == 0 { // half of them with a connection
			if _, _, err := h.Join(ctx, id, joinRequest{name: "A"}, func(error) {}); err != nil {
				b.Fatal(err)
			}
		}
	}
	holds := make(lockHolds, 0, 1<<20)
	b.ReportAllocs()
	for b.Loop() {
		now := time.Now()
		for i := range h.shards {
			begin := time.Now()
			h.shards[i].sweep(now)
			holds.add(time.Since(begin))
		}
	}
	holds.report(b)
}

// BenchmarkSweepCodes is a pass that finds 10,000 expired codes.
func BenchmarkSweepCodes(b *testing.B) {
	table := newTestTable(6, 6)
	holds := make(lockHolds, 0, 1<<20)
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		fillCodes(table, 6, 10_000, now.Add(-time.Second))
		b.StartTimer()
		for more := true; more; {
			begin := time.Now()
			table.mu.Lock()
			more = table.reclaim(now.Sub(table.start))
			table.mu.Unlock()
			holds.add(time.Since(begin))
		}
	}
	holds.report(b)
	if active, _ := table.stats(); active > 0 {
		b.Error(active, "codes left")
	}
}

// lockHolds are durations for which a lock was held.
type lockHolds []time.Duration

func (h *lockHolds) add(d time.Duration) { *h = append(*h, d) }

// report reports the longest, and what is usual: the longest also shows when
// something else was given the processor meanwhile.
func (h lockHolds) report(b *testing.B) {
	slices.Sort(h)
	b.ReportMetric(float64(h[len(h)-1]), "max-lock-ns")
	b.ReportMetric(float64(h[len(h)*99/100]), "p99-lock-ns")
	b.ReportMetric(float64(h[len(h)/2]), "p50-lock-ns")
}

// benchHub is a hub on a real Redis that runs until the benchmark ends.
func benchHub(b *testing.B, addr string) *redisHub {
	h := newRedisHub(hubOptions{
		sessionTTL: 10 * time.Minute, resumeTTL: time.Minute, roomEmptyTTL: 5 * time.Minute, holdBytes: 1 << 20, slowBytes: 2 << 20,
		queued: &budget{limit: 256 << 20}, owners: newQuota(0), dropped: func(dropReason, int) {},
	}, newTestStore(b, redis.Options{Addr: addr}), 20*time.Second, redisClock)
	b.Cleanup(startHub(h))
	testkit.Eventually(b, "the hub is ready", func() bool { return h.Ready(ctx) == nil })
	return h
}

// BenchmarkRedisPublish is what the others are measured by: PUBLISH, and the
// message back over another connection.
func BenchmarkRedisPublish(b *testing.B) {
	server := testkit.StartRedis(b)
	client := server.Client()
	channel := client.Subscribe(ctx, "bench")
	defer channel.Close()
	if _, err := channel.Receive(ctx); err != nil {
		b.Fatal(err)
	}
	messages := channel.Channel()
	for b.Loop() {
		if err := client.Publish(ctx, "bench", "n123456").Err(); err != nil {
			b.Fatal(err)
		}
		<-messages
	}
}

// BenchmarkRedisRelay is a frame from one instance to another: posted, notified
// and taken.
func BenchmarkRedisRelay(b *testing.B) {
	server := testkit.StartRedis(b)
	here, there := benchHub(b, server.Addr), benchHub(b, server.Addr)
	id := uuid.New()
	woken := make(chan struct{}, 1000)
	receiver, _, err := there.Join(ctx, id, joinRequest{name: "B", create: true}, func(error) { woken <- struct{}{} })
	if err != nil {
		b.Fatal(err)
	}
	sender, _, err := here.Join(ctx, id, joinRequest{name: "A", create: true}, func(error) {})
	if err != nil {
		b.Fatal(err)
	}
	<-woken
	buf := make([]frame, 0, 32)
	receiver.Take(ctx, noMail, 1<<20, buf)
	data := []byte(strings.Repeat("x", 500))
	for b.Loop() {
		if _, err := sender.Post(ctx, "", frame{kind: kindRelay, typ: typeIce, data: data}, false); err != nil {
			b.Fatal(err)
		}
		for got := 0; got == 0; {
			<-woken
			frames, _, err := receiver.Take(ctx, noMail, 1<<20, buf[:0])
			if err != nil {
				b.Fatal(err)
			}
			got = len(frames)
		}
	}
}

// BenchmarkRedisLook is the look at 64 seats that each heartbeat takes, and what
// it costs Redis for one of them.
func BenchmarkRedisLook(b *testing.B) {
	server := testkit.StartRedis(b)
	client, h := server.Client(), benchHub(b, server.Addr)
	for range lookBatch / 2 {
		id := uuid.New()
		for _, name := range []string{"A", "B"} {
			if _, _, err := h.Join(ctx, id, joinRequest{name: name, create: true}, func(error) {}); err != nil {
				b.Fatal(err)
			}
		}
	}
	before := redisCPU(b, client)
	b.ResetTimer()
	for range b.N {
		if err := h.lookAtAll(ctx); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	b.ReportMetric((redisCPU(b, client)-before)/float64(b.N)/lookBatch*1e9, "redis-cpu-ns/seat")
}

// BenchmarkRedisPairing is all that a pairing asks of Redis but its frames: a
// session and its code, two seats taken and left.
func BenchmarkRedisPairing(b *testing.B) {
	server := testkit.StartRedis(b)
	client, h := server.Client(), benchHub(b, server.Addr)
	codes := newRedisCodes(codeOptions{digits: 9, maxDigits: 9, failures: func() int { return 0 }, grown: func(int) {}},
		newTestStore(b, redis.Options{Addr: server.Addr}), redisClock)
	before := redisCPU(b, client)
	b.ResetTimer()
	for range b.N {
		id := uuid.New()
		if err := h.Open(ctx, meta{ID: id, Expires: time.Now().Add(time.Minute)}); err != nil {
			b.Fatal(err)
		}
		code, _, err := codes.Mint(ctx, id, time.Minute)
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := codes.Redeem(ctx, code); err != nil {
			b.Fatal(err)
		}
		for _, name := range []string{"A", "B"} {
			s, _, err := h.Join(ctx, id, joinRequest{name: name}, func(error) {})
			if err != nil {
				b.Fatal(err)
			}
			if err := s.Leave(ctx, true); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.StopTimer()
	b.ReportMetric((redisCPU(b, client)-before)/float64(b.N)*1e6, "redis-cpu-us/op")
}

// BenchmarkRedisThroughput relays between 32 pairs of which each side is at
// another instance, and says how many frames a second of Redis' CPU carries.
func BenchmarkRedisThroughput(b *testing.B) {
	server := testkit.StartRedis(b)
	client := server.Client()
	here, there := benchHub(b, server.Addr), benchHub(b, server.Addr)
	const pairs = 32
	data := []byte(strings.Repeat("x", 500))
	var senders [pairs]seat
	var taken sync.WaitGroup
	for i := range pairs {
		id := uuid.New()
		woken := make(chan struct{}, 1)
		receiver, _, err := there.Join(ctx, id, joinRequest{name: "B", create: true}, func(error) {
			select {
			case woken <- struct{}{}:
			default:
			}
		})
		if err != nil {
			b.Fatal(err)
		}
		if senders[i], _, err = here.Join(ctx, id, joinRequest{name: "A", create: true}, func(error) {}); err != nil {
			b.Fatal(err)
		}
		want := b.N / pairs
		taken.Go(func() {
			buf := make([]frame, 0, 32)
			for got := 0; got < want; {
				<-woken
				for more := true; more; {
					var frames []frame
					if frames, more, err = receiver.Take(ctx, noMail, 16<<10, buf[:0]); err != nil {
						b.Error(err)
						return
					}
					for _, f := range frames {
						if f.kind == kindRelay {
							got++
						}
					}
				}
			}
		})
	}
	before := redisCPU(b, client)
	b.ResetTimer()
	for _, s := range senders {
		taken.Go(func() {
			for range b.N / pairs {
				if _, err := s.Post(ctx, "", frame{kind: kindRelay, typ: typeIce, data: data}, false); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	taken.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/(redisCPU(b, client)-before), "frames/redis-cpu-s")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
}

// redisCPU returns the seconds of CPU that Redis has used.
func redisCPU(b *testing.B, client *redis.Client) (seconds float64) {
	info, err := client.Info(ctx, "cpu").Result()
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name == "used_cpu_sys" || name == "used_cpu_user" {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				b.Fatal(fmt.Errorf("%s: %w", line, err))
			}
			seconds += n
		}
	}
	return seconds
}
