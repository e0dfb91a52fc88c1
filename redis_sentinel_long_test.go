//go:build long

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Behind Sentinels a replica takes over from a primary that is killed, and all
// goes on with no restart.
func TestLongSentinel(t *testing.T) {
	primary := startRedis(t)
	host, port, _ := net.SplitHostPort(primary.addr)
	replica := startRedis(t, "--replicaof", host+" "+port)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sentinel := free.Addr().String()
	free.Close()
	_, sentinelPort, _ := net.SplitHostPort(sentinel)
	config := filepath.Join(t.TempDir(), "sentinel.conf")
	text := fmt.Sprintf("port %s\nbind 127.0.0.1\nsentinel monitor main %s %s 1\nsentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n",
		sentinelPort, host, port)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	watcher := exec.Command("redis-server", config, "--sentinel")
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		watcher.Process.Kill()
		watcher.Wait()
	})
	f := startFleet(t, 2, "redis+sentinel://"+sentinel+"/main")
	atOnce(t, 10, 5, func(int) error { return f.pair(3) })
	eventually(t, "the replica has joined", func() bool {
		info, _ := primary.client().Info(ctx, "replication").Result()
		return strings.Contains(info, "connected_slaves:1")
	})
	time.Sleep(2 * time.Second) // in which the sentinel hears of it
	primary.stop()
	killed := time.Now()
	for _, p := range f.all {
		eventually(t, "an instance has seen it", func() bool { return !f.ready(p) })
	}
	for _, p := range f.all {
		eventually(t, "an instance is ready", func() bool { return f.ready(p) })
	}
	t.Logf("ready %v after the primary was killed", time.Since(killed).Round(time.Millisecond))
	atOnce(t, 10, 5, func(int) error { return f.pair(3) })
	if n := replica.client().DBSize(ctx).Val(); n == 0 {
		t.Error("nothing is in the replica")
	}
}
