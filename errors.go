package main

import (
	"errors"
	"fmt"
	"net/http"
	"time"
)

// What errors mean to clients: as answers to calls, as close frames, and as error
// frames. docs/reference.md says what a client should do about each.

// An apiError is an answer that is an error: as HTTP, and, on connections that
// are told by close frames, as a close code.
type apiError struct {
	status     int
	code       string        // for machines
	text       string        // for people
	retryAfter time.Duration // of 429 and 503; 0 for retrySoon

	closeCode   closeCode // 0 when it is always HTTP
	closeReason string    // when every client is told by a close frame; SIDE stands for the seat
}

func (e *apiError) Error() string { return e.text }

func badRequest(code, text string) *apiError {
	return &apiError{status: http.StatusBadRequest, code: code, text: text}
}

var errUpgradeRequired = &apiError{status: http.StatusUpgradeRequired, code: "upgrade_required",
	text: "this is a WebSocket endpoint (RFC 6455, version 13): connect with a WebSocket client"}

var errForbiddenOrigin = &apiError{status: http.StatusForbidden, code: "forbidden_origin",
	text: "pages of this origin may not call this server"}

// errInternal answers a request that met a bug.
var errInternal = &apiError{status: http.StatusInternalServerError, code: "internal_error",
	text: "the server has a fault, and could not do this"}

var errDraining = errors.New("the server is shutting down")

// retrySoon is how long a client should wait where nothing better is known.
const retrySoon = 5 * time.Second

// A frameError answers a client's frame: it becomes an error frame.
type frameError struct {
	code string // for machines: one of the codes of the error frame
	text string // for people
}

func (e *frameError) Error() string { return e.text }

func badFrame(format string, args ...any) *frameError {
	return &frameError{"bad_frame", fmt.Sprintf(format, args...)}
}

// An errorMeaning is what one of the named errors is where it is told. The text for
// people is the error's own.
type errorMeaning struct {
	err    error
	script string // what the scripts in lua/ call it

	status int    // of an answer, and
	code   string // its code
	close  closeCode
	reason string // of the close frame, where clients without parley.v1 get one too; SIDE stands for the seat

	frame string // code of the error frame
}

var errorMeanings = []errorMeaning{
	{err: errGone, script: "gone", status: http.StatusNotFound, code: "unknown_session", close: closeUnknown},
	{err: errCapacity, script: "capacity", status: http.StatusServiceUnavailable, code: "at_capacity", close: closeCapacity},
	{err: errTooMany, script: "toomany", status: http.StatusTooManyRequests, code: "too_many_codes", close: closeTooMany},
	{err: errDraining, status: http.StatusServiceUnavailable, code: "draining", close: closeGoingAway},
	{err: errTaken, script: "taken"}, // no client's doing: the caller tries another

	// Of seats.
	{err: errBusy, script: "busy", status: http.StatusConflict, code: "seat_busy", close: closeBusy, reason: "side SIDE busy"},
	{err: errTakeovers, script: "takeovers", status: http.StatusTooManyRequests, code: "too_many_takeovers", close: closeTooMany, reason: "too_many_takeovers"},
	{err: errReplaced, script: "replaced", status: http.StatusConflict, code: "taken_over", close: closeReplaced},
	{err: errSlow, status: http.StatusTooManyRequests, code: "too_slow", close: closeSlow},

	// Of rooms.
	{err: errWrongPassword, script: "password", status: http.StatusForbidden, code: "wrong_password", close: closeForbidden},
	{err: errLocked, script: "locked", status: http.StatusForbidden, code: "room_locked", close: closeForbidden},
	{err: errRoomFull, script: "full", status: http.StatusConflict, code: "room_is_full", close: closeRoomFull},
	{err: errRoomDeleted, status: http.StatusNotFound, code: "room_deleted", close: closeDeleted},

	// Of codes. One answer for unknown, used and expired: it tells a guesser nothing.
	{err: errCodeGone, status: http.StatusGone, code: "gone"},
	{err: errCodeUsed, status: http.StatusGone, code: "gone"},

	// Of frames.
	{err: errNoPeer, script: "nopeer", frame: "peer_not_found"},
	{err: errPeerAbsent, script: "absent", frame: "peer_absent"},
	{err: errMailFull, script: "mailfull", frame: "mailbox_full"},
	{err: errOverCapacity, script: "overcapacity", frame: "over_capacity"},
	{err: errBeyond, script: "beyond"}, // told as bad_frame, with the numbers
}

// meaningOf returns what err means, or nil where the backend could not be asked.
func meaningOf(err error) *errorMeaning {
	for i := range errorMeanings {
		if m := &errorMeanings[i]; errors.Is(err, m.err) {
			return m
		}
	}
	return nil
}

const (
	codeUnavailable = "backend_unavailable"
	textUnavailable = "the server cannot do this at the moment"
)

// toAPIError returns the answer that err is.
func toAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*exhaustedError](err); ok {
		return &apiError{status: http.StatusServiceUnavailable, code: "codes_exhausted", text: err.Error(), retryAfter: e.retryAfter}
	}
	if e, ok := errors.AsType[*tokenError](err); ok {
		return &apiError{status: http.StatusUnauthorized, code: "unauthorized", text: e.text}
	}
	m := meaningOf(err)
	switch {
	case m == nil || m.status == 0:
		return &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, text: textUnavailable, closeCode: closeCapacity}
	case m.status == http.StatusGone:
		return &apiError{status: m.status, code: m.code, text: "the code is unknown, has been used, or has expired"}
	}
	return &apiError{status: m.status, code: m.code, text: err.Error(), closeCode: m.close, closeReason: m.reason}
}

// toFrameError returns the error frame that err is.
func toFrameError(err error) *frameError {
	if e, ok := errors.AsType[*frameError](err); ok {
		return e
	}
	if m := meaningOf(err); m != nil && m.frame != "" {
		return &frameError{m.frame, err.Error()}
	}
	return &frameError{codeUnavailable, textUnavailable}
}
