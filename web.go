package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"net/http"
	"path"
	"strings"
	"time"
)

// The JavaScript client, and the demo page that is made with it. Some names
// begin with an underscore, which embed leaves out unless told "all".
//
//go:embed all:web
var webFS embed.FS

// demoPath is where the demo page is; all else that is embedded is under /web/.
const demoPath = "/{$}"

// webFiles returns an endpoint for each embedded file, by route: the client
// always, for pages of other origins too, and the demo with DEMO.
func (s *server) webFiles() map[string]endpoint {
	files := make(map[string]endpoint)
	version := buildVersion().Version
	err := fs.WalkDir(webFS, "web", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		client := isClient(path.Base(name))
		if !client && !s.cfg.demo {
			return nil
		}
		content, err := webFS.ReadFile(name)
		if err != nil {
			return err
		}
		route := "/" + name
		if name == "web/index.html" {
			route = demoPath
		}
		files[route] = webFile(name, content, client, version)
		return nil
	})
	if err != nil { // what is embedded can be read
		panic(err)
	}
	return files
}

// isClient reports whether a file is part of the client, which apps may load
// from here.
func isClient(name string) bool { return strings.HasPrefix(name, "parley.") }

// demoPolicy lets the demo page load its own files, talk to its own server, and
// nothing else. It is the Content-Security-Policy (CSP3) of the page.
const demoPolicy = "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' data: blob:; " +
	"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// webFile serves one file. Browsers keep it, and ask each time whether it is
// still the same, so that a page and its modules are of one version; who names
// the version in the URL (?v=) need not ask for a year.
func webFile(name string, content []byte, client bool, version string) endpoint {
	hash := sha256.Sum256(content)
	header := map[string]string{
		"Cache-Control":          "no-cache",
		"Content-Type":           mediaType(name),
		"ETag":                   `"` + hex.EncodeToString(hash[:16]) + `"`,
		"X-Content-Type-Options": "nosniff",
	}
	if client {
		header["Access-Control-Allow-Origin"] = "*"
		header["Cross-Origin-Resource-Policy"] = "cross-origin"
	}
	if path.Ext(name) == ".html" {
		header["Content-Security-Policy"] = demoPolicy
		header["Referrer-Policy"] = "no-referrer"
	}
	return endpoint{methods: methods{http.MethodGet: func(w http.ResponseWriter, r *http.Request, _ caller) error {
		for name, value := range header {
			w.Header().Set(name, value)
		}
		if version != unversioned && r.URL.Query().Get("v") == version {
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
		return nil
	}}}
}

// mediaType returns the media type of a file that is served.
func mediaType(name string) string {
	return cmp.Or(map[string]string{
		".html": "text/html; charset=utf-8",
		".css":  "text/css; charset=utf-8",
		".js":   "text/javascript; charset=utf-8",
		".mjs":  "text/javascript; charset=utf-8",
		".json": "application/json",
	}[path.Ext(name)], "text/plain; charset=utf-8")
}
