package main

import (
	"syscall"
	"unsafe"
)

// canPoll says that a socket's descriptor can be read and written without
// blocking.
const canPoll = true

func wouldBlock(err error) bool { return err == syscall.EAGAIN }

// The descriptors are non-blocking, so these calls return at once, and the
// scheduler need not be told that a thread may be away. (Nor is the race detector
// told of what they read and write.) That it is told costs
// 9 to 22 % of a frame's processor time in a burst, and as much or nothing when
// frames come one by one (go run ./bench burst relay, with both in turn).

func sysRead(fd uintptr, p []byte) (int, error)  { return rawCall(syscall.SYS_READ, fd, p) }
func sysWrite(fd uintptr, p []byte) (int, error) { return rawCall(syscall.SYS_WRITE, fd, p) }

// rawCall makes a system call, again if a signal interrupted it. p is not empty.
// It never returns less than 0.
func rawCall(call, fd uintptr, p []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		if errno == 0 {
			return int(n), nil
		} else if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// openFileLimit returns how many files the process may open, 0 if that is not
// known. The Go runtime has raised the soft limit to the hard one.
func openFileLimit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > 1<<30 {
		return 0
	}
	return int(l.Cur)
}
