//go:build !linux

package main

import (
	"errors"
	"net"
	"syscall"
	"time"
)

// Elsewhere than on Linux the load tester compiles, and says that it cannot run.
// The server can be anywhere: -anywhere.

type poller struct{}

const canRead, canWrite, ended = 1, 2, 4

var errOnlyLinux = errors.New("the load tester drives its sockets with epoll, so it runs on Linux only")

func newPoller() (*poller, error)                          { return nil, errOnlyLinux }
func (*poller) close()                                     {}
func (*poller) add(int, int, uint32) error                 { return errOnlyLinux }
func (*poller) change(int, int, uint32) error              { return errOnlyLinux }
func (*poller) wait(time.Duration, func(id int, e uint32)) {}
func detach(net.Conn) (int, error)                         { return -1, errOnlyLinux }
func readSocket(int, []byte) (int, error)                  { return 0, errOnlyLinux }
func writeSocket(int, []byte) (int, error)                 { return 0, errOnlyLinux }
func closeSocket(int)                                      {}
func tryAgain(error) bool                                  { return false }
func shrinkReceiveBuffer(int)                              {}
func sharePorts(_, _ string, _ syscall.RawConn) error      { return nil }
func openFileLimit() int                                   { return 1 << 30 }
func processMeter(int) meter                               { return func() (usage, error) { return usage{}, errOnlyLinux } }
