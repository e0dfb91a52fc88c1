package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
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
				if e.status = statuses()[nameOf(field.Value)]; e.status == 0 {
					t.Fatalf("there is no HTTP status %s", nameOf(field.Value))
				}
			case "code":
				if code, known = textOf(field.Value); !known && nameOf(field.Value) != "code" { // that of badRequest
					t.Fatalf("an apiError has a code that is no literal")
				}
			case "closeCode":
				if e.close = closes[nameOf(field.Value)]; e.close == 0 {
					t.Fatalf("there is no close code %s", nameOf(field.Value))
				}
			case "closeReason":
				e.closed = true
			}
		}
		if known {
			add(code, e)
		}
	})
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
		code, ok := textOf(lit.Elts[0])
		if !ok {
			t.Fatal("a frameError has a code that is no literal")
		}
		codes = append(codes, code)
	})
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
	return newParley(cfg, newLogger(cfg, new(lockedBuffer)))
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
