package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/coder/websocket"
)

// What the documents list is the code's: the tests here read both, and neither
// may have what the other lacks.

// --- Reading the code.

// sources returns the syntax trees of the package's files, without tests.
var sources = sync.OnceValues(func() (files []*ast.File, err error) {
	names, err := filepath.Glob("*.go")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
})

// inspect calls f with every node of type N in the package's files.
func inspect[N ast.Node](t testing.TB, f func(N)) {
	t.Helper()
	files, err := sources()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			if n, ok := n.(N); ok {
				f(n)
			}
			return true
		})
	}
}

// nameOf returns the last part of an identifier, such as GET of http.GET, or "".
func nameOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

// textOf returns a string literal's value; ok is false for anything else.
func textOf(e ast.Expr) (text string, ok bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	text, err := strconv.Unquote(lit.Value)
	return text, err == nil
}

// statuses are the HTTP statuses by the names of net/http's constants.
var statuses = sync.OnceValue(func() map[string]int {
	byName := make(map[string]int)
	for status := 100; status < 600; status++ {
		byName["Status"+strings.NewReplacer(" ", "", "-", "").Replace(http.StatusText(status))] = status
	}
	return byName
})

// codeCloseCodes returns the close codes by the names of their constants.
func codeCloseCodes(t testing.TB) map[string]int {
	t.Helper()
	codes := make(map[string]int)
	inspect(t, func(spec *ast.ValueSpec) {
		if nameOf(spec.Type) != "closeCode" {
			return
		}
		for i, value := range spec.Values {
			n, err := strconv.Atoi(value.(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			codes[spec.Names[i].Name] = n
		}
	})
	return codes
}

// An apiErrorCode is what the code says of one code of an apiError.
type apiErrorCode struct {
	status, close int  // close is 0 for none
	closed        bool // everyone is told by a close frame
}

// codeErrors returns the codes of all apiErrors in the code.
func codeErrors(t testing.TB) map[string]apiErrorCode {
	t.Helper()
	codes, closes := make(map[string]apiErrorCode), codeCloseCodes(t)
	add := func(code string, e apiErrorCode) {
		if known, ok := codes[code]; ok { // used in several places
			if known.status != e.status {
				t.Errorf("the code answers %s with %d and with %d", code, known.status, e.status)
			}
			e.close, e.closed = max(e.close, known.close), e.closed || known.closed
		}
		codes[code] = e
	}
	inspect(t, func(lit *ast.CompositeLit) {
		if nameOf(lit.Type) != "apiError" {
			return
		}
		var e apiErrorCode
		code, known := "", false
		for _, elt := range lit.Elts {
			switch field := elt.(*ast.KeyValueExpr); nameOf(field.Key) {
			case "status":
				e.status = statuses()[nameOf(field.Value)]
			case "code":
				code, known = textOf(field.Value)
			case "closeCode":
				e.close = closes[nameOf(field.Value)]
			case "closeReason":
				e.closed = true
			}
		}
		if known && e.status == 0 {
			t.Fatalf("the status of %s is none of net/http's", code)
		} else if known { // not where it is a variable: of badRequest, and of errorMeanings
			add(code, e)
		}
	})
	add(codeUnavailable, apiErrorCode{status: http.StatusServiceUnavailable, close: int(closeCapacity)})
	for _, m := range errorMeanings {
		if m.status != 0 {
			add(m.code, apiErrorCode{status: m.status, close: int(m.close), closed: m.reason != ""})
		}
	}
	inspect(t, func(call *ast.CallExpr) {
		if nameOf(call.Fun) == "badRequest" {
			code, ok := textOf(call.Args[0])
			if !ok {
				t.Fatal("badRequest is called with a code that is no literal")
			}
			add(code, apiErrorCode{status: http.StatusBadRequest})
		}
	})
	return codes
}

// codeFrameErrors returns the codes of all error frames.
func codeFrameErrors(t testing.TB) (codes []string) {
	t.Helper()
	inspect(t, func(lit *ast.CompositeLit) {
		if nameOf(lit.Type) != "frameError" {
			return
		}
		if code, ok := textOf(lit.Elts[0]); ok { // not that of errorMeanings
			codes = append(codes, code)
		}
	})
	codes = append(codes, codeUnavailable)
	for _, m := range errorMeanings {
		if m.frame != "" {
			codes = append(codes, m.frame)
		}
	}
	return codes
}

// clientTypes returns the types of frames that the client of a pair, or of a
// room, may send.
func clientTypes(room bool) (types []string) {
	for ft := range numFrameTypes {
		if room && ft.ofRoom() || !room && ft.ofPair() {
			types = append(types, ft.String())
		}
	}
	return types
}

// serverTypes returns the types of frames that a server sends: what it relays,
// what no client may send, and what its code answers with.
func serverTypes(t testing.TB) (types []string) {
	t.Helper()
	var answers []string
	inspect(t, func(call *ast.CallExpr) {
		switch nameOf(call.Fun) {
		case "answer", "appendFrame", "tell":
			for _, arg := range call.Args {
				answers = append(answers, nameOf(arg))
			}
		}
	})
	names := frameTypeNames(t)
	for ft := typeUnknown + 1; ft < numFrameTypes; ft++ {
		if ft.relayed() || !ft.ofPair() && !ft.ofRoom() || slices.Contains(answers, names[ft]) {
			types = append(types, ft.String())
		}
	}
	return types
}

// frameTypeNames returns the names of the constants of frameType.
func frameTypeNames(t testing.TB) (names []string) {
	t.Helper()
	inspect(t, func(decl *ast.GenDecl) {
		if decl.Tok != token.CONST || nameOf(decl.Specs[0].(*ast.ValueSpec).Type) != "frameType" {
			return
		}
		for _, spec := range decl.Specs {
			names = append(names, spec.(*ast.ValueSpec).Names[0].Name)
		}
	})
	if len(names) != int(numFrameTypes)+1 {
		t.Fatalf("%d constants of frameType were found", len(names))
	}
	return names
}

// codeRoutes returns the server's routes, as in "GET /healthz", with {} for a
// parameter.
func codeRoutes(t testing.TB) (routes []string) {
	t.Helper()
	ts := newServerOnly(t)
	inspect(t, func(fn *ast.FuncDecl) {
		if fn.Name.Name != "handler" || nameOf(fn.Recv.List[0].Type.(*ast.StarExpr).X) != "server" {
			return
		}
		ast.Inspect(fn.Body, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || nameOf(call.Fun) != "route" && nameOf(call.Fun) != "Handle" {
				return true
			}
			path, ok := textOf(call.Args[0])
			switch name := nameOf(call.Args[0]); {
			case ok:
			case name == "metricsRoute":
				routes = append(routes, "GET "+ts.cfg.metricsRoute)
				return true
			case name == "pattern": // of route itself, and of the embedded files
				return true
			default:
				t.Fatalf("a route is registered under %q, which this test cannot read", name)
			}
			ast.Inspect(call.Args[1], func(n ast.Node) bool {
				if field, ok := n.(*ast.KeyValueExpr); ok {
					if method, ok := strings.CutPrefix(nameOf(field.Key), "Method"); ok {
						routes = append(routes, strings.ToUpper(method)+" "+withoutNames(path))
					}
				}
				return true
			})
			return true
		})
	})
	for pattern := range ts.webFiles() {
		if pattern == demoPath {
			routes = append(routes, "GET /")
		} else if isClient(filepath.Base(pattern)) {
			routes = append(routes, "GET "+pattern)
		} // the rest is what the demo page is made of
	}
	if len(routes) < 10 {
		t.Fatalf("only %q were found", routes)
	}
	return routes
}

// newServerOnly returns a server that does not run, with the demo page.
func newServerOnly(t testing.TB) *server {
	t.Helper()
	cfg, err := loadConfig(nil, lookupIn([]string{"DEMO=true", "ROOMS=open"}))
	if err != nil {
		t.Fatal(err)
	}
	return newParley(cfg, newLogger(cfg.logFormat, cfg.logLevel, new(lockedBuffer)))
}

var pathParameter = regexp.MustCompile(`\{[^}]*\}`)

// withoutNames replaces the parameters of a path by {}.
func withoutNames(path string) string { return pathParameter.ReplaceAllString(path, "{}") }

// --- Reading the documents.

func readDoc(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// docPart returns what stands in a document between the comments "name: begin"
// and "name: end".
func docPart(t testing.TB, file, name string) string {
	t.Helper()
	_, rest, hasBegin := strings.Cut(readDoc(t, file), "<!-- "+name+": begin -->")
	part, _, hasEnd := strings.Cut(rest, "<!-- "+name+": end -->")
	if !hasBegin || !hasEnd {
		t.Fatalf("%s has no comments \"%s: begin\" and \"%[2]s: end\"", file, name)
	}
	return part
}

// docTable returns the cells of the table in such a part, without its head.
func docTable(t testing.TB, file, name string) (rows [][]string) {
	t.Helper()
	table := docPart(t, file, name)
	for line := range strings.Lines(strings.TrimSpace(table)) {
		line = strings.ReplaceAll(strings.TrimSpace(line), `\|`, "\x00")
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i, cell := range cells {
			cells[i] = strings.ReplaceAll(strings.TrimSpace(cell), "\x00", "|")
		}
		rows = append(rows, cells)
	}
	if len(rows) < 3 {
		t.Fatalf("%s: the table %q has no rows", file, name)
	}
	return rows[2:]
}

var quoted = regexp.MustCompile("`([^`]+)`")

// wordsOf returns what is between backticks.
func wordsOf(cell string) (words []string) {
	for _, m := range quoted.FindAllStringSubmatch(cell, -1) {
		words = append(words, m[1])
	}
	return words
}

// A docBlock is a fenced block of a document.
type docBlock struct {
	at   string // file and line
	info string // what stands behind the opening fence
	text string
}

// docBlocks returns the fenced blocks whose info string begins with prefix.
func docBlocks(t testing.TB, file, prefix string) (blocks []docBlock) {
	t.Helper()
	open := false
	var block docBlock
	for i, line := range strings.Split(readDoc(t, file), "\n") {
		fence, isFence := strings.CutPrefix(line, "```")
		switch {
		case isFence && !open:
			open, block = true, docBlock{at: fmt.Sprintf("%s:%d", file, i+1), info: fence}
		case isFence:
			if open = false; strings.HasPrefix(block.info, prefix) {
				blocks = append(blocks, block)
			}
		case open:
			block.text += line + "\n"
		}
	}
	return blocks
}

// wantSame fails unless a document lists what the code has, in any order.
func wantSame(t testing.TB, what string, doc, code []string) {
	t.Helper()
	for _, d := range doc {
		if !slices.Contains(code, d) {
			t.Errorf("%s: %q is in the document and not in the code", what, d)
		}
	}
	for _, c := range code {
		if !slices.Contains(doc, c) {
			t.Errorf("%s: %q is in the code and not in the document", what, c)
		}
	}
	for i, d := range doc {
		if slices.Contains(doc[:i], d) {
			t.Errorf("%s: %q is in the document twice", what, d)
		}
	}
}

// --- The tables of docs/protocol.md.

const protocolDoc = "docs/protocol.md"

func TestProtocolDocErrorCodes(t *testing.T) {
	rows := make(map[string][]string)
	var documented, inCode []string
	for _, row := range docTable(t, protocolDoc, "error codes") {
		word := wordsOf(row[0])[0]
		documented, rows[word] = append(documented, word), row
	}
	for word, e := range codeErrors(t) {
		inCode = append(inCode, word)
		row := rows[word]
		if row == nil {
			continue
		}
		if row[1] != strconv.Itoa(e.status) && (row[1] != "–" || e.close == 0) {
			t.Errorf("%s: HTTP is %s in the document, %d in the code", word, row[1], e.status)
		}
		if want := numberOr(e.close, "–"); row[2] != want {
			t.Errorf("%s: close is %s in the document, %s in the code", word, row[2], want)
		}
		if e.closed && row[1] != "–" {
			t.Errorf("%s is never an HTTP answer", word)
		}
	}
	wantSame(t, "error codes", documented, inCode)
}

// numberOr returns n as text, or, where it is 0, otherwise.
func numberOr(n int, otherwise string) string {
	if n == 0 {
		return otherwise
	}
	return strconv.Itoa(n)
}

func TestProtocolDocFrameErrors(t *testing.T) {
	var documented []string
	for _, row := range docTable(t, protocolDoc, "frame errors") {
		documented = append(documented, wordsOf(row[0])...)
	}
	wantSame(t, "codes of error frames", documented, slices.Compact(slices.Sorted(slices.Values(codeFrameErrors(t)))))
}

func TestProtocolDocCloseCodes(t *testing.T) {
	var documented, inCode []string
	reasons := make(map[string]string) // by close code
	for _, row := range docTable(t, protocolDoc, "close codes") {
		documented = append(documented, row[0])
		reasons[row[0]] = row[1]
	}
	for _, code := range codeCloseCodes(t) {
		inCode = append(inCode, strconv.Itoa(code))
	}
	wantSame(t, "close codes", documented, inCode)
	for word, e := range codeErrors(t) {
		if e.close != 0 && word != "seat_busy" && !slices.Contains(wordsOf(reasons[strconv.Itoa(e.close)]), word) {
			t.Errorf("%q is a reason of %d that the document does not have", word, e.close)
		}
	}
}

// The reasons of close codes are texts of the code, and those that the code gives
// as literals are in the document.
func TestProtocolDocCloseReasons(t *testing.T) {
	literals := make(map[string]bool)
	inspect(t, func(lit *ast.BasicLit) {
		if text, ok := textOf(lit); ok {
			literals[text] = true
		}
	})
	var documented []string
	for _, row := range docTable(t, protocolDoc, "close codes") {
		documented = append(documented, wordsOf(row[1])...)
	}
	for _, reason := range documented {
		if side := regexp.MustCompile(`^side [AB] `); !literals[side.ReplaceAllString(reason, "side SIDE ")] {
			t.Errorf("%q is a reason in the document and no text in the code", reason)
		}
	}
	given := func(e ast.Expr) {
		if reason, ok := textOf(e); ok && !slices.Contains(documented, reason) {
			t.Errorf("%q is a reason in the code and not in the document", reason)
		}
	}
	inspect(t, func(lit *ast.CompositeLit) {
		for _, elt := range lit.Elts {
			if field, ok := elt.(*ast.KeyValueExpr); ok && nameOf(lit.Type) == "ending" && nameOf(field.Key) == "reason" {
				given(field.Value)
			}
		}
	})
	inspect(t, func(call *ast.CallExpr) {
		if nameOf(call.Fun) == "close" && len(call.Args) == 2 {
			given(call.Args[1])
		}
	})
}

// --- Variables.

// Every variable that a document names is one of the server's.
func TestDocsVariables(t *testing.T) {
	known := map[string]bool{"SSL_CERT_FILE": true, "NAME_FILE": true} // of Go's crypto/x509; any secret's
	for _, row := range configRows(t) {
		for _, name := range wordsOf(row[0]) {
			known[name] = true
		}
	}
	variable := regexp.MustCompile("`(?:-e )?([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)\\b[^`]*`")
	for _, file := range documents(t) {
		for _, m := range variable.FindAllStringSubmatch(readDoc(t, file), -1) {
			if !known[m[1]] {
				t.Errorf("%s names %s, which is no variable", file, m[1])
			}
		}
	}
}

// The defaults in docs/migrating.md are those of the code.
func TestMigratingVariables(t *testing.T) {
	defaults := make(map[string]string)
	for _, row := range configRows(t) {
		for _, name := range wordsOf(row[0]) {
			defaults[name] = row[1]
		}
	}
	for _, table := range []string{"pair variables", "room variables"} {
		for _, row := range docTable(t, "docs/migrating.md", table) {
			name := wordsOf(row[0])[0]
			if want, ok := defaults[name]; !ok || row[1] != want {
				t.Errorf("the default of %s is %q in the document, %q in the code", name, row[1], want)
			}
		}
	}
}

// configRows returns the rows of the table of options.
func configRows(t testing.TB) [][]string { t.Helper(); return docTable(t, reference, "config table") }

// documents returns the Markdown files of the repository that speak of the
// server.
func documents(t testing.TB) (files []string) {
	t.Helper()
	for _, pattern := range []string{"*.md", "docs/*.md", "deploy/*.md", "examples/*.md", "web/*.md"} {
		matches, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, matches...)
	}
	return files
}

// docFrames returns the example frames of docs/protocol.md in blocks such as
// "json client pair", one a line.
func docFrames(t testing.TB, info string) (frames []string) {
	t.Helper()
	for _, b := range docBlocks(t, protocolDoc, "json "+info) {
		for line := range strings.Lines(b.text) {
			frames = append(frames, strings.TrimSpace(line))
		}
	}
	if len(frames) == 0 {
		t.Fatalf("%s has no frames in blocks %q", protocolDoc, info)
	}
	return frames
}

// typeOf returns the type of a frame, in which types occur once.
func typeOf(t testing.TB, text string) string {
	t.Helper()
	var f struct{ Type string }
	if err := json.Unmarshal([]byte(text), &f); err != nil || f.Type == "" {
		t.Fatalf("%s: type %q, %v", text, f.Type, err)
	}
	return f.Type
}

// shapeOf returns what fields a frame has, and of what kind, down to what is
// the clients' own. Of a list it is the shapes of its members, each once.
func shapeOf(t testing.TB, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return shapeOfValue(v)
}

func shapeOfValue(v any) string {
	switch v := v.(type) {
	case map[string]any:
		var fields []string
		for _, name := range slices.Sorted(maps.Keys(v)) {
			shape := "any"
			if name != "payload" && name != "t" {
				shape = shapeOfValue(v[name])
			}
			fields = append(fields, name+":"+shape)
		}
		return "{" + strings.Join(fields, " ") + "}"
	case []any:
		var members []string
		for _, member := range v {
			members = append(members, shapeOfValue(member))
		}
		return "[" + strings.Join(slices.Compact(slices.Sorted(slices.Values(members))), " ") + "]"
	case nil:
		return "null"
	default:
		return fmt.Sprintf("%T", v)
	}
}

// The server's frames in docs/protocol.md are such as a server sends, and no type
// and no field of those is missing there.
func TestProtocolDocServerFrames(t *testing.T) {
	for _, kind := range []string{"pair", "room"} {
		t.Run(kind, func(t *testing.T) {
			var seen []string
			synctest.Test(t, func(t *testing.T) {
				for _, settings := range [][]string{
					{"ROOMS=open"},
					{"ROOMS=open", "STUN_URLS=stun:stun.example", "TURN_URLS=turn:turn.example", "TURN_SECRET=secret"},
				} {
					ts := newSettledServer(t, settings...)
					if kind == "pair" {
						seen = append(seen, ts.pairFrames()...)
					} else {
						seen = append(seen, ts.roomFrames()...)
					}
				}
			})
			compareFrames(t, docFrames(t, "server "+kind), seen, kind == "room")
		})
	}
	types := []string{}
	for _, text := range slices.Concat(docFrames(t, "server pair"), docFrames(t, "server room"), docFrames(t, "client pair")) {
		if typ := typeOf(t, text); slices.Contains(serverTypes(t), typ) && !slices.Contains(types, typ) {
			types = append(types, typ)
		}
	}
	wantSame(t, "types of the server's frames", types, serverTypes(t))
}

// compareFrames compares the frames of a document with those that were seen.
func compareFrames(t *testing.T, documented, seen []string, room bool) {
	t.Helper()
	shapes, sentences, fields := map[string]bool{}, map[string]bool{}, map[string]bool{}
	eachField := func(text string, f func(field string)) {
		var members map[string]any
		if err := json.Unmarshal([]byte(text), &members); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		for name, value := range members {
			f(typeOf(t, text) + "." + name)
			if name == "error" {
				sentences[fmt.Sprint(members["code"], value)] = true
			}
		}
	}
	for _, text := range documented {
		eachField(text, func(field string) { fields[field] = true })
	}
	clear(sentences)
	for _, text := range seen {
		if !room && slices.Contains(clientTypes(false), typeOf(t, text)) && typeOf(t, text) != "ice_servers" {
			continue // a client's own, relayed
		}
		shapes[shapeOf(t, text)] = true
		eachField(text, func(field string) {
			if !fields[field] {
				t.Errorf("the document has no example of %s, as in %s", field, text)
				fields[field] = true
			}
		})
	}
	for _, text := range documented {
		if !shapes[shapeOf(t, text)] {
			t.Errorf("the server sends nothing like %s", text)
		}
		var e struct{ Type, Code, Error string }
		if json.Unmarshal([]byte(text), &e); e.Type == "error" && !sentences[e.Code+e.Error] {
			t.Errorf("the server does not say %s: %s", e.Code, e.Error)
		}
	}
}

// pairFrames drives a pair through all that can happen to it, and returns what
// both were sent.
func (ts *testServer) pairFrames() (seen []string) {
	code, appID := ts.mint()
	gather := func(clients ...*wsClient) {
		for _, c := range clients {
			seen = append(seen, c.settled()...)
		}
	}
	a := ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a)
	b := ts.join(wsDial{appID: appID, side: "B", sid: "b", v1: true})
	gather(a, b)
	for range 2 { // the second contests it
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
	}
	for _, text := range []string{`{"type":"offer","sdp":""}`, `{"type":"answer","sdp":""}`, `{"type":"ice"}`, `{"type":"sender_ready"}`, `{"type":"bye"}`} {
		a.send(text)
	}
	for _, text := range []string{`{"type":"ping"}`, `{"type":"ping","t":1}`, `{"type":"ice_servers"}`, `{"type":"send","payload":1,"id":1}`, `[]`, `{"type":"chat"}`} {
		a.send(text)
	}
	gather(a, b)
	b.drop() // comes back, first as another version, then as it was
	gather(a)
	b = ts.join(wsDial{appID: appID, side: "B", sid: "b"})
	gather(a, b)
	b.leave(websocket.StatusNormalClosure)
	gather(a)
	b = ts.join(wsDial{appID: appID, side: "B", sid: "b", v1: true})
	b.drop()
	for id := 2; id <= mailItems+2; id++ {
		a.sendf(`{"type":"send","payload":1,"id":%d}`, id)
	}
	gather(a)
	a.drop()
	a = ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a)
	b = ts.join(wsDial{appID: appID, side: "B", sid: "b", v1: true})
	a.drop()
	a = ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a, b)
	ts.useUpRelay()
	a.send(`{"type":"ice_servers"}`)
	gather(a)
	b.drop()
	a.drop()
	a = ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a)
	return seen
}

// roomFrames does the same in a room.
func (ts *testServer) roomFrames() (seen []string) {
	room := ts.openRoom(`{}`)
	gather := func(clients ...*wsClient) {
		for _, c := range clients {
			seen = append(seen, c.settled()...)
		}
	}
	host := ts.join(wsDial{room: room.Code, name: "Ada"})
	gather(host)
	guest := ts.join(wsDial{room: room.Code, name: "Bob"})
	gather(host, guest)
	for _, typ := range []string{"offer", "answer"} {
		guest.sendf(`{"type":%q,"to":%q,"payload":1}`, typ, ts.hostOf(room))
	}
	for _, text := range []string{`{"type":"candidate","payload":1}`, `{"type":"ping","t":1}`, `{"type":"offer","to":"nobody","payload":1}`} {
		guest.send(text)
	}
	guest.send(`{"type":"ice_servers"}`)
	gather(guest)
	ts.useUpRelay()
	guest.send(`{"type":"ice_servers"}`)
	gather(host, guest)
	third := ts.join(wsDial{room: room.Code, name: "Cid"})
	gather(host, third)
	host.leave(websocket.StatusNormalClosure)
	gather(guest)
	return seen
}

// hostOf returns the host's ID, by looking through the eyes of a newcomer that
// leaves again.
func (ts *testServer) hostOf(room testRoom) string {
	ts.t.Helper()
	c := ts.join(wsDial{room: room.Code, name: "Eve"})
	defer c.leave(websocket.StatusNormalClosure)
	var join struct{ Host string }
	if err := json.Unmarshal([]byte(c.settled()[0]), &join); err != nil {
		ts.t.Fatal(err)
	}
	return join.Host
}

var (
	seqField = regexp.MustCompile(`"(deliveredUpTo|upTo|seq)":\d+`)
	toPeer   = regexp.MustCompile(`"to":"[0-9a-f-]{36}"`)
)

// The clients' frames in docs/protocol.md are accepted by a server, have no field
// that it ignores, and are of every type.
func TestProtocolDocClientFrames(t *testing.T) {
	decoder := newFrameDecoderPool().Get().(*frameDecoder)
	check := func(t *testing.T, room bool, frames []string) {
		var types []string
		for _, text := range frames {
			m, err := decoder.decode([]byte(text))
			if err != nil {
				t.Errorf("%s: %v", text, err)
			}
			if types = append(types, m.typ.String()); m.typ.relayed() && !room {
				continue
			}
			var fields map[string]any
			json.Unmarshal([]byte(text), &fields)
			for name := range fields {
				if m.raw.member([]byte(name)) == nil {
					t.Errorf("%s: the server ignores %q", text, name)
				}
			}
		}
		wantSame(t, "types of clients' frames", slices.Compact(slices.Sorted(slices.Values(types))), clientTypes(room))
	}
	accepted := func(t *testing.T, c *wsClient, text string) {
		t.Helper()
		c.send(text)
		for _, got := range c.settled() {
			if typeOf(t, got) == "error" {
				t.Errorf("%s: %s", text, got)
			}
		}
	}
	t.Run("pair", func(t *testing.T) {
		frames := docFrames(t, "client pair")
		check(t, false, frames)
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t)
			a, b := ts.pair()
			b.send(`{"type":"send","payload":1}`)
			var mail struct{ Seq uint64 }
			if err := json.Unmarshal([]byte(a.settled()[0]), &mail); err != nil || mail.Seq == 0 {
				t.Fatal(mail, err)
			}
			for _, text := range frames {
				accepted(t, a, seqField.ReplaceAllString(text, fmt.Sprintf(`"$1":%d`, mail.Seq)))
			}
		})
	})
	t.Run("room", func(t *testing.T) {
		frames := docFrames(t, "client room")
		check(t, true, frames)
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t, "ROOMS=open")
			room := ts.openRoom(`{}`)
			ts.join(wsDial{room: room.Code})
			guest := ts.join(wsDial{room: room.Code})
			host := ts.hostOf(room)
			guest.settled()
			for _, text := range frames {
				accepted(t, guest, toPeer.ReplaceAllString(text, `"to":"`+host+`"`))
			}
		})
	})
}

var updateDocs = flag.Bool("update", false, "rewrite the reference's table of options")

const (
	readme    = "README.md"
	reference = "docs/reference.md"
)

// The reference's table of options is the code's: `go test -run TestReference
// -update .` makes it so.
func TestReferenceConfigTable(t *testing.T) {
	const begin, end = "<!-- config table: begin -->\n", "<!-- config table: end -->"
	text, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, hasBegin := strings.Cut(string(text), begin)
	table, after, hasEnd := strings.Cut(rest, end)
	if !hasBegin || !hasEnd {
		t.Fatalf("%s has no lines %q and %q", reference, strings.TrimSpace(begin), end)
	}
	want := configTable()
	if strings.TrimSpace(table) == strings.TrimSpace(want) {
		return
	}
	if *updateDocs {
		if err := os.WriteFile(reference, []byte(before+begin+"\n"+want+"\n"+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	wantRows, gotRows := strings.Split(strings.TrimSpace(want), "\n"), strings.Split(strings.TrimSpace(table), "\n")
	for i := range max(len(wantRows), len(gotRows)) {
		row := func(rows []string) string {
			if i < len(rows) {
				return rows[i]
			}
			return "(nothing)"
		}
		if row(gotRows) != row(wantRows) {
			t.Fatalf("row %d of the table in %s is\n\t%s\nwant\n\t%s\nrun this test with -update to rewrite the table", i+1, reference, row(gotRows), row(wantRows))
		}
	}
}

func TestReferenceEndpoints(t *testing.T) {
	var documented []string
	for _, row := range docTable(t, reference, "endpoints") {
		for _, call := range wordsOf(row[0]) {
			call, _, _ = strings.Cut(call, "?")
			documented = append(documented, withoutNames(call))
		}
	}
	wantSame(t, "endpoints", documented, codeRoutes(t))
}

// A code stands in the row of its status, or, when it is told by close frames
// alone, in the last.
func TestReferenceErrorCodes(t *testing.T) {
	inCode := codeErrors(t)
	var documented []string
	for _, row := range docTable(t, reference, "error codes") {
		for _, code := range wordsOf(row[1]) {
			documented = append(documented, code)
			e := inCode[code]
			if byClose := !strings.Contains(row[0], strconv.Itoa(e.status)); byClose && (e.close == 0 || strings.ContainsAny(row[0], "0123456789")) {
				t.Errorf("%s stands beside %s, and has the status %d", code, row[0], e.status)
			}
		}
	}
	wantSame(t, "error codes", documented, slices.Collect(maps.Keys(inCode)))
}

func TestReferenceFrames(t *testing.T) {
	for _, room := range []bool{false, true} {
		var documented []string
		for _, row := range docTable(t, reference, "client frames") {
			if where := map[bool]string{false: "pair", true: "room"}[room]; strings.Contains(row[1], where) {
				documented = append(documented, wordsOf(row[0])...)
			}
		}
		wantSame(t, "types of clients' frames", documented, clientTypes(room))
	}
	var documented []string
	for _, row := range docTable(t, reference, "server frames") {
		documented = append(documented, wordsOf(row[0])...)
	}
	wantSame(t, "types of the server's frames", documented, serverTypes(t))
}

func TestReferenceFrameErrors(t *testing.T) {
	documented := wordsOf(docPart(t, reference, "frame errors"))
	wantSame(t, "codes of error frames", documented, slices.Compact(slices.Sorted(slices.Values(codeFrameErrors(t)))))
}

func TestReferenceCloseCodes(t *testing.T) {
	var documented, inCode []string
	for _, row := range docTable(t, reference, "close codes") {
		documented = append(documented, strings.Split(row[0], ", ")...)
	}
	for _, code := range codeCloseCodes(t) {
		inCode = append(inCode, strconv.Itoa(code))
	}
	wantSame(t, "close codes", documented, inCode)
}

// The README's figures are those of docs/performance.md, which has more of them.
func TestReadmeFigures(t *testing.T) {
	measured := make(map[string]map[string]string) // by what stands in front, and by server
	for _, row := range figuresIn(readDoc(t, "docs/performance.md")) {
		measured[row[""]] = row
	}
	rows := figuresIn(docPart(t, readme, "figures"))
	if len(rows) == 0 {
		t.Error("the README has no figures")
	}
	for _, row := range rows {
		for server, got := range row {
			if want := measured[row[""]][server]; got != want {
				t.Errorf("%s of %s is %s in the README, and %q in docs/performance.md", row[""], server, got, want)
			}
		}
	}
}

// figuresIn returns the rows of the first table of a text that compares servers, by
// the heads of their columns, without the ratios.
func figuresIn(text string) (rows []map[string]string) {
	cells := func(line string) []string {
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		return cells
	}
	var heads []string
	for line := range strings.Lines(text) {
		switch line = strings.TrimSpace(line); {
		case heads == nil && strings.HasPrefix(line, "| | ") && strings.Contains(line, "peerjs"):
			heads = cells(line)
		case heads != nil && !strings.HasPrefix(line, "|"):
			return rows
		case heads != nil && !strings.HasPrefix(line, "| ---"):
			row := make(map[string]string)
			for i, cell := range cells(line) {
				if heads[i] != "×" {
					row[heads[i]] = cell
				}
			}
			rows = append(rows, row)
		}
	}
	return rows
}
