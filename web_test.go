package main

import (
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What is in web/ is what is served, byte for byte, with a type that browsers
// take; and nothing of it is fetched twice.
func TestWebFiles(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		types := map[string]string{".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json"}
		seen := 0
		eachWebFile(t, func(name string, content []byte) {
			seen++
			url := "/" + name
			if name == "web/index.html" {
				url = "/"
			}
			a := ts.call(http.MethodGet, url, "")
			if a.status != http.StatusOK || a.text != string(content) {
				t.Errorf("%s: %d, %d bytes of %d", url, a.status, len(a.text), len(content))
			}
			want := types[filepath.Ext(name)]
			if want == "" {
				want = "text/plain"
			}
			if got := a.header.Get("Content-Type"); !strings.HasPrefix(got, want+";") && got != want {
				t.Errorf("%s is %q, want %s", url, got, want)
			}
			if a.header.Get("X-Content-Type-Options") != "nosniff" || a.header.Get("Cache-Control") != "no-cache" {
				t.Errorf("%s: %v", url, a.header)
			}
			etag := a.header.Get("ETag")
			if a := ts.call(http.MethodGet, url, "", "If-None-Match: "+etag); a.status != http.StatusNotModified || a.text != "" {
				t.Errorf("%s with its ETag %s: %d, %d bytes", url, etag, a.status, len(a.text))
			}
			if a := ts.call(http.MethodGet, url, "", `If-None-Match: "another"`); a.status != http.StatusOK {
				t.Errorf("%s with another ETag: %d", url, a.status)
			}
			if a := ts.call(http.MethodHead, url, ""); a.status != http.StatusOK || a.text != "" || a.header.Get("ETag") != etag {
				t.Errorf("HEAD %s: %d %q", url, a.status, a.text)
			}
			if a := ts.call(http.MethodPost, url, ""); a.status != http.StatusMethodNotAllowed {
				t.Errorf("POST %s: %d", url, a.status)
			}
			if shared := a.header.Get("Access-Control-Allow-Origin") == "*"; shared != strings.HasPrefix(name, "web/parley.") {
				t.Errorf("%s for pages of other origins: %v", url, shared)
			}
		})
		if seen < 10 {
			t.Errorf("only %d files", seen)
		}
		for _, url := range []string{"/web", "/web/", "/web/index.html", "/web/none.js", "/index.html", "/web/../web/parley.js", "/web/vendor/"} {
			if a := ts.call(http.MethodGet, url, ""); a.status != http.StatusNotFound || a.Code != "not_found" {
				t.Errorf("%s: %d %.100s", url, a.status, a.text)
			}
		}
	})
}

// The page takes nothing from anywhere else, and browsers are told so.
func TestDemoPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		policy := ts.call(http.MethodGet, "/", "").header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("%s is missing in %s", want, policy)
			}
		}
		if strings.Contains(policy, "unsafe") || strings.Contains(policy, "http") {
			t.Error(policy)
		}
	})
	elsewhere := regexp.MustCompile(`(?:src|href)\s*=\s*["']?(?:\w+:)?//|(?:from|import)\s*\(?\s*["'](?:\w+:)?//|url\(\s*["']?(?:\w+:)?//|@import`)
	eachWebFile(t, func(name string, content []byte) {
		if filepath.Ext(name) == ".md" {
			return // for people
		}
		if found := elsewhere.FindString(string(content)); found != "" {
			t.Errorf("%s loads something from elsewhere: %s", name, found)
		}
	})
}

// Without DEMO there is no page, and still the client.
func TestDemoOff(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "DEMO=false")
		for url, want := range map[string]int{
			"/": http.StatusNotFound, "/web/demo.js": http.StatusNotFound, "/web/vendor/qrcode.mjs": http.StatusNotFound,
			"/web/parley.js": http.StatusOK, "/web/parley.d.ts": http.StatusOK,
		} {
			if a := ts.call(http.MethodGet, url, ""); a.status != want {
				t.Errorf("%s: %d, want %d", url, a.status, want)
			}
		}
	})
}

// Who names the version of the server may keep the file, and nobody else.
func TestWebFileVersion(t *testing.T) {
	for _, tt := range []struct {
		version, query string
		keep           bool
	}{
		{"v1.2.3", "?v=v1.2.3", true},
		{"v1.2.3", "?v=v1.2.2", false},
		{"v1.2.3", "?v=", false},
		{"v1.2.3", "", false},
		{unversioned, "?v=" + unversioned, false},
	} {
		w := httptest.NewRecorder()
		file := webFile("web/parley.js", []byte("x"), true, tt.version)
		if err := file.methods[http.MethodGet](w, httptest.NewRequest(http.MethodGet, "/web/parley.js"+tt.query, nil), caller{}); err != nil {
			t.Fatal(err)
		}
		if got := w.Header().Get("Cache-Control"); strings.Contains(got, "immutable") != tt.keep || w.Header().Get("ETag") == "" {
			t.Errorf("%s of %s: %s", tt.query, tt.version, got)
		}
	}
}

// eachWebFile calls f for each file in web/ on disk.
func eachWebFile(t *testing.T, f func(name string, content []byte)) {
	t.Helper()
	err := filepath.WalkDir("web", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err == nil {
			f(filepath.ToSlash(name), content)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
