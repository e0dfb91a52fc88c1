package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// redisCodes are codes in Redis, for any number of instances. A code is a key
// that says live:<session>, and used:<session> once it is redeemed.
type redisCodes struct {
	// static after construction
	codeOptions
	*redisStore
	minting, redeeming, counting *redisScript

	digits atomic.Int64 // of the code minted last here
	active atomic.Int64 // when they were last counted
}

var _ codes = (*redisCodes)(nil)

func newRedisCodes(o codeOptions, r *redisStore, clock string) *redisCodes {
	c := &redisCodes{
		codeOptions: o, redisStore: r,
		minting: newScript("mint", clock), redeeming: newScript("redeem", clock), counting: newScript("codes", clock),
	}
	c.digits.Store(int64(o.digits))
	return c
}

// mintRounds bounds how often roundDraws random codes are drawn, of which nine
// tenths may be taken: a round then fails once in thirty times.
const (
	mintRounds = 16
	roundDraws = 32
)

func (c *redisCodes) Mint(ctx context.Context, session sessionID, ttl time.Duration) (string, time.Time, error) {
	digits := int(c.digits.Load())
	for range mintRounds {
		args := append([]any{session.String(), micros(ttl), c.failures(), c.codeOptions.digits, c.maxDigits, digits}, drawCodes(digits)...)
		res, err := c.eval(ctx, c.minting, nil, args...)
		if err != nil {
			return "", time.Time{}, err
		}
		switch answer := luaText(res[0]); {
		case len(res) == 3 && answer == "ok":
			if int(c.digits.Swap(int64(digits))) != digits {
				c.grown(digits)
			}
			return luaText(res[1]), time.UnixMicro(luaInt(res[2])), nil
		case len(res) == 2 && answer == "full":
			return "", time.Time{}, &exhaustedError{retryAfter: time.Duration(luaInt(res[1])) * time.Microsecond}
		case len(res) == 2 && (answer == "digits" || answer == "again"):
			digits = int(luaInt(res[1]))
		default:
			return "", time.Time{}, errBackend
		}
	}
	return "", time.Time{}, errNoCode
}

// errNoCode is less likely than any other failure: all random codes were taken.
var errNoCode = errors.New("redis: no free code was found")

// drawCodes returns random codes, each with the same chance.
func drawCodes(digits int) (all []any) {
	var random [4 * roundDraws]byte
	rand.Read(random[:]) // never fails
	size := uint32(math.Pow10(digits))
	for i := range roundDraws {
		if n, ok := uniform(binary.LittleEndian.Uint32(random[4*i:]), size); ok {
			all = append(all, fmt.Sprintf("%0*d", digits, n))
		}
	}
	return all
}

func (c *redisCodes) Redeem(ctx context.Context, code string) (session sessionID, expires time.Time, err error) {
	if !validCode(code) {
		return session, expires, errCodeGone
	}
	res, err := c.eval(ctx, c.redeeming, []string{"parley:code:" + code})
	if err != nil {
		return session, expires, err
	}
	answer := luaText(res[0])
	if answer == "gone" {
		return session, expires, errCodeGone
	}
	if len(res) < 3 {
		return session, expires, errBackend
	}
	if session, err = uuid.Parse(luaText(res[1])); err != nil {
		return session, expires, errBackend
	}
	expires = time.UnixMicro(luaInt(res[2]))
	if answer == "used" {
		return session, expires, errCodeUsed
	}
	return session, expires, nil
}

// Run counts the codes from time to time, and forgets those that have expired.
func (c *redisCodes) Run(ctx context.Context) error {
	every(ctx, janitorEvery, func() { c.sweep(ctx) })
	return nil
}

func (c *redisCodes) sweep(ctx context.Context) {
	if res, err := c.eval(ctx, c.counting, nil, c.codeOptions.digits, c.maxDigits); err == nil && len(res) == 2 {
		c.active.Store(luaInt(res[1]))
	} // else Redis is away, of which the hub tells
}

// stats returns how many codes are taken, in all instances, and the length of
// new ones here.
func (c *redisCodes) stats() (active, digits int) {
	return int(c.active.Load()), int(c.digits.Load())
}
