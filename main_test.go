package main

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the suite when a goroutine is left over at its end.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		removeBinary()
		os.Exit(code)
	}))
}
