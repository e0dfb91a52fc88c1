package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"runtime"

	"golang.org/x/crypto/argon2"
)

// A passwordHash is what is kept of a room's password; zero is none.
type passwordHash struct {
	salt [16]byte
	key  [32]byte
}

// Argon2id, RFC 9106. The memory is less than its section 4 recommends, because
// every guess of a stranger costs the server that much.
const (
	argonPasses  = 2
	argonKiB     = 8 << 10
	argonThreads = 1
)

// hashesPerMinute bounds what one address can make the server hash; an IPv6 /48
// siteShare times that. Two a second are a fortieth of a processor.
const hashesPerMinute = 120

// passwords hashes passwords, only so many at once as there are processors:
// the rest waits its turn, and 8 MiB for each of them.
type passwords struct {
	turns chan struct{}
}

func newPasswords() *passwords {
	return &passwords{turns: make(chan struct{}, runtime.GOMAXPROCS(0))}
}

// unknownPassword returns a hash that no password has.
func unknownPassword() (h passwordHash) {
	rand.Read(h.salt[:]) // never fails
	rand.Read(h.key[:])
	return h
}

// hash returns what to keep of a password. It fails when ctx is done first.
func (p *passwords) hash(ctx context.Context, password string) (passwordHash, error) {
	var h passwordHash
	rand.Read(h.salt[:]) // never fails
	err := p.derive(ctx, &h, password)
	return h, err
}

// matches reports whether password is the one h is kept of. It fails when ctx
// is done first.
func (p *passwords) matches(ctx context.Context, h passwordHash, password string) (bool, error) {
	guess := passwordHash{salt: h.salt}
	if err := p.derive(ctx, &guess, password); err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(guess.key[:], h.key[:]) == 1, nil
}

// derive sets h.key to that of password and h.salt.
func (p *passwords) derive(ctx context.Context, h *passwordHash, password string) error {
	select {
	case p.turns <- struct{}{}:
		defer func() { <-p.turns }()
	case <-ctx.Done():
		return ctx.Err()
	}
	copy(h.key[:], argon2.IDKey([]byte(password), h.salt[:], argonPasses, argonKiB, argonThreads, uint32(len(h.key))))
	return nil
}
