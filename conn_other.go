//go:build !unix

package main

import "errors"

// canPoll says that a socket's descriptor can be read and written without
// blocking; elsewhere a goroutine waits instead.
const canPoll = false

func sysRead(uintptr, []byte) (int, error)  { return 0, errors.ErrUnsupported }
func sysWrite(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }
func wouldBlock(error) bool                 { return false }

// openFileLimit returns 0: it is not known how many files may be open.
func openFileLimit() int { return 0 }
