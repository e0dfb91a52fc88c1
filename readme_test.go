package main

import (
	"flag"
	"os"
	"strings"
	"testing"
)

var updateReadme = flag.Bool("update", false, "rewrite the README's table of options")

// The README's table of options is the code's: `go test -run TestReadme -update .`
// makes it so.
func TestReadmeConfigTable(t *testing.T) {
	const file, begin, end = "README.md", "<!-- config table: begin -->\n", "<!-- config table: end -->"
	readme, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, hasBegin := strings.Cut(string(readme), begin)
	table, after, hasEnd := strings.Cut(rest, end)
	if !hasBegin || !hasEnd {
		t.Fatalf("%s has no lines %q and %q", file, strings.TrimSpace(begin), end)
	}
	want := configTable()
	if strings.TrimSpace(table) == strings.TrimSpace(want) {
		return
	}
	if *updateReadme {
		if err := os.WriteFile(file, []byte(before+begin+"\n"+want+"\n"+end+after), 0o644); err != nil {
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
			t.Fatalf("row %d of the table in %s is\n\t%s\nwant\n\t%s\nrun this test with -update to rewrite the table", i+1, file, row(gotRows), row(wantRows))
		}
	}
}
