//go:build unix

package main

import "syscall"

// canPoll says that a socket's descriptor can be read and written without
// blocking.
const canPoll = true

func wouldBlock(err error) bool { return err == syscall.EAGAIN }

// openFileLimit returns how many files the process may open, 0 if that is not
// known. The Go runtime has raised the soft limit to the hard one.
func openFileLimit() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur > 1<<30 {
		return 0
	}
	return int(l.Cur)
}
