package main

import (
	"context"
	"errors"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// mintCode is POST /rendezvous/code.
func (s *server) mintCode(w http.ResponseWriter, r *http.Request, c caller) error {
	if s.cfg.mintAuth == "jwt" {
		if _, err := s.authenticate(r); err != nil {
			return err
		}
	}
	body, err := s.readObject(w, r)
	if err != nil {
		return err
	}
	ttl, err := readTTL(body, s.cfg.roomTTL)
	if err != nil {
		return err
	}
	if s.draining.Load() {
		return errDraining
	}
	until := time.Now().Add(ttl)
	if ok, retryAfter := s.limits.codes.takeUntil(c.network, until); !ok {
		return &apiError{status: http.StatusTooManyRequests, code: "too_many_codes",
			text: "this address has as many unexpired codes as it may", retryAfter: retryAfter}
	}
	id, code, expires, err := s.mint(r.Context(), ttl)
	if err != nil {
		s.limits.codes.giveEarly(c.network, until)
		return err
	}
	s.metrics.codesMinted.Inc()
	s.writeJSON(w, http.StatusOK, struct {
		Code      string `json:"code"`
		AppID     string `json:"appID"`
		ExpiresAt string `json:"expiresAt"`
		iceServers
	}{code, id.String(), timestamp(expires), s.ice.servers(id, c.network)})
	return nil
}

// mint opens a session and mints its code, or does neither.
func (s *server) mint(ctx context.Context, ttl time.Duration) (id sessionID, code string, expires time.Time, err error) {
	id = uuid.New()
	if err := s.hub.Open(ctx, meta{ID: id, Expires: time.Now().Add(ttl)}); err != nil {
		return id, "", expires, err
	}
	if code, expires, err = s.codes.Mint(ctx, id, ttl); err != nil {
		s.hub.End(context.WithoutCancel(ctx), id, errGone)
	}
	return id, code, expires, err
}

// readTTL reads how long the caller wants a code or a room to live, at most
// longest, which is also the default.
func readTTL(o object, longest time.Duration) (time.Duration, error) {
	raw := o.get("ttl")
	if raw == nil || string(raw) == "null" {
		return longest, nil
	}
	// Of JSON values only numbers parse; one too large for a float is infinite.
	seconds, err := strconv.ParseFloat(string(raw), 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) || seconds <= 0 {
		return 0, badRequest("bad_ttl", "ttl must be a positive number of seconds")
	}
	if seconds >= longest.Seconds() {
		return longest, nil
	}
	return max(time.Duration(seconds*float64(time.Second)), time.Millisecond), nil
}

// redeemCode is POST /rendezvous/redeem.
func (s *server) redeemCode(w http.ResponseWriter, r *http.Request, c caller) error {
	code, err := s.redeemRequest(w, r)
	if err != nil {
		s.metrics.redeems[redeemBad].Inc()
		return err
	}
	if s.draining.Load() {
		return errDraining
	}
	done, err := s.beginGuess(r.Context(), c, code)
	if err != nil {
		s.metrics.redeems[redeemThrottled].Inc()
		return err
	}
	id, expires, err := s.codes.Redeem(r.Context(), code)
	wrong := errors.Is(err, errCodeGone) || errors.Is(err, errCodeUsed)
	if done(wrong) {
		s.limits.failures.add(1)
	}
	if wrong {
		s.metrics.redeems[redeemGone].Inc()
	}
	if errors.Is(err, errCodeUsed) {
		// Whoever minted it should know that two people hold the code.
		if err := s.hub.Tell(r.Context(), id, event{kind: eventContested}); err != nil && !errors.Is(err, errGone) {
			s.log.Warn("contested code not told", "error", err)
		}
	}
	if err != nil {
		return err
	}
	s.metrics.redeems[redeemOK].Inc()
	s.writeJSON(w, http.StatusOK, struct {
		AppID     string `json:"appID"`
		ExpiresAt string `json:"expiresAt"`
		iceServers
	}{id.String(), timestamp(expires), s.ice.servers(id, c.network)})
	return nil
}

// beginGuess asks whether the caller may guess, as guessBudget.begin does: a
// code, a room's code or its password.
func (s *server) beginGuess(ctx context.Context, c caller, guess string) (done func(wrong bool) (counted bool), err error) {
	done, retryAfter := s.limits.guesses.begin(ctx, c.network, guess)
	if done == nil {
		s.metrics.throttled.Inc()
		return nil, &apiError{status: http.StatusTooManyRequests, code: "too_many_attempts",
			text: "this address has guessed wrong too often", retryAfter: retryAfter, closeCode: closeTooMany}
	}
	return done, nil
}

// redeemRequest reads the code that a caller wants to redeem.
func (s *server) redeemRequest(w http.ResponseWriter, r *http.Request) (code string, err error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" && !strings.HasSuffix(mediaType, "+json") {
		return "", &apiError{status: http.StatusUnsupportedMediaType, code: "unsupported_media_type", text: "the Content-Type must be application/json"}
	}
	body, err := s.readObject(w, r)
	if err != nil {
		return "", err
	}
	if body == nil {
		return "", badRequest("bad_json", "the body must be a JSON object")
	}
	text, ok := unquote(body.get("code"))
	if code = string(text); !ok || !validCode(code) {
		return "", badRequest("bad_code", "code must be a string of 4 to 9 digits")
	}
	return code, nil
}

// timestamp formats a time as answers give it: RFC 3339, UTC.
func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }
