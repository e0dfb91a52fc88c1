package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/pion/stun/v3"
)

// --- decodeFrame.

// A slowFrame is what a frame says, found by encoding/json.
type slowFrame struct {
	name string
	raw  map[string]json.RawMessage // the last of each name
}

var errNoFrame = errors.New("not a frame")

// slowDecode is the reference for frameDecoder.decode.
func slowDecode(data []byte) (f slowFrame, err error) {
	if !utf8.Valid(data) {
		return f, errBadUTF8
	}
	if !json.Valid(data) || bytes.TrimLeft(data, " \t\r\n")[0] != '{' {
		return f, errNoFrame
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber() // for numbers that no float64 holds
	var all any
	if err := d.Decode(&all); err != nil {
		return f, err
	}
	if slowDepth(all) > maxNesting {
		return f, errNoFrame
	}
	f.raw = make(map[string]json.RawMessage)
	types := 0
	d = json.NewDecoder(bytes.NewReader(data))
	d.Token()
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return f, err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return f, err
		}
		if f.raw[name.(string)] = value; name == "type" {
			types++
		}
	}
	if types != 1 || f.raw["type"][0] != '"' {
		return f, errNoFrame
	}
	return f, json.Unmarshal(f.raw["type"], &f.name)
}

// slowDepth is the number of levels of objects and arrays.
func slowDepth(v any) int {
	deepest := 0
	switch v := v.(type) {
	case map[string]any:
		for _, e := range v {
			deepest = max(deepest, slowDepth(e))
		}
	case []any:
		for _, e := range v {
			deepest = max(deepest, slowDepth(e))
		}
	default:
		return 0
	}
	return 1 + deepest
}

// frameSeeds are frames of every kind, and what is almost one.
func frameSeeds() []string {
	nested := func(open, shut string, n int) string { return strings.Repeat(open, n) + strings.Repeat(shut, n) }
	return []string{
		`{"type":"offer","sdp":"v=0\r\n"}`, `{"type":"answer"}`, `{"type":"ice","candidate":null}`, `{"type":"sender_ready"}`, `{"type":"bye"}`,
		`{"type":"send","to":"B","payload":{"a":[1,2.5e-3,true]},"id":7}`, `{"type":"hello","deliveredUpTo":12}`,
		`{"type":"delivered","upTo":3}`, `{"type":"delivered","seq":3}`, `{"type":"ping","t":[1 , 2]}`,
		`{"type":"telemetry","event":"ice-connected","mode":"relay","reason":""}`, `{"type":"deliver"}`, `{"type":""}`,
		" \t\r\n{ \"type\" : \"ice\" , \"x\" : { } }\n", "{\"\\u0074ype\":\"\\u0069ce\"}", `{"type":"\ud800\u0000","x":"\udfff"}`, `{"\ud83d\ude00":1,"type":"ice"}`,
		`{"type":"ice","id":18446744073709551615}`, `{"type":"ice","id":9223372036854775807}`, `{"type":"ice","id":-0}`, `{"type":"ice","id":1.0}`, `{"type":"ice","id":"1"}`,
		`{"type":"ice","x":1e999,"x":0}`, `{"type":"ice","t":1,"t":2}`, `{"type":"ice","type":"ice"}`, `{"type":"ice","\u0074ype":1}`, `{"type":7}`, `{"type":null}`, `{"Type":"ice"}`,
		`{"type":"ice"}x`, `{"type":"ice"}{}`, `{"type":"ice",}`, `{"type":"ice"`, `{"type"}`, `{`, `}`, ``, ` `, `[]`, `"type"`, `null`, `0`,
		`{"type":"ice","x":"\x"}`, "{\"type\":\"ice\",\"x\":\"\n\"}", "{\"type\":\"ice\"}\x00", "\ufeff{\"type\":\"ice\"}", "{\"type\":\"\xff\"}", "{\"type\":\"ice\",\"x\":\"\xed\xa0\x80\"}",
		`{"type":"ice","x":` + nested("[", "]", 63) + `}`, `{"type":"ice","x":` + nested("[", "]", 64) + `}`,
		nested(`{"x":`, `}`, 62) + `,"type":"ice"}`, `{"type":"ice","x":` + strings.Repeat(`{"x":`, 63) + "0" + strings.Repeat("}", 63) + `}`,
		`{"type":"ice","x":"` + nested("[", "]", 100) + `\\\"` + nested("{", "}", 100) + `"}`, `{"y":[[],{}],"type":"ice","x":` + nested("[", "]", 63) + `}`, `{"type":"ice","x":[` + strings.Repeat("[],", 200) + `[]]}`,
	}
}

// decode accepts exactly what encoding/json and the contract say, finds the same
// in it, and does not take memory for nothing.
func FuzzDecodeFrame(f *testing.F) {
	for _, s := range frameSeeds() {
		f.Add([]byte(s))
	}
	pool := newFrameDecoderPool()
	known := []string{"type", "to", "payload", "id", "deliveredUpTo", "upTo", "seq", "event", "mode", "reason", "t"}
	f.Fuzz(func(t *testing.T, data []byte) {
		before := bytes.Clone(data)
		allocated := heapAllocated()
		d := pool.Get().(*frameDecoder)
		m, err := d.decode(data)
		pool.Put(d)
		if n, most := heapAllocated()-allocated, uint64(1<<20+16*len(data)); n > most {
			t.Errorf("%d bytes allocated for %d", n, len(data))
		}
		if !bytes.Equal(data, before) {
			t.Fatalf("the frame was changed to %q", data)
		}
		want, wantErr := slowDecode(data)
		if (err == nil) != (wantErr == nil) || errors.Is(err, errBadUTF8) != errors.Is(wantErr, errBadUTF8) {
			t.Fatalf("decode says %v, the reference %v", err, wantErr)
		}
		if err != nil {
			var e *frameError
			if !errors.Is(err, errBadUTF8) && (!errors.As(err, &e) || e.code != "bad_frame" || !strings.Contains(e.text, " ")) {
				t.Errorf("the error is %#v", err)
			}
			return
		}
		if string(m.name) != want.name || clientType(m.name) != m.typ || (m.typ != typeUnknown) != (m.typ.String() == want.name && isClientType(want.name)) {
			t.Errorf("the type is %q, %v; want %q", m.name, m.typ, want.name)
		}
		for _, name := range known {
			value, there := want.raw[name]
			got := *m.raw.member([]byte(name))
			if !bytes.Equal(got, value) || (got != nil) != there {
				t.Errorf("%s is %q, want %q", name, got, value)
			}
		}
		id, err := strconv.ParseInt(string(want.raw["id"]), 10, 64)
		if err != nil || id < 0 || id > maxInteger {
			id = 0
		}
		if m.id != uint64(id) {
			t.Errorf("the id is %d, want %d", m.id, id)
		}
	})
}

func isClientType(name string) bool {
	return slices.Contains([]string{"offer", "answer", "ice", "sender_ready", "bye", "send", "hello", "delivered", "ping", "telemetry"}, name)
}

// heapAllocated is how many bytes this process has ever allocated; small
// objects count when their page is full.
func heapAllocated() uint64 {
	s := []runtimemetrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	runtimemetrics.Read(s)
	return s[0].Value.Uint64()
}

// --- Redeeming.

// Codes of fuzzCodes.
const (
	liveCode = "2802"
	usedCode = "28020"
)

// fuzzCodes are codes that no redeem changes.
type fuzzCodes struct{ codes }

func (fuzzCodes) Redeem(_ context.Context, code string) (sessionID, time.Time, error) {
	switch code {
	case liveCode:
		return sessionID{1}, time.Unix(2_000_000_000, 0), nil
	case usedCode:
		return sessionID{1}, time.Time{}, errCodeUsed
	}
	return sessionID{}, time.Time{}, errCodeGone
}

var codeForm = regexp.MustCompile(`^[0-9]{4,9}$`)

// slowRedeem is the reference for POST /rendezvous/redeem.
func slowRedeem(contentType string, body []byte) (status int, code string) {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil || media != "application/json" && !strings.HasSuffix(media, "+json") {
		return http.StatusUnsupportedMediaType, "unsupported_media_type"
	}
	if len(body) > 4096 {
		return http.StatusRequestEntityTooLarge, "too_large"
	}
	var v any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if json.Valid(body) {
		d.Decode(&v)
	}
	object, ok := v.(map[string]any)
	if !ok {
		return http.StatusBadRequest, "bad_json"
	}
	typed, _ := object["code"].(string)
	switch {
	case !codeForm.MatchString(typed):
		return http.StatusBadRequest, "bad_code"
	case typed == liveCode:
		return http.StatusOK, ""
	}
	return http.StatusGone, "gone"
}

func FuzzRedeemBody(f *testing.F) {
	const jsonMedia = "application/json"
	for _, body := range []string{
		`{"code":"2802"}`, `{"code":"28020"}`, `{"code":"1234"}`, `{"code":"0042","x":[{}]}`, ` { "code" : "2802" } `, `{"code":"1","code":"2802"}`, `{"code":"2802","code":null}`,
		`{"Code":"2802"}`, `{"CODE":"2802","code":"123456789"}`, `{"c\u006fde":"\u00328\u00302"}`, `{"code":2802}`, `{"code":null}`, `{"code":""}`, `{"code":["2802"]}`, `{"code":{}}`,
		`{"code":"280"}`, `{"code":"2802802802"}`, `{"code":"28o2"}`, `{"code":"２８０２"}`, `{"code":" 2802"}`, `{"code":"2802\n"}`, "{\"code\":\"2802\xff\"}", "{\"code\xff\":\"2802\"}",
		``, ` `, `null`, `[]`, `"2802"`, `2802`, `{`, `{}`, `{}{}`, `{"code":"2802"}}`, `{"code":1e999}`, `code=2802`, strings.Repeat("[", 2000), `{"x":"` + strings.Repeat("x", 4096) + `"}`,
		`{"code":"2802"}` + strings.Repeat(" ", 4096-15), `{"code":"2802"}` + strings.Repeat(" ", 4096-14),
	} {
		f.Add(jsonMedia, []byte(body))
	}
	for _, media := range []string{"", "text/plain", "Application/JSON; charset=utf-8", "application/vnd.x+json", "application/json;", "application/json; =", "application/jsonp", "multipart/form-data; boundary=x", "+json", "\x00"} {
		f.Add(media, []byte(`{"code":"2802"}`))
	}
	cfg, err := loadConfig(nil, lookupIn([]string{"REDEEM_FAILS=0"}))
	if err != nil {
		f.Fatal(err)
	}
	s := newParley(cfg, slog.New(slog.NewTextHandler(io.Discard, nil)))
	s.codes = fuzzCodes{s.codes}
	handler := s.handler()
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		req := httptest.NewRequest(http.MethodPost, "/rendezvous/redeem", bytes.NewReader(body))
		if contentType != "" {
			req.Header.Set("Content-Type", contentType)
		}
		res := httptest.NewRecorder()
		handler.ServeHTTP(res, req)
		status, code := slowRedeem(contentType, body)
		if res.Code != status {
			t.Fatalf("answered %d %s, want %d %s", res.Code, res.Body, status, code)
		}
		var answer map[string]string
		if err := json.Unmarshal(res.Body.Bytes(), &answer); err != nil || answer["code"] != code {
			t.Errorf("answered %d %s, %v; want the code %s", res.Code, res.Body, err, code)
		}
		if res.Header().Get("Content-Type") != jsonMedia || res.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("answered with the header %v", res.Header())
		}
		if status == http.StatusOK && (len(answer) != 2 || answer["appID"] != sessionID{1}.String() || answer["expiresAt"] != "2033-05-18T03:33:20.000Z") {
			t.Errorf("answered %s", res.Body)
		}
		if status != http.StatusOK && (len(answer) != 2 || !strings.Contains(answer["error"], " ")) {
			t.Errorf("answered %s", res.Body)
		}
	})
}

// Whatever comes before a credential does, by a datagram or by a stream, is
// answered by no more than one message, and never relayed.
func FuzzTURN(f *testing.F) {
	binding := stun.MustBuild(stun.TransactionID, stun.BindingRequest, stun.Fingerprint)
	allocate := stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest), requestedTransport(17))
	forged := stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest), requestedTransport(17),
		stun.NewUsername("9999999999:00112233445566778899aabbccddeeff"), stun.NewRealm(turnRealm), stun.NewNonce("AAAAAAAAAAAAAAAA"), turnKey("a", "b"))
	indication := stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodSend, stun.ClassIndication), peerAttribute(virtual(1024)), attribute(stun.AttrData, 1, 2, 3))
	for _, m := range [][]byte{binding.Raw, allocate.Raw, forged.Raw, indication.Raw, channelData(0x4000, "hello"), {}, {0}, {64, 0, 0}, []byte("GET / HTTP/1.1"),
		slices.Concat(binding.Raw, allocate.Raw, channelData(0x4000, "four"))} {
		f.Add(m)
	}
	cfg, err := loadConfig(nil, lookupIn([]string{"TURN=on", "RATE_EXEMPT=0.0.0.0/0"}))
	if err != nil {
		f.Fatal(err)
	}
	r := newTURNServer(cfg, slog.New(slog.DiscardHandler), newMetrics(), func(context.Context, sessionID) (int, error) { return 2, nil })
	src := turnSource{addr: netip.MustParseAddrPort("198.51.100.1:1")}
	f.Fuzz(func(t *testing.T, data []byte) {
		buf := make([]byte, headroom+len(data)+tailroom)
		copy(buf[headroom:], data)
		if len(data) <= maxTURNMessage {
			w := new(discardWriter)
			r.take(w, src, slices.Clone(buf), headroom, headroom+len(data), r.now())
			if w.n > 1 {
				t.Fatalf("%d answers to %x", w.n, data)
			}
		}
		for b := data; len(b) > 0; {
			size, ok := streamMessage(b)
			if !ok || size == 0 || size > len(b) {
				break
			}
			if size < 4 || size%4 != 0 {
				t.Fatalf("a message of %d bytes in a stream: %x", size, b[:size])
			}
			b = b[size:]
		}
		if r.count != 0 {
			t.Fatal("an allocation without a credential")
		}
	})
}
