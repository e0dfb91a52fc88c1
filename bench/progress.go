package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// A progress is a line that says what is being done, and for how long.
type progress struct {
	w        io.Writer
	terminal bool // the line is written over, where this is one
}

func newProgress(w io.Writer) *progress {
	file, ok := w.(*os.File)
	if !ok {
		return &progress{w: w}
	}
	info, err := file.Stat()
	return &progress{w: w, terminal: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

// begin says what is being done until the function it returns is called.
func (p *progress) begin(what string) (end func()) {
	if !p.terminal {
		fmt.Fprintln(p.w, what)
		return func() {}
	}
	begin, done := time.Now(), make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			fmt.Fprintf(p.w, "\r%s, %.0f s\x1b[K", what, time.Since(begin).Seconds())
			select {
			case <-ticker.C:
			case <-done:
				fmt.Fprint(p.w, "\r\x1b[K")
				return
			}
		}
	})
	return func() {
		close(done)
		writing.Wait()
	}
}
