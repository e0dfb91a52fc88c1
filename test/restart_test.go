package test

import (
	"parley/test/testkit"
	"testing"
)

// However it ended, the server is back on its port as soon as it is started.
func TestRestarts(t *testing.T) {
	server := testkit.StartBinary(t)
	base, pid := server.Base, server.PID
	ready := func() {
		t.Helper()
		server.Mint(t.Context(), t)
		if server.Base != base || server.PID == pid {
			t.Errorf("at %s as process %d, was at %s as %d", server.Base, server.PID, base, pid)
		}
		pid = server.PID
	}
	server.Restart()
	ready()
	server.Kill()
	server.Restart()
	ready()
	if exit := server.Stop(); exit != 0 {
		t.Errorf("exit status %d, want 0", exit)
	}
}
