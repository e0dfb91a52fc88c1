package main

import (
	"syscall"
	"unsafe"
)

// The descriptors are non-blocking, so these calls return at once, and the
// scheduler need not be told that a thread may be away: that costs as much as
// a tenth of relaying a frame (BenchmarkSocket).

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
