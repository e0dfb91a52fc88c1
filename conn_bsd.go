//go:build unix && !linux

package main

import "syscall"

func sysRead(fd uintptr, p []byte) (int, error)  { return retry(syscall.Read, fd, p) }
func sysWrite(fd uintptr, p []byte) (int, error) { return retry(syscall.Write, fd, p) }

// retry repeats a call that a signal interrupted. It never returns less than 0.
func retry(call func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		if n, err := call(int(fd), p); err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
