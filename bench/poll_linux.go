package main

import (
	"bytes"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// A poller waits for many sockets from one thread. Go's own would wake one
// goroutine for each socket that is ready, on as many processors as are idle;
// the server needs those. It also adds microseconds to each latency.
type poller struct {
	fd     int
	events [512]syscall.EpollEvent
}

// Events of a socket.
const (
	canRead  = syscall.EPOLLIN
	canWrite = syscall.EPOLLOUT
	ended    = syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR
)

// newPoller binds the goroutine to its thread for good.
func newPoller() (*poller, error) {
	runtime.LockOSThread()
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create", err)
	}
	return &poller{fd: fd}, nil
}

func (p *poller) close() {
	syscall.Close(p.fd)
	runtime.UnlockOSThread()
}

// add begins to wait for events of the socket that the caller calls id.
func (p *poller) add(socket, id int, events uint32) error {
	return p.control(syscall.EPOLL_CTL_ADD, socket, id, events)
}

// change waits for other events.
func (p *poller) change(socket, id int, events uint32) error {
	return p.control(syscall.EPOLL_CTL_MOD, socket, id, events)
}

func (p *poller) control(op, socket, id int, events uint32) error {
	event := syscall.EpollEvent{Events: events, Fd: int32(id)}
	return os.NewSyscallError("epoll_ctl", syscall.EpollCtl(p.fd, op, socket, &event))
}

// wait calls handle for each socket that something has happened to within d.
func (p *poller) wait(d time.Duration, handle func(id int, events uint32)) {
	n, err := syscall.EpollWait(p.fd, p.events[:], int(d/time.Millisecond))
	if err != nil {
		return // EINTR: nothing has happened
	}
	for _, event := range p.events[:n] {
		handle(int(event.Fd), event.Events)
	}
}

// detach takes a socket away from Go's poller and returns its descriptor.
func detach(c net.Conn) (socket int, err error) {
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return -1, err
	}
	failed := raw.Control(func(fd uintptr) {
		copied, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
		if socket = int(copied); errno != 0 {
			err = os.NewSyscallError("fcntl", errno)
		}
	})
	if err == nil {
		err = failed
	}
	return socket, err
}

// readSocket and writeSocket never wait. They do without the runtime's notice of
// a call that may take long, which costs more than the call of one frame. At
// most one of n and err is set; neither at the end of what the server sends.
func readSocket(socket int, b []byte) (n int, err error) {
	return rawCall(syscall.SYS_READ, socket, b)
}

func writeSocket(socket int, b []byte) (n int, err error) {
	return rawCall(syscall.SYS_WRITE, socket, b)
}

func rawCall(number uintptr, socket int, b []byte) (int, error) {
	n, _, errno := syscall.RawSyscall(number, uintptr(socket), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func closeSocket(socket int) { syscall.Close(socket) }

// tryAgain says that err only means "not now".
func tryAgain(err error) bool { return err == syscall.EAGAIN || err == syscall.EINTR }

// shrinkReceiveBuffer has TCP take less from a server whose frames nobody reads.
func shrinkReceiveBuffer(socket int) {
	syscall.SetsockoptInt(socket, syscall.SOL_SOCKET, syscall.SO_RCVBUF, 32<<10)
}

// sharePorts lets connections from different addresses have the same source
// port: it is chosen only when the kernel knows where they lead.
func sharePorts(_, _ string, raw syscall.RawConn) error {
	const ipBindAddressNoPort = 24 // not in package syscall
	return raw.Control(func(fd uintptr) {
		syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, ipBindAddressNoPort, 1)
	})
}

// openFileLimit returns how many files this process may open.
func openFileLimit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > 1<<30 {
		return 1 << 30
	}
	return int(l.Cur)
}

// processMeter reads what a process of this machine has used, from /proc.
func processMeter(pid int) meter {
	dir := "/proc/" + strconv.Itoa(pid)
	return func() (u usage, err error) {
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			return u, err
		}
		// The fields are counted from behind the name, which may hold anything.
		rest := string(stat[bytes.LastIndexByte(stat, ')')+1:])
		fields := strings.Fields(rest)
		if len(fields) < 22 {
			return u, os.ErrInvalid
		}
		for _, field := range fields[11:13] { // user and system time
			ticks, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return u, err
			}
			u.cpu += time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 on all of Linux's platforms that Go runs on
		}
		pages, err := strconv.ParseInt(fields[21], 10, 64)
		u.resident = pages * int64(os.Getpagesize())
		return u, err
	}
}
