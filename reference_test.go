package main

import (
	"flag"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var updateDocs = flag.Bool("update", false, "rewrite the reference's table of options and the README's figures")

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

// The README's figures are lines of the table in docs/performance.md:
// `go test -run TestReadmeFigures -update .` takes them from there.
func TestReadmeFigures(t *testing.T) {
	figures := docPart(t, readme, "figures")
	updated := figures
	head, rows, _ := strings.Cut(strings.TrimSpace(figures), "\n")
	_, table, found := strings.Cut(readDoc(t, "docs/performance.md"), head+"\n")
	if !found {
		t.Fatalf("docs/performance.md has no table with the head %s", head)
	}
	table, _, _ = strings.Cut(table, "\n\n")
	measured := make(map[string]string) // by what stands in front
	for line := range strings.Lines(table) {
		label, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		measured[label] = strings.TrimSpace(line)
	}
	for line := range strings.Lines(rows) {
		line = strings.TrimSpace(line)
		label, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		if want := measured[label]; want == "" {
			t.Errorf("docs/performance.md has no figures for%s", label)
		} else if want != line && *updateDocs {
			updated = strings.Replace(updated, line, want, 1)
		} else if want != line {
			t.Errorf("the README has\n\t%s\nand docs/performance.md\n\t%s\nrun this test with -update to take them over", line, want)
		}
	}
	if updated != figures {
		text := strings.Replace(readDoc(t, readme), figures, updated, 1)
		if err := os.WriteFile(readme, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
