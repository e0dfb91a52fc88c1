package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
)

// testSecret is long enough for DEV=false.
const testSecret = "a secret of this test of some 40 bytes!!"

func newRSAKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newECKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// writePEM writes a block into a file and returns its path.
func writePEM(t testing.TB, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func publicDER(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func writePublicKey(t testing.TB, key crypto.PublicKey) string {
	t.Helper()
	return writePEM(t, "PUBLIC KEY", publicDER(t, key))
}

// signToken signs claims; header adds to the token's header.
func signToken(t testing.TB, method jwt.SigningMethod, key any, claims jwt.MapClaims, header map[string]any) string {
	t.Helper()
	token := jwt.NewWithClaims(method, claims)
	for name, value := range header {
		token.Header[name] = value
	}
	text, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// goodClaims are claims that are accepted, changed by edit.
func goodClaims(edit ...func(jwt.MapClaims)) jwt.MapClaims {
	c := jwt.MapClaims{"user_id": "ada", "exp": time.Now().Add(time.Hour).Unix()}
	for _, e := range edit {
		e(c)
	}
	return c
}

// with sets a claim, or removes it.
func with(name string, value any) func(jwt.MapClaims) {
	return func(c jwt.MapClaims) {
		if c[name] = value; value == nil {
			delete(c, name)
		}
	}
}

// tokenFor is a good token of testSecret.
func tokenFor(t testing.TB, user string) string {
	t.Helper()
	return signToken(t, jwt.SigningMethodHS256, []byte(testSecret), goodClaims(with("user_id", user)), nil)
}

// Every attack is refused with 401, on both of the calls that ask for a token.
func TestTokenAttacks(t *testing.T) {
	rsaKey := newRSAKey(t)
	keyFile := writePublicKey(t, rsaKey.Public())
	pemBytes, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	hmac := []byte(testSecret)
	in := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	good := func(edit ...func(jwt.MapClaims)) string {
		return signToken(t, jwt.SigningMethodHS256, hmac, goodClaims(edit...), nil)
	}
	parts := strings.Split(good(), ".")
	bySecret := []string{"JWT_SECRET=" + testSecret}
	byKey := []string{"JWT_PUBLIC_KEY_FILE=" + keyFile}
	header := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }

	for _, attack := range []struct {
		name     string
		settings []string
		token    string
		says     string
	}{
		{"alg none", bySecret, signToken(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, goodClaims(), nil), "signed"},
		{"alg None, by hand", bySecret, header(`{"alg":"None","typ":"JWT"}`) + "." + parts[1] + ".", "signed"},
		{"no signature", bySecret, parts[0] + "." + parts[1] + ".", "signed"},
		{"alg none for a public key", byKey, signToken(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, goodClaims(), nil), "signed"},
		{"the public key's file as the secret", byKey, signToken(t, jwt.SigningMethodHS256, pemBytes, goodClaims(), nil), "signed"},
		{"the public key's DER as the secret", byKey, signToken(t, jwt.SigningMethodHS256, publicDER(t, rsaKey.Public()), goodClaims(), nil), "signed"},
		{"the public key's modulus as the secret", byKey, signToken(t, jwt.SigningMethodHS512, rsaKey.N.Bytes(), goodClaims(), nil), "signed"},
		{"another secret", bySecret, signToken(t, jwt.SigningMethodHS256, []byte(testSecret+"x"), goodClaims(), nil), "signed"},
		{"another key", byKey, signToken(t, jwt.SigningMethodRS256, newRSAKey(t), goodClaims(), nil), "signed"},
		{"a key for a secret", bySecret, signToken(t, jwt.SigningMethodRS256, rsaKey, goodClaims(), nil), "signed"},
		{"a curve for an RSA key", byKey, signToken(t, jwt.SigningMethodES256, newECKey(t, elliptic.P256()), goodClaims(), nil), "signed"},
		{"changed claims", bySecret, parts[0] + "." + header(`{"user_id":"eve","exp":9999999999}`) + "." + parts[2], "signed"},
		{"expired", bySecret, good(with("exp", in(-tokenLeeway-time.Second))), "expired"},
		{"no exp", bySecret, good(with("exp", nil)), "exp"},
		{"exp that is no number", bySecret, good(with("exp", "tomorrow")), "valid"},
		{"future nbf", bySecret, good(with("nbf", in(time.Minute))), "not valid yet"},
		{"wrong issuer", append(bySecret, "JWT_ISSUER=us"), good(with("iss", "them")), "issuer"},
		{"no issuer", append(bySecret, "JWT_ISSUER=us"), good(), "iss"},
		{"wrong audience", append(bySecret, "JWT_AUDIENCE=games,files"), good(with("aud", []string{"mail"})), "audience"},
		{"no audience", append(bySecret, "JWT_AUDIENCE=games"), good(), "aud"},
		{"truncated", bySecret, good()[:len(good())-5], "token"},
		{"two parts", bySecret, parts[0] + "." + parts[1], "not a JSON Web Token"},
		{"four parts", bySecret, good() + ".x", "not a JSON Web Token"},
		{"no token at all", bySecret, "ada", "not a JSON Web Token"},
		{"claims that are no object", bySecret, parts[0] + "." + header(`["ada"]`) + "." + parts[2], "not a JSON Web Token"},
		{"oversized header", bySecret, signToken(t, jwt.SigningMethodHS256, hmac, goodClaims(), map[string]any{"x": strings.Repeat("x", 8<<10)}), "8 KiB"},
		{"critical extension", bySecret, signToken(t, jwt.SigningMethodHS256, hmac, goodClaims(), map[string]any{"crit": []string{"b64"}, "b64": false}), "critical"},
		{"no user", bySecret, good(with("user_id", nil)), "user"},
		{"an empty user", bySecret, good(with("user_id", "")), "user"},
		{"a user that is a list", bySecret, good(with("user_id", []string{"ada"})), "user"},
		{"an endless user", bySecret, good(with("user_id", strings.Repeat("a", maxUser+1))), "user"},
	} {
		t.Run(attack.name, func(t *testing.T) {
			ts, _ := newLoopServer(t, append(attack.settings, "DEV=false", "MINT_AUTH=jwt")...)
			for _, path := range []string{"/api/rooms", "/rendezvous/code"} {
				a := ts.call(http.MethodPost, path, "", "Authorization: Bearer "+attack.token)
				if a.status != http.StatusUnauthorized || a.Code != "unauthorized" || a.header.Get("WWW-Authenticate") != "Bearer" || !strings.Contains(a.Error, attack.says) {
					t.Errorf("%s: %d %q %s, want 401 and %q", path, a.status, a.header.Get("WWW-Authenticate"), a.text, attack.says)
				}
				if strings.Contains(a.text, attack.token) || strings.Contains(ts.log.String(), attack.token) {
					t.Error("the token is repeated")
				}
			}
			if n := ts.memory.sessions.Load(); n != 0 {
				t.Errorf("%d sessions were opened", n)
			}
		})
	}
}

// What goes wrong before there is a token to look at.
func TestAuthorizationHeader(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "JWT_SECRET="+testSecret)
		good := tokenFor(t, "ada")
		for _, headers := range [][]string{
			nil,
			{"Authorization: "},
			{"Authorization: Bearer"},
			{"Authorization: Bearer "},
			{"Authorization: Basic YTpi"},
			{"Authorization: " + good},
			{"Authorization: Bearer " + good, "Authorization: Bearer " + good},
			{"Authorization: Bearer " + good + " " + good},
		} {
			if a := ts.call(http.MethodPost, "/api/rooms", "", headers...); a.status != http.StatusUnauthorized || a.header.Get("WWW-Authenticate") != "Bearer" {
				t.Errorf("%.60q: %d %s", headers, a.status, a.text)
			}
		}
		for _, scheme := range []string{"Bearer ", "bearer ", "BEARER  "} { // RFC 9110 section 11.1
			if a := ts.call(http.MethodPost, "/api/rooms", "", "Authorization: "+scheme+good); a.status != http.StatusCreated {
				t.Errorf("%q: %d %s", scheme, a.status, a.text)
			}
		}
	})
}

// Each kind of key takes its own algorithms, and no other.
func TestKeyKinds(t *testing.T) {
	p256, p384, p521 := newECKey(t, elliptic.P256()), newECKey(t, elliptic.P384()), newECKey(t, elliptic.P521())
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey := newRSAKey(t)
	keys := map[string]crypto.Signer{"RSA": rsaKey, "P-256": p256, "P-384": p384, "P-521": p521, "Ed25519": ed}
	methods := map[string][]jwt.SigningMethod{
		"RSA": {jwt.SigningMethodRS256, jwt.SigningMethodRS384, jwt.SigningMethodRS512,
			jwt.SigningMethodPS256, jwt.SigningMethodPS384, jwt.SigningMethodPS512},
		"P-256":   {jwt.SigningMethodES256},
		"P-384":   {jwt.SigningMethodES384},
		"P-521":   {jwt.SigningMethodES512},
		"Ed25519": {jwt.SigningMethodEdDSA},
	}
	for kind, key := range keys {
		v, _ := newVerifier(mustLoad(t, nil, "JWT_PUBLIC_KEY_FILE="+writePublicKey(t, key.Public())), slog.New(slog.DiscardHandler))
		for signer, all := range methods {
			for _, method := range all {
				user, err := v.verify(t.Context(), signToken(t, method, keys[signer], goodClaims(), nil))
				if kind == signer && (err != nil || user != "ada") {
					t.Errorf("%s with %s: %q, %v", kind, method.Alg(), user, err)
				}
				if _, refused := errors.AsType[*tokenError](err); kind != signer && !refused {
					t.Errorf("%s took %s of a %s key: %v", kind, method.Alg(), signer, err)
				}
			}
		}
	}
	secret, _ := newVerifier(mustLoad(t, nil, "JWT_SECRET="+testSecret), slog.New(slog.DiscardHandler))
	for _, method := range []jwt.SigningMethod{jwt.SigningMethodHS256, jwt.SigningMethodHS384, jwt.SigningMethodHS512} {
		if user, err := secret.verify(t.Context(), signToken(t, method, []byte(testSecret), goodClaims(), nil)); err != nil || user != "ada" {
			t.Errorf("%s: %q, %v", method.Alg(), user, err)
		}
	}
}

// A clock may be up to five seconds off, either way.
func TestTokenLeeway(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		claim string
		at    time.Duration // of the claim, from when the token is made
		now   time.Duration
		good  bool
	}{
		{"nbf", 10 * time.Second, 4900 * ms, false},
		{"nbf", 10 * time.Second, 5000 * ms, true},
		{"nbf", 10 * time.Second, 5100 * ms, true},
		{"exp", 10 * time.Second, 14900 * ms, true},
		{"exp", 10 * time.Second, 15100 * ms, false},
		{"exp", 10 * time.Second, 0, true},
		{"iat", 24 * time.Hour, 0, true}, // when it was made says nothing about when it is good
	} {
		synctest.Test(t, func(t *testing.T) {
			v, _ := newVerifier(mustLoad(t, nil, "JWT_SECRET="+testSecret), slog.New(slog.DiscardHandler))
			token := signToken(t, jwt.SigningMethodHS256, []byte(testSecret), goodClaims(with(tc.claim, time.Now().Add(tc.at).Unix())), nil)
			time.Sleep(tc.now)
			if _, err := v.verify(t.Context(), token); (err == nil) != tc.good {
				t.Errorf("%s at %s, looked at after %s: %v", tc.claim, tc.at, tc.now, err)
			}
		})
	}
}

// The user is what the claim says, else sub.
func TestTokenUser(t *testing.T) {
	for _, tc := range []struct {
		settings string
		claims   jwt.MapClaims
		want     string
	}{
		{"", goodClaims(), "ada"},
		{"", goodClaims(with("sub", "other")), "ada"},
		{"", goodClaims(with("user_id", nil), with("sub", "bob")), "bob"},
		{"", goodClaims(with("user_id", 9007199254740993)), "9007199254740993"},
		{"JWT_USER_CLAIM=email", goodClaims(with("email", "a@b")), "a@b"},
		{"JWT_USER_CLAIM=email", goodClaims(with("sub", "bob")), "bob"},
		{"JWT_ISSUER=us", goodClaims(with("iss", "us")), "ada"},
		{"JWT_AUDIENCE=games,files", goodClaims(with("aud", "files")), "ada"},
		{"JWT_AUDIENCE=games", goodClaims(with("aud", []string{"mail", "games"})), "ada"},
		{"", goodClaims(with("nbf", time.Now().Add(-time.Second).Unix())), "ada"},
	} {
		v, _ := newVerifier(mustLoad(t, nil, "JWT_SECRET="+testSecret, tc.settings), slog.New(slog.DiscardHandler))
		user, err := v.verify(t.Context(), signToken(t, jwt.SigningMethodHS256, []byte(testSecret), tc.claims, nil))
		if err != nil || user != tc.want {
			t.Errorf("%s %v: %q, %v; want %q", tc.settings, tc.claims, user, err, tc.want)
		}
	}
}

// A key file that cannot be used stops the start and says why.
func TestPublicKeyFile(t *testing.T) {
	key := newRSAKey(t)
	if _, err := readPublicKey(writePEM(t, "RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&key.PublicKey))); err != nil {
		t.Error("PKCS #1:", err)
	}
	pair := testkit.WritePair(t, t.TempDir(), 5)
	if _, err := readPublicKey(pair.CertFile); err != nil {
		t.Error("certificate:", err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	x25519 := []byte{0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x03, 0x21, 0x00, 31: 9, 43: 9}
	for file, says := range map[string]string{
		writePEM(t, "PRIVATE KEY", []byte("x")):                               "not with a PRIVATE KEY",
		writePEM(t, "PUBLIC KEY", []byte("x")):                                "cannot be read",
		writePublicKey(t, small.Public()):                                     "1024 bits",
		writePublicKey(t, newECKey(t, elliptic.P224()).Public()):              "of a kind",
		writePEM(t, "PUBLIC KEY", x25519):                                     "of a kind",
		filepath.Join(t.TempDir(), "missing"):                                 "cannot be read",
		writePEM(t, "CERTIFICATE", []byte("x")):                               "cannot be read",
		writePEM(t, "RSA PUBLIC KEY", publicDER(t, newRSAKey(t).Public())):    "cannot be read",
		writePEM(t, "EC PRIVATE KEY", []byte("not to be repeated in a log!")): "not with a EC PRIVATE KEY",
	} {
		_, err := loadConfig(nil, environ("JWT_PUBLIC_KEY_FILE="+file))
		if err == nil || !strings.Contains(err.Error(), "JWT_PUBLIC_KEY_FILE") || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want %q", err, says)
		}
	}
}

// A jwksServer serves a set of keys that a test changes.
type jwksServer struct {
	*httptest.Server

	mu     sync.Mutex
	body   []byte // guarded by mu
	status int    // guarded by mu
	asked  int    // guarded by mu
}

func newJWKSServer(t testing.TB) *jwksServer {
	s := &jwksServer{status: http.StatusOK}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked++
		w.WriteHeader(s.status)
		w.Write(s.body)
	}))
	t.Cleanup(func() {
		s.Server.Close()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return s
}

func (s *jwksServer) answer(status int, body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status, s.body = status, body
}

func (s *jwksServer) times() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// jwks returns a set of public keys by key ID.
func jwks(t testing.TB, keys map[string]crypto.PublicKey) []byte {
	t.Helper()
	store := jwkset.NewMemoryStorage()
	for kid, key := range keys {
		k, err := jwkset.NewJWKFromKey(key, jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{KID: kid}})
		if err != nil {
			t.Fatal(err)
		}
		if err := store.KeyWrite(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	body, err := store.JSONPublic(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func TestJWKS(t *testing.T) {
	first, second := newRSAKey(t), newECKey(t, elliptic.P256())
	web := newJWKSServer(t)
	web.answer(http.StatusServiceUnavailable, nil)
	log := new(lockedBuffer)
	v, keys := newVerifier(mustLoad(t, nil, "JWT_JWKS_URL="+web.URL+"/keys"), slog.New(slog.NewTextHandler(log, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()

	token := func(method jwt.SigningMethod, key any, kid string) string {
		var header map[string]any
		if kid != "" {
			header = map[string]any{"kid": kid}
		}
		return signToken(t, method, key, goodClaims(), header)
	}
	good := func(what, token string) {
		t.Helper()
		if user, err := v.verify(ctx, token); err != nil || user != "ada" {
			t.Errorf("%s: %q, %v", what, user, err)
		}
	}
	refused := func(what, token string) {
		t.Helper()
		_, err := v.verify(ctx, token)
		if _, refused := errors.AsType[*tokenError](err); !refused {
			t.Errorf("%s: %v, want it refused", what, err)
		}
	}
	ofFirst := token(jwt.SigningMethodRS256, first, "first")

	// While there are no keys nobody can say whether a token is good.
	running.Go(func() { keys(ctx) })
	testkit.Eventually(t, "a first try", func() bool { return strings.Contains(log.String(), "keys not fetched") })
	if _, err := v.verify(ctx, ofFirst); !errors.Is(err, errNoKeys) {
		t.Errorf("without keys: %v", err)
	}
	web.answer(http.StatusOK, jwks(t, map[string]crypto.PublicKey{"first": first.Public()}))
	testkit.Eventually(t, "the keys", func() bool { _, err := v.verify(ctx, ofFirst); return err == nil })

	good("by key ID", ofFirst)
	good("without a key ID", token(jwt.SigningMethodPS384, first, ""))
	refused("HMAC with the key as the secret", token(jwt.SigningMethodHS256, publicDER(t, first.Public()), "first"))
	refused("another key of that ID", token(jwt.SigningMethodRS256, newRSAKey(t), "first"))
	refused("another kind of key of that ID", token(jwt.SigningMethodES256, second, "first"))

	// A rotation is noticed by the first token of the new key.
	web.answer(http.StatusOK, jwks(t, map[string]crypto.PublicKey{"second": second.Public()}))
	good("after a rotation", token(jwt.SigningMethodES256, second, "second"))
	asked := web.times()
	refused("a revoked key", ofFirst[:len(ofFirst)-1]+"A")
	refused("without a key ID, of a revoked key", token(jwt.SigningMethodRS256, first, ""))
	for i := range 20 {
		refused("unknown key ID", token(jwt.SigningMethodES256, second, fmt.Sprint("guess ", i)))
	}
	if n := web.times() - asked; n > 1 {
		t.Errorf("%d fetches for 20 unknown key IDs, want at most one each %v", n, keysAtOnce)
	}

	// While the URL does not answer, the keys stay.
	web.answer(http.StatusInternalServerError, nil)
	good("with the URL down", token(jwt.SigningMethodES256, second, "second"))
}

// What the key server answers is bounded, and cannot lead to plain HTTP elsewhere.
func TestJWKSHostile(t *testing.T) {
	key := newRSAKey(t)
	body := jwks(t, map[string]crypto.PublicKey{"k": key.Public()})
	endless := append(bytes.TrimSuffix(bytes.TrimSpace(body), []byte("}")), []byte(`,"x":"`+strings.Repeat("x", maxKeysBytes)+`"}`)...)
	redirects := httptest.NewServer(http.RedirectHandler("http://keys.example/keys", http.StatusFound))
	defer redirects.Close()
	web := newJWKSServer(t)
	fetch := func(url string) error {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		return (&keySet{url: url, log: slog.New(slog.DiscardHandler)}).fetch(ctx)
	}
	if err := fetch(redirects.URL); err == nil || !strings.Contains(err.Error(), "must be an https URL") {
		t.Error("redirect to plain HTTP:", err)
	}
	for what, answer := range map[string][]byte{"more than 1 MiB": endless, "no JSON": []byte("<html>"), "cut short": body[:len(body)/2]} {
		web.answer(http.StatusOK, answer)
		if err := fetch(web.URL); err == nil {
			t.Errorf("%s: taken", what)
		}
	}
	web.answer(http.StatusOK, body)
	if err := fetch(web.URL); err != nil {
		t.Error(err)
	}
}

// A server whose keys have not come yet says so, and that it is no fault of the token.
func TestNoKeysYet(t *testing.T) {
	web := newJWKSServer(t)
	web.answer(http.StatusNotFound, nil)
	ts, _ := newLoopServer(t, "JWT_JWKS_URL="+web.URL, "ROOMS=jwt")
	a := ts.call(http.MethodPost, "/api/rooms", "", "Authorization: Bearer "+signToken(t, jwt.SigningMethodRS256, newRSAKey(t), goodClaims(), nil))
	if a.status != http.StatusServiceUnavailable || a.Code != "backend_unavailable" || a.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", a.status, a.text)
	}
	var got struct{ Error string }
	if err := json.Unmarshal([]byte(a.text), &got); err != nil || got.Error == "" {
		t.Error(a.text)
	}
}
