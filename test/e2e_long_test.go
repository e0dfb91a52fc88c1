//go:build long

package test

import (
	"parley/test/testkit"
	"testing"
)

// TestLongDemoThroughput prints how fast the demo page sends, beside a bare data
// channel.
func TestLongDemoThroughput(t *testing.T) {
	runNode(t, "throughput.test.mjs", "PARLEY_BIN="+testkit.BuildBinary(t), "CHROMIUM="+needChromium(t))
}

// TestLongDemoPictures takes pictures of every screen, into test/e2e/screenshots/.
func TestLongDemoPictures(t *testing.T) {
	runNode(t, "pictures.test.mjs", "PARLEY_BIN="+testkit.BuildBinary(t), "CHROMIUM="+needChromium(t))
}
