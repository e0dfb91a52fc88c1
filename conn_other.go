//go:build !linux

package main

import "errors"

// canPoll says that a socket's descriptor can be read and written without
// blocking. Here a goroutine waits instead, as everywhere for a connection that
// the server ends TLS for.
const canPoll = false

func wouldBlock(error) bool                 { return false }
func sysRead(uintptr, []byte) (int, error)  { return 0, errors.ErrUnsupported }
func sysWrite(uintptr, []byte) (int, error) { return 0, errors.ErrUnsupported }

// openFileLimit returns 0: it is not known how many files may be open.
func openFileLimit() int { return 0 }
