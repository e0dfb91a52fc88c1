package main

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A usage is what the server has used.
type usage struct {
	cpu      time.Duration // since it was started, in steps of 10 ms
	resident int64         // bytes of memory
}

// A meter reads what the server has used.
type meter func() (usage, error)

var errNoMeter = errors.New("neither metrics nor a process ID")

// metricsMeter reads what Prometheus would. A reading costs the server about a
// millisecond.
func metricsMeter(url string) meter {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	return func() (u usage, err error) {
		res, err := client.Get(url)
		if err != nil {
			return u, err
		}
		defer res.Body.Close()
		found := 0
		for lines := bufio.NewScanner(res.Body); lines.Scan(); {
			name, value, _ := strings.Cut(lines.Text(), " ")
			number, err := strconv.ParseFloat(value, 64)
			if err != nil {
				continue
			}
			switch name {
			case "process_cpu_seconds_total":
				u.cpu = time.Duration(number * float64(time.Second))
				found++
			case "process_resident_memory_bytes":
				u.resident = int64(number)
				found++
			}
		}
		if found != 2 {
			return u, fmt.Errorf("%s has no process metrics (status %d)", url, res.StatusCode)
		}
		return u, nil
	}
}

// chooseMeter returns the meter of a process, or of the metrics if these can be
// read, or one that knows nothing.
func chooseMeter(pid int, metricsURL string) (meter, error) {
	m := metricsMeter(metricsURL)
	if pid > 0 {
		m = processMeter(pid)
	}
	_, err := m()
	if err == nil {
		return m, nil
	}
	if pid > 0 {
		return nil, fmt.Errorf("-pid %d: %w", pid, err)
	}
	return func() (usage, error) { return usage{}, errNoMeter }, nil
}

// A span is a stretch of time, and what the server used in it.
type span struct {
	meter meter
	begin time.Time
	first usage
	known bool
}

func (m meter) start() *span {
	first, err := m()
	return &span{meter: m, begin: time.Now(), first: first, known: err == nil}
}

// used says how long it was, and how much the server used for each of n things:
// nil where that is not known.
func (s *span) used(n uint64) (took time.Duration, each *float64) {
	took = time.Since(s.begin)
	last, err := s.meter()
	if !s.known || err != nil || n == 0 {
		return took, nil
	}
	micros := micros(last.cpu-s.first.cpu) / float64(n)
	return took, &micros
}

// grown returns by how many bytes memory has grown since the start.
func (s *span) grown() *int64 {
	now, err := s.meter()
	if !s.known || err != nil {
		return nil
	}
	grown := now.resident - s.first.resident
	return &grown
}

// peak reads the memory now and then until the function it returns is called,
// which returns the most, or nil.
func (m meter) peak() (stop func() *int64) {
	var most int64
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		ticker := time.NewTicker(250 * time.Millisecond)
		defer ticker.Stop()
		for {
			if now, err := m(); err == nil {
				most = max(most, now.resident)
			}
			select {
			case <-ticker.C:
			case <-done:
				return
			}
		}
	})
	return func() *int64 {
		close(done)
		watching.Wait()
		if most == 0 {
			return nil
		}
		return &most
	}
}
