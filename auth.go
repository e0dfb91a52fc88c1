package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/time/rate"
)

// A verifier says for whom a bearer token speaks. Error: a *tokenError for a
// token that is not good, any other when that cannot be told for now.
type verifier interface {
	verify(ctx context.Context, token string) (user string, err error)
}

// A tokenError says in words for the client what is wrong with its token.
type tokenError struct{ text string }

func (e *tokenError) Error() string { return e.text }

// errNoKeys means that the server itself has no keys to check tokens with yet.
var errNoKeys = errors.New("the keys to check tokens with could not be fetched yet")

// Bounds of a token, in bytes.
const (
	maxToken = 8 << 10
	maxUser  = 256
)

// tokenLeeway is how far the clock that a token was made by may be from this one.
const tokenLeeway = 5 * time.Second

// authenticate returns the user for whom the request's bearer token speaks.
func (s *server) authenticate(r *http.Request) (user string, err error) {
	token, err := bearerToken(r)
	if err != nil {
		return "", err
	}
	return s.verifier.verify(r.Context(), token)
}

// bearerToken returns the token of the request's Authorization, RFC 6750
// section 2.1.
func bearerToken(r *http.Request) (string, error) {
	values := r.Header["Authorization"]
	if len(values) == 0 {
		return "", &tokenError{"a bearer token is needed: Authorization: Bearer <token>"}
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	token = strings.TrimSpace(token)
	if len(values) > 1 || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", &tokenError{"Authorization must be given once, as Bearer <token>"}
	}
	return token, nil
}

// A jwtVerifier verifies JSON Web Tokens, RFC 7519.
type jwtVerifier struct {
	// static after construction
	parser    *jwt.Parser
	keys      func(*jwt.Token) (any, error)
	userClaim string
}

// newVerifier returns the verifier of the key that is configured, and what has
// to run beside it; both are nil without a key.
func newVerifier(cfg *config, log *slog.Logger) (v verifier, run func(context.Context) error) {
	switch {
	case cfg.jwtSecret != "":
		secret := []byte(cfg.jwtSecret)
		return newJWTVerifier(cfg, func(*jwt.Token) (any, error) { return secret, nil }, hmacAlgorithms()), nil
	case cfg.jwtPublicKey != nil:
		key := cfg.jwtPublicKey
		return newJWTVerifier(cfg, func(*jwt.Token) (any, error) { return key, nil }, keyAlgorithms(key)), nil
	case cfg.jwksURL != "":
		set := &keySet{url: cfg.jwksURL, log: log}
		return newJWTVerifier(cfg, set.key, allKeyAlgorithms()), set.run
	}
	return nil, nil
}

func newJWTVerifier(cfg *config, keys func(*jwt.Token) (any, error), algorithms []string) *jwtVerifier {
	options := []jwt.ParserOption{
		jwt.WithValidMethods(algorithms),
		jwt.WithExpirationRequired(),
		jwt.WithLeeway(tokenLeeway),
		jwt.WithJSONNumber(), // a user may be a number
		jwt.WithStrictDecoding(),
	}
	if cfg.jwtIssuer != "" {
		options = append(options, jwt.WithIssuer(cfg.jwtIssuer))
	}
	if len(cfg.jwtAudience) > 0 {
		options = append(options, jwt.WithAudience(cfg.jwtAudience...))
	}
	return &jwtVerifier{parser: jwt.NewParser(options...), keys: keys, userClaim: cfg.jwtUserClaim}
}

// The algorithms of RFC 7518 section 3.1 and RFC 8037 that go with a kind of
// key. A token whose alg is another is refused, whatever its signature: the
// token does not choose how it is checked.
func hmacAlgorithms() []string { return []string{"HS256", "HS384", "HS512"} }

func keyAlgorithms(key crypto.PublicKey) []string {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	case *ecdsa.PublicKey:
		switch key.Curve.Params().BitSize {
		case 256:
			return []string{"ES256"}
		case 384:
			return []string{"ES384"}
		case 521:
			return []string{"ES512"}
		}
	case ed25519.PublicKey:
		return []string{"EdDSA"}
	}
	return nil
}

func allKeyAlgorithms() []string {
	return []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
}

func (v *jwtVerifier) verify(_ context.Context, token string) (user string, err error) {
	if len(token) > maxToken {
		return "", &tokenError{"the token is longer than 8 KiB"}
	}
	claims := jwt.MapClaims{}
	parsed, err := v.parser.ParseWithClaims(token, claims, v.keys)
	if errors.Is(err, errNoKeys) {
		return "", errNoKeys
	} else if err != nil {
		return "", &tokenError{tokenProblem(err)}
	}
	if _, critical := parsed.Header["crit"]; critical { // RFC 7515 section 4.1.11
		return "", &tokenError{"the token has critical extensions, of which none is known here"}
	}
	if user = claimText(claims[v.userClaim]); user == "" {
		user = claimText(claims["sub"])
	}
	if user == "" || len(user) > maxUser {
		return "", &tokenError{fmt.Sprintf("the token names no user of at most %d bytes in %q or \"sub\"", maxUser, v.userClaim)}
	}
	return user, nil
}

// claimText returns a claim that is a string or a number as text, else "".
func claimText(claim any) string {
	switch claim := claim.(type) {
	case string:
		return claim
	case json.Number:
		return claim.String()
	}
	return ""
}

// tokenProblem says what is wrong with a token, without repeating any of it.
func tokenProblem(err error) string {
	switch {
	case errors.Is(err, jwt.ErrTokenMalformed):
		return "the token is not a JSON Web Token"
	case errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return "the token lacks a claim that is needed: exp, and iss and aud where they are checked"
	case errors.Is(err, jwt.ErrTokenExpired):
		return "the token has expired"
	case errors.Is(err, jwt.ErrTokenNotValidYet):
		return "the token is not valid yet"
	case errors.Is(err, jwt.ErrTokenInvalidIssuer):
		return "the token is of another issuer"
	case errors.Is(err, jwt.ErrTokenInvalidAudience):
		return "the token is for another audience"
	case errors.Is(err, jwt.ErrTokenSignatureInvalid), errors.Is(err, jwt.ErrTokenUnverifiable):
		return "the token is not signed with a key and an algorithm that are accepted here"
	}
	return "the token is not valid"
}

// A keySet is the keys of a JWKS URL, RFC 7517. They are fetched every
// keysEvery, and at once, though not more often than keysAtOnce allows, when a
// token names a key that is not among them: so a rotation is noticed. While the
// URL does not answer the keys stay as they were.
type keySet struct {
	// static after construction
	url string
	log *slog.Logger

	fetched atomic.Pointer[keyfunc.Keyfunc] // nil before the first success
}

const (
	keysEvery     = 15 * time.Minute
	keysAtOnce    = 10 * time.Second
	keysTimeout   = 5 * time.Second
	maxKeysBytes  = 1 << 20
	keysRetryMost = 30 * time.Second
)

// run fetches the keys for the first time, and keeps them fresh until ctx is
// done.
func (k *keySet) run(ctx context.Context) error {
	for wait := time.Second; ; wait = min(2*wait, keysRetryMost) {
		err := k.fetch(ctx)
		if err == nil {
			<-ctx.Done()
			return nil
		}
		k.log.Warn("keys not fetched", "JWT_JWKS_URL", k.url, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// fetch fetches the keys for the first time; from then on the library does,
// until ctx is done.
func (k *keySet) fetch(ctx context.Context) error {
	storage, err := jwkset.NewStorageFromHTTP(k.url, jwkset.HTTPClientStorageOptions{
		Ctx:             ctx,
		Client:          &http.Client{Transport: limitedTransport{http.DefaultTransport}, CheckRedirect: checkKeysRedirect},
		HTTPTimeout:     keysTimeout,
		RefreshInterval: keysEvery,
		RefreshErrorHandler: func(_ context.Context, err error) {
			k.log.Warn("keys not fetched anew", "JWT_JWKS_URL", k.url, "error", err)
		},
	})
	if err != nil {
		return err
	}
	// RateLimitWaitMax bounds the fetch, too.
	client, err := jwkset.NewHTTPClient(jwkset.HTTPClientOptions{
		HTTPURLs:          map[string]jwkset.Storage{k.url: storage},
		RefreshUnknownKID: rate.NewLimiter(rate.Every(keysAtOnce), 1),
		RateLimitWaitMax:  keysTimeout,
	})
	if err != nil {
		return err
	}
	keys, err := keyfunc.New(keyfunc.Options{Ctx: ctx, Storage: client})
	if err != nil {
		return err
	}
	k.fetched.Store(&keys)
	return nil
}

// key returns the keys that may have signed a token: the one it names, or all;
// of those the ones that go with its algorithm.
func (k *keySet) key(token *jwt.Token) (any, error) {
	keys := k.fetched.Load()
	if keys == nil {
		return nil, errNoKeys
	}
	found, err := (*keys).Keyfunc(token)
	if err != nil {
		return nil, err
	}
	set, several := found.(jwt.VerificationKeySet)
	if !several {
		set.Keys = []jwt.VerificationKey{found}
	}
	set.Keys = slices.DeleteFunc(set.Keys, func(key jwt.VerificationKey) bool {
		return !slices.Contains(keyAlgorithms(key), token.Method.Alg())
	})
	return set, nil
}

// A limitedTransport ends answers that are longer than any set of keys.
type limitedTransport struct{ http.RoundTripper }

func (t limitedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := t.RoundTripper.RoundTrip(r)
	if err == nil {
		res.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(res.Body, maxKeysBytes), res.Body}
	}
	return res, err
}

// checkKeysRedirect lets nobody be led from https to something less.
func checkKeysRedirect(r *http.Request, via []*http.Request) error {
	if len(via) >= 5 {
		return errors.New("too many redirects")
	}
	return checkJWKSURL(r.URL.String())
}

// checkJWKSURL takes an https URL, or an http one on this machine.
func checkJWKSURL(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Hostname() == "" || u.Scheme != "https" && !(u.Scheme == "http" && isLoopback(u.Hostname())) {
		return fmt.Errorf("must be an https URL, or an http one on loopback, not %q", text)
	}
	return nil
}

// minRSABits is the least that RFC 7518 section 3.3 allows.
const minRSABits = 2048

// readPublicKey reads a public key, or a certificate's, from a PEM file.
func readPublicKey(file string) (crypto.PublicKey, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("names a file without PEM in it: %s", file)
	}
	var key crypto.PublicKey
	switch block.Type {
	case "PUBLIC KEY":
		key, err = x509.ParsePKIXPublicKey(block.Bytes)
	case "RSA PUBLIC KEY":
		key, err = x509.ParsePKCS1PublicKey(block.Bytes)
	case "CERTIFICATE":
		var c *x509.Certificate
		if c, err = x509.ParseCertificate(block.Bytes); err == nil {
			key = c.PublicKey
		}
	default:
		return nil, fmt.Errorf("must name a file with a PUBLIC KEY or a CERTIFICATE, not with a %s: %s", block.Type, file)
	}
	if err != nil {
		return nil, fmt.Errorf("names a file whose key cannot be read: %s: %w", file, err)
	}
	if key, ok := key.(*rsa.PublicKey); ok && key.N.BitLen() < minRSABits {
		return nil, fmt.Errorf("names an RSA key of %d bits, less than %d: %s", key.N.BitLen(), minRSABits, file)
	}
	if keyAlgorithms(key) == nil {
		return nil, fmt.Errorf("names a key of a kind that no token is signed with, %T: %s", key, file)
	}
	return key, nil
}
