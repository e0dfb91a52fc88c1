package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// parley healthcheck asks the server that runs beside it, with the same
// environment or flags, whether it is alive. It is the HEALTHCHECK of a
// container, whose image has nothing else that could ask.
//
// It asks /healthz and not /readyz: what watches containers replaces one that
// is not healthy, which helps a server that hangs, and harms one that only
// waits for Redis, or drains: its connections would be lost for nothing.

// healthcheckTimeout is how long the answer may take.
const healthcheckTimeout = 3 * time.Second

// runHealthcheck is parley healthcheck. It returns the exit status: 0 or 1,
// because Docker reserves 2.
func runHealthcheck(args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	cfg, err := loadAddress(args, lookup)
	if errors.Is(err, flag.ErrHelp) {
		writeUsage(stdout)
		return 0
	}
	if err == nil {
		err = checkHealth(cfg)
	}
	if err != nil {
		fmt.Fprintln(stderr, "parley healthcheck:", err)
		return 1
	}
	return 0
}

// loadAddress reads where the server listens, and nothing else: that a file of a
// secret has gone says nothing about a server that read it when it started.
func loadAddress(args []string, lookup func(string) (string, bool)) (*config, error) {
	c := new(config)
	table := configOptions(c)
	flags, problems := readFlags(table, args)
	if slices.Contains(problems, flag.ErrHelp) {
		return nil, flag.ErrHelp
	}
	table = slices.DeleteFunc(table, func(o option) bool {
		return !slices.Contains([]string{"HOST", "PORT", "TLS_CERT_FILE"}, o.name)
	})
	found, _ := gather(table, nil, func(variable string) (string, bool) {
		if text, ok := flags[variable]; ok {
			return text, true
		}
		return lookup(variable)
	})
	problems = append(problems, apply(table, found, true)...)
	if len(problems) == 0 && c.port == 0 {
		problems = append(problems, errors.New("PORT=0 does not say which port the server was given"))
	}
	return c, errors.Join(problems...)
}

// checkHealth asks the server at the address that c says.
func checkHealth(c *config) error {
	network, addr, base := "tcp", net.JoinHostPort(loopback(c.host), strconv.Itoa(c.port)), "http://"
	if c.tlsCertFile != "" {
		base = "https://"
	}
	if path, isFile := strings.CutPrefix(c.host, "unix:"); isFile {
		network, addr, base = "unix", path, base+"localhost"
	} else {
		base += addr
	}
	client := &http.Client{Timeout: healthcheckTimeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		// The certificate names what others call this server; here it is asked
		// by the address that it listens on itself.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
	}}
	res, err := client.Get(base + "/healthz")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s to /healthz: is it parley?", addr, res.Status)
	}
	return nil
}

// loopback returns the host at which to reach a server on this machine that
// listens on host.
func loopback(host string) string {
	switch addr, err := netip.ParseAddr(host); {
	case err != nil || !addr.IsUnspecified():
		return host
	case addr.Is4():
		return "127.0.0.1"
	}
	return "::1"
}
