package testkit

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A Pair is a certificate for parley.test with its key, in files.
type Pair struct {
	CertFile, KeyFile string
	Serial            *big.Int
	Roots             *x509.CertPool // which trust it
}

// WritePair makes a pair and writes its files into dir, over what is there.
func WritePair(t testing.TB, dir string, serial int64) Pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "parley.test"}, DNSNames: []string{"parley.test"}, IPAddresses: []net.IP{net.IPv4(203, 0, 113, 10)}, // the second is the lab's
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), // before the clock of a bubble begins
		NotAfter:  time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA:      true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p := Pair{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), template.SerialNumber, x509.NewCertPool()}
	parsed, err := x509.ParseCertificate(cert)
	if err != nil {
		t.Fatal(err)
	}
	p.Roots.AddCert(parsed)
	WriteFile(t, p.CertFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})))
	WriteFile(t, p.KeyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	return p
}

// WriteFile writes a file that only its owner may read.
func WriteFile(t testing.TB, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Client returns the configuration of a client that trusts p alone.
func (p Pair) Client(protos ...string) *tls.Config {
	return &tls.Config{RootCAs: p.Roots, ServerName: "parley.test", NextProtos: protos}
}
