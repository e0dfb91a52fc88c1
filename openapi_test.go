package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
)

const openAPIDoc = "docs/openapi.yaml"

// An openAPI is the specification, and which of its answers were seen.
type openAPI struct {
	t    testing.TB
	doc  *openapi3.T
	seen map[string]bool // such as "GET /readyz 503 draining", "GET /readyz 200 .status"
}

func loadOpenAPI(t testing.TB) *openAPI {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromFile(openAPIDoc)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		t.Fatal(err)
	}
	return &openAPI{t: t, doc: doc, seen: make(map[string]bool)}
}

func TestOpenAPIRoutes(t *testing.T) {
	var documented []string
	for path, item := range loadOpenAPI(t).doc.Paths.Map() {
		for method := range item.Operations() {
			documented = append(documented, method+" "+withoutNames(path))
		}
	}
	wantSame(t, "routes", documented, codeRoutes(t))
}

// answers returns all answers of the specification, and the fields of those that
// are no errors, in the form of seen.
func (o *openAPI) answers() (answers []string) {
	for path, item := range o.doc.Paths.Map() {
		for method, op := range item.Operations() {
			for status, response := range op.Responses.Map() {
				answer := method + " " + path + " " + status
				codes := codesOf(response.Value)
				if len(codes) == 0 {
					answers = append(answers, answer)
				}
				if media := response.Value.Content.Get("application/json"); media != nil {
					for field := range media.Schema.Value.Properties {
						answers = append(answers, answer+" ."+field)
					}
				}
				for _, code := range codes {
					answers = append(answers, answer+" "+code)
				}
			}
		}
	}
	return answers
}

// codesOf returns the codes of an answer that is an error.
func codesOf(response *openapi3.Response) (codes []string) {
	media := response.Content.Get("application/json")
	if media == nil {
		return nil
	}
	for _, part := range media.Schema.Value.AllOf {
		if code := part.Value.Properties["code"]; code != nil {
			for _, c := range code.Value.Enum {
				codes = append(codes, c.(string))
			}
		}
	}
	return codes
}

// operation returns the operation that a request is for.
func (o *openAPI) operation(method, path string) (template string, op *openapi3.Operation) {
	o.t.Helper()
	template, _, _ = strings.Cut(path, "?")
	for _, prefix := range []string{"/api/rooms/", "/ws/signal/"} {
		if strings.HasPrefix(template, prefix) {
			template = prefix + "{room}"
		}
	}
	item := o.doc.Paths.Value(template)
	if item == nil || item.Operations()[method] == nil {
		o.t.Fatalf("%s has no %s %s", openAPIDoc, method, template)
	}
	return template, item.Operations()[method]
}

// check checks an answer against the specification.
func (o *openAPI) check(method, path string, a httpAnswer) {
	o.t.Helper()
	template, op := o.operation(method, path)
	r, err := http.NewRequest(method, "http://parley.test"+path, nil)
	if err != nil {
		o.t.Fatal(err)
	}
	input := openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: r, Route: &routers.Route{
			Spec: o.doc, Path: template, PathItem: o.doc.Paths.Value(template), Method: method, Operation: op}},
		Status: a.status, Header: a.header,
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true},
	}
	input.SetBodyBytes([]byte(a.text))
	if err := openapi3filter.ValidateResponse(context.Background(), &input); err != nil {
		o.t.Errorf("%s %s answers %d %.300s: %v", method, path, a.status, a.text, err)
	}
	answer := strings.TrimSpace(fmt.Sprintf("%s %s %d %s", method, template, a.status, errorCodeOf(a)))
	o.seen[answer] = true
	var fields map[string]any
	json.Unmarshal([]byte(a.text), &fields) // not every answer is JSON
	for field := range fields {
		o.seen[answer+" ."+field] = true
	}
}

// errorCodeOf returns the code of an answer that is an error.
func errorCodeOf(a httpAnswer) string {
	if a.status < 400 {
		return ""
	}
	return a.Code
}

// A specServer is a server whose answers are checked.
type specServer struct {
	*testServer
	spec *openAPI
}

// ask makes a call and fails unless the answer is of the specification and has
// this status and code.
func (s specServer) ask(status int, code, method, path, body string, headers ...string) httpAnswer {
	s.t.Helper()
	a := s.call(method, path, body, headers...)
	if a.status != status || errorCodeOf(a) != code {
		s.t.Errorf("%s %s answers %d %s, want %d %s", method, path, a.status, a.text, status, code)
	}
	s.spec.check(method, path, a)
	return a
}

// brokenBody posts a body that cannot be read.
func (s specServer) brokenBody(method, path string, headers ...string) {
	s.t.Helper()
	conn, err := s.net.dialFrom("127.0.0.1")
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: parley.test\r\n%s\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n",
		method, path, strings.Join(append(headers, jsonType), "\r\n"))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	text, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	a := httpAnswer{status: res.StatusCode, header: res.Header, text: string(text)}
	json.Unmarshal(text, &a)
	a.want(s.t, http.StatusBadRequest, "bad_body", "could not be read")
	s.spec.check(method, path, a)
}

// absentBackend is a hub, and a table of codes, that cannot be asked.
type absentBackend struct {
	hub
	codes
}

var errAbsent = errors.New("absent")

func (absentBackend) Run(context.Context) error                       { return nil }
func (absentBackend) Ready(context.Context) error                     { return errAbsent }
func (absentBackend) Find(context.Context, string) (sessionID, error) { return sessionID{}, errAbsent }
func (absentBackend) Open(context.Context, meta) error                { return errAbsent }
func (absentBackend) Get(context.Context, sessionID) (meta, int, error) {
	return meta{}, 0, errAbsent
}
func (absentBackend) Join(context.Context, sessionID, joinRequest, func(error)) (seat, view, error) {
	return nil, view{}, errAbsent
}
func (absentBackend) Redeem(context.Context, string) (sessionID, time.Time, error) {
	return sessionID{}, time.Time{}, errAbsent
}

// Every answer of the specification is provoked, and each that a server gives is
// as the specification says, down to the fields.
func TestOpenAPIAnswers(t *testing.T) {
	spec := loadOpenAPI(t)
	const (
		mint, redeem, rooms = "/rendezvous/code", "/rendezvous/redeem", "/api/rooms"
		get, post, patch    = http.MethodGet, http.MethodPost, http.MethodPatch
		remove              = http.MethodDelete
		pair                = "/ws?side=A&appID=" + testApp
	)
	large := `{"x":"` + strings.Repeat("x", maxBody) + `"}`
	foreign := "Origin: https://elsewhere.example"
	with := func(headers []string, more ...string) []string { return slices.Concat(headers, more) }
	secret := strings.Repeat("s", 32)
	tests := []struct {
		name     string
		settings []string
		run      func(s specServer)
	}{
		{"operation", []string{"DEV=false", "DEMO=true"}, func(s specServer) {
			for _, path := range []string{"/whoami", "/healthz", "/readyz", "/version", "/metrics", "/", "/web/parley.js", "/web/parley.d.ts"} {
				s.ask(200, "", get, path, "")
			}
			s.ask(200, "", get, "/whoami", "", foreign, "X-Forwarded-For: 192.0.2.1")
		}},
		{"codes", []string{"STUN_URLS=stun:stun.example", "TURN_URLS=turn:turn.example", "TURN_SECRET=secret"}, func(s specServer) {
			minted := s.ask(200, "", post, mint, `{"ttl":60}`)
			s.ask(200, "", get, "/ice-servers?appID="+minted.AppID, "")
			s.ask(200, "", post, redeem, `{"code":"`+minted.Code+`"}`, jsonType)
			s.ask(410, "gone", post, redeem, `{"code":"`+minted.Code+`"}`, jsonType)
			s.ask(400, "bad_ttl", post, mint, `{"ttl":0}`)
			s.ask(400, "bad_code", post, redeem, `{"code":"x"}`, jsonType)
			s.ask(415, "unsupported_media_type", post, redeem, `{"code":"1234"}`)
			s.ask(400, "bad_app_id", get, "/ice-servers?appID=x", "")
			s.ask(404, "unknown_session", get, "/ice-servers?appID="+otherApp, "")
			for _, path := range []string{mint, redeem} {
				s.ask(400, "bad_json", post, path, `[]`, jsonType)
				s.ask(413, "too_large", post, path, large, jsonType)
				s.brokenBody(post, path)
			}
			for range maxRelayedSessions {
				minted = s.ask(200, "", post, mint, "")
			}
			s.ask(200, "", post, redeem, `{"code":"`+minted.Code+`"}`, jsonType)
			s.ask(200, "", get, "/ice-servers?appID="+minted.AppID, "")
		}},
		{"no ICE servers", nil, func(s specServer) {
			minted := s.ask(200, "", post, mint, "")
			s.ask(200, "", get, "/ice-servers?appID="+minted.AppID, "")
			for id := range 10_000 {
				s.codes.Mint(context.Background(), sessionID{byte(id >> 8), byte(id)}, time.Minute)
			}
			s.ask(503, "codes_exhausted", post, mint, "")
		}},
		{"guesses", []string{"ROOMS=open", "REDEEM_FAILS=1"}, func(s specServer) {
			open := s.openRoom("")
			s.ask(404, "room_not_found", get, rooms+"/ABCDEF", "")
			s.ask(429, "too_many_attempts", post, redeem, `{"code":"1234"}`, jsonType)
			s.ask(429, "too_many_attempts", get, rooms+"/ABCDEF", "")
			s.ask(429, "too_many_attempts", get, "/ws/signal/ABCDEF", "", upgradeHeaders...)
			for _, method := range []string{patch, remove} {
				s.ask(429, "too_many_attempts", method, rooms+"/ABCDEF", "", roomBearer(open.OwnerToken))
			}
		}},
		{"rates", []string{"ROOMS=open", "HTTP_RATE_PER_MIN=1", "WS_RATE_PER_MIN=1"}, func(s specServer) {
			s.openRoom("")
			s.ask(429, "rate_limited", post, mint, "")
			s.ask(429, "rate_limited", post, redeem, `{"code":"1234"}`, jsonType)
			s.ask(429, "rate_limited", get, "/ice-servers?appID="+testApp, "")
			s.ask(429, "rate_limited", post, rooms, "")
			for _, method := range []string{get, patch, remove} {
				s.ask(429, "rate_limited", method, rooms+"/ABCDEF", "")
			}
			s.join(wsDial{appID: testApp, side: "A"})
			s.ask(429, "rate_limited", get, pair, "", upgradeHeaders...)
			s.ask(429, "rate_limited", get, "/ws/signal/ABCDEF", "", upgradeHeaders...)
		}},
		{"quotas", []string{"ROOMS=open", "MAX_CODES_PER_IP=1", "MAX_CONNS_PER_IP=1"}, func(s specServer) {
			s.ask(200, "", post, mint, "")
			s.ask(429, "too_many_codes", post, mint, "")
			s.ask(429, "too_many_codes", post, rooms, "")
			s.ask(429, "too_many_codes", get, pair, "", upgradeHeaders...)
		}},
		{"connections of an address", []string{"ROOMS=open", "MAX_CONNS_PER_IP=1"}, func(s specServer) {
			s.join(wsDial{appID: testApp, side: "A"})
			s.ask(429, "too_many_connections", get, pair, "", upgradeHeaders...)
			s.ask(429, "too_many_connections", get, "/ws/signal/ABCDEF", "", upgradeHeaders...)
		}},
		{"connections", []string{"ROOMS=open", "MAX_CONNS=1", "MAX_SESSIONS=1"}, func(s specServer) {
			s.join(wsDial{appID: testApp, side: "A"})
			s.ask(503, "at_capacity", get, pair, "", upgradeHeaders...)
			s.ask(503, "at_capacity", get, "/ws/signal/ABCDEF", "", upgradeHeaders...)
			s.ask(503, "at_capacity", post, mint, "")
			s.ask(503, "at_capacity", post, rooms, "")
		}},
		{"draining", []string{"ROOMS=open"}, func(s specServer) {
			s.draining.Store(true)
			s.clients.close()
			s.ask(503, "draining", get, "/readyz", "")
			s.ask(503, "draining", post, mint, "")
			s.ask(503, "draining", post, redeem, `{"code":"1234"}`, jsonType)
			s.ask(503, "draining", post, rooms, "")
			s.ask(503, "draining", get, pair, "", upgradeHeaders...)
			s.ask(503, "draining", get, "/ws/signal/ABCDEF", "", upgradeHeaders...)
		}},
		{"no backend", []string{"ROOMS=open"}, func(s specServer) {
			real, realCodes := s.hub, s.codes
			s.hub, s.codes = absentBackend{}, absentBackend{}
			defer func() { s.hub, s.codes = real, realCodes }()
			s.ask(503, "backend_unavailable", get, "/readyz", "")
			s.ask(503, "backend_unavailable", post, mint, "")
			s.ask(503, "backend_unavailable", post, redeem, `{"code":"1234"}`, jsonType)
			s.ask(503, "backend_unavailable", get, "/ice-servers?appID="+testApp, "")
			s.ask(503, "backend_unavailable", post, rooms, "")
			for _, method := range []string{get, patch, remove} {
				s.ask(503, "backend_unavailable", method, rooms+"/ABCDEF", "", roomBearer("token"))
			}
			s.ask(503, "backend_unavailable", get, pair, "", upgradeHeaders...)
			s.ask(503, "backend_unavailable", get, "/ws/signal/ABCDEF", "", upgradeHeaders...)
		}},
		{"foreign pages", []string{"DEV=false", "ROOMS=open"}, func(s specServer) {
			s.ask(403, "forbidden_origin", post, mint, "", foreign)
			s.ask(403, "forbidden_origin", post, redeem, `{"code":"1234"}`, foreign, jsonType)
			s.ask(403, "forbidden_origin", post, rooms, "", foreign)
			for _, method := range []string{patch, remove} {
				s.ask(403, "forbidden_origin", method, rooms+"/ABCDEF", "", foreign)
			}
			s.ask(403, "forbidden_origin", get, pair, "", with(upgradeHeaders, foreign)...)
			s.ask(403, "forbidden_origin", get, "/ws/signal/ABCDEF", "", with(upgradeHeaders, foreign)...)
			s.ask(404, "unknown_session", get, pair, "", upgradeHeaders...)
		}},
		{"tokens", []string{"ROOMS=jwt", "MINT_AUTH=jwt", "JWT_SECRET=" + secret}, func(s specServer) {
			s.ask(401, "unauthorized", post, mint, "")
			s.ask(401, "unauthorized", post, rooms, "", roomBearer("token"))
		}},
		{"rooms", []string{"ROOMS=open"}, func(s specServer) {
			s.ask(201, "", post, rooms, `{"maxPlayers":2,"password":"sesame","ttl":60,"locked":true}`)
			open, other := s.openRoom(`{"maxPlayers":2}`), s.openRoom("")
			owner, path := roomBearer(open.OwnerToken), rooms+"/"+open.RoomID
			s.ask(200, "", get, path, "")
			s.ask(200, "", patch, path, `{"password":"sesame"}`, owner)
			for body, code := range map[string]string{`{"maxPlayers":17}`: "bad_max_players", `{"password":1}`: "bad_password",
				`{"locked":1}`: "bad_locked", `[]`: "bad_json"} {
				s.ask(400, code, post, rooms, body)
				s.ask(400, code, patch, path, body, owner)
			}
			s.ask(400, "bad_ttl", post, rooms, `{"ttl":-1}`)
			s.ask(413, "too_large", post, rooms, large)
			s.ask(413, "too_large", patch, path, large, owner)
			s.brokenBody(post, rooms)
			s.brokenBody(patch, path, owner)
			for _, method := range []string{patch, remove} {
				s.ask(401, "unauthorized", method, path, "")
				s.ask(403, "not_creator", method, path, "", roomBearer(other.OwnerToken))
				s.ask(404, "room_not_found", method, rooms+"/"+testApp, "", owner)
			}
			signal := "/ws/signal/" + open.RoomID
			s.ask(426, "upgrade_required", get, signal, "")
			s.ask(400, "bad_upgrade", get, signal, "", upgradeHeaders[:3]...)
			s.ask(400, "bad_display_name", get, signal+"?displayName=%00", "", upgradeHeaders...)
			s.ask(400, "bad_password", get, signal+"?password=x&password=x", "", upgradeHeaders...)
			s.ask(400, "bad_resume", get, signal+"?resume=x&resume=x", "", upgradeHeaders...)
			s.ask(404, "room_not_found", get, "/ws/signal/"+testApp, "", upgradeHeaders...)
			s.ask(403, "wrong_password", get, signal, "", upgradeHeaders...)
			s.ask(200, "", patch, path, `{"password":"","locked":true}`, owner)
			s.ask(403, "room_locked", get, signal, "", upgradeHeaders...)
			s.ask(200, "", patch, path, `{"locked":false}`, owner)
			for range 2 {
				s.upgraded(wsDial{room: open.Code})
			}
			s.ask(409, "room_is_full", get, signal, "", upgradeHeaders...)
			s.ask(200, "", remove, path, "", owner)
		}},
		{"pairs", nil, func(s specServer) {
			s.upgraded(wsDial{appID: testApp, side: "A"})
			s.ask(426, "upgrade_required", get, pair, "")
			s.ask(400, "bad_upgrade", get, pair, "", upgradeHeaders[:3]...)
			s.ask(400, "bad_app_id", get, "/ws?side=A&appID=x", "", upgradeHeaders...)
			s.ask(400, "bad_side", get, "/ws?side=C&appID="+testApp, "", upgradeHeaders...)
			s.ask(400, "bad_sid", get, pair+"&sid="+strings.Repeat("s", maxSID+1), "", upgradeHeaders...)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				spec.t = t
				test.run(specServer{newSettledServer(t, test.settings...), spec})
			})
		})
	}
	for _, answer := range spec.answers() {
		if !spec.seen[answer] {
			t.Errorf("%s has %s, which no call here was answered with", openAPIDoc, answer)
		}
	}
	for code, e := range codeErrors(t) {
		if code == "not_found" || code == "method_not_allowed" || code == "internal_error" { // of what is no operation, and of any
			continue
		}
		told := slices.ContainsFunc(spec.answers(), func(answer string) bool { return strings.HasSuffix(answer, " "+code) })
		if closeOnly := documentedHTTP(t, code) == "–"; told == closeOnly {
			t.Errorf("%s (%d) is told by HTTP: %t in %s, %t in %s", code, e.status, told, openAPIDoc, !closeOnly, protocolDoc)
		}
	}
}

// upgraded opens a WebSocket, and checks the answer to that.
func (s specServer) upgraded(d wsDial) {
	s.t.Helper()
	_, res, err := s.dial(d)
	if err != nil {
		s.t.Fatal(err)
	}
	path := strings.TrimPrefix(d.url(), "ws://parley.test")
	s.spec.check(http.MethodGet, path, httpAnswer{status: res.StatusCode, header: res.Header})
}

// documentedHTTP returns the HTTP status that docs/protocol.md has for a code.
func documentedHTTP(t testing.TB, code string) string {
	t.Helper()
	for _, row := range docTable(t, protocolDoc, "error codes") {
		if slices.Contains(wordsOf(row[0]), code) {
			return row[1]
		}
	}
	t.Fatalf("%s has no %s", protocolDoc, code)
	return ""
}

// The example answers in docs/protocol.md are of the specification.
func TestProtocolDocAnswers(t *testing.T) {
	spec := loadOpenAPI(t)
	blocks := docBlocks(t, protocolDoc, "json answer ")
	if len(blocks) < 5 {
		t.Fatalf("%s has only %d answers", protocolDoc, len(blocks))
	}
	for _, block := range blocks {
		words := strings.Fields(block.info)
		status, err := strconv.Atoi(words[2])
		if err != nil {
			t.Fatalf("%s: %v", block.at, err)
		}
		_, op := spec.operation(words[3], words[4])
		response := op.Responses.Status(status)
		if response == nil {
			t.Errorf("%s: %s %s has no answer %d", block.at, words[3], words[4], status)
			continue
		}
		schema := response.Value.Content.Get("application/json").Schema.Value
		var value any
		if err := json.Unmarshal([]byte(block.text), &value); err != nil {
			t.Errorf("%s: %v", block.at, err)
		} else if err := schema.VisitJSON(value); err != nil {
			t.Errorf("%s: %v", block.at, err)
		}
	}
}
