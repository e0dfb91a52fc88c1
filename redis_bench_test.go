package main

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// benchHub is a hub on a real Redis that runs until the benchmark ends.
func benchHub(b *testing.B, addr string) *redisHub {
	h := newRedisHub(hubOptions{
		sessionTTL: 10 * time.Minute, resumeTTL: time.Minute, roomEmptyTTL: 5 * time.Minute, holdBytes: 1 << 20, slowBytes: 2 << 20,
		queued: &budget{limit: 256 << 20}, owners: newQuota(0), dropped: func(dropReason, int) {},
	}, newTestStore(b, redis.Options{Addr: addr}), 20*time.Second, redisClock)
	b.Cleanup(startHub(h))
	eventually(b, "the hub is ready", func() bool { return h.Ready(ctx) == nil })
	return h
}

// BenchmarkRedisPublish is what the others are measured by: PUBLISH, and the
// message back over another connection.
func BenchmarkRedisPublish(b *testing.B) {
	server := startRedis(b)
	client := server.client()
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
	server := startRedis(b)
	here, there := benchHub(b, server.addr), benchHub(b, server.addr)
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
	server := startRedis(b)
	client, h := server.client(), benchHub(b, server.addr)
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
	server := startRedis(b)
	client, h := server.client(), benchHub(b, server.addr)
	codes := newRedisCodes(codeOptions{digits: 9, maxDigits: 9, failures: func() int { return 0 }, grown: func(int) {}},
		newTestStore(b, redis.Options{Addr: server.addr}), redisClock)
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
	server := startRedis(b)
	client := server.client()
	here, there := benchHub(b, server.addr), benchHub(b, server.addr)
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
