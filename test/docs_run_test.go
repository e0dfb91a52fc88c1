package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
)

// The commands in the documents are run as they are written (TestLongDocs), so
// that what a reader copies works. A fenced block takes part by its info string:
//
//	sh run             is run, and must succeed
//	sh run background  is started; the blocks after it are run once a server answers
//
// The blocks of a document are one session of bash, so variables survive. A server
// goes on until the document ends, or another block is started in its place.

// runnableDocs are those whose blocks are looked at.
func runnableDocs(t *testing.T) []string {
	t.Helper()
	var names []string
	for _, pattern := range []string{"README.md", "CONTRIBUTING.md", "docs/*.md", "web/README.md", "examples/README.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, found...)
	}
	if !slices.Contains(names, "README.md") {
		t.Fatal("there is no README.md")
	}
	return names
}

// A docScript is a document as a script for bash: each line of a block that is run
// is the same line of the script, so that what bash says of a line is about the
// document's.
type docScript struct {
	text                   string
	foreground, background int // blocks
}

// parseDoc makes a script of a document. healthURL answers when a server is up.
func parseDoc(markdown, healthURL string) (s docScript, err error) {
	const prelude = `set -euEo pipefail; ` +
		`trap 'echo "$0: line $LINENO: exit status $?: $BASH_COMMAND" >&2' ERR; ` +
		`server=; ` +
		`up() { curl -fsS --max-time 5 -o /dev/null "$health_url" 2>/dev/null; }; ` +
		// set -m gives a job a process group of its own.
		`stop_server() { [ -n "$server" ] || return 0; kill -TERM -- "-$server" 2>/dev/null || true; ` +
		`for i in $(seq 200); do up || break; sleep 0.1; done; kill -KILL -- "-$server" 2>/dev/null || true; server=; }; ` +
		`await_server() { server=$1; for i in $(seq 3000); do up && return; ` +
		`kill -0 "$server" 2>/dev/null || { echo "the server ended" >&2; return 1; }; sleep 0.1; done; ` +
		`echo "no answer from $health_url" >&2; return 1; }; ` +
		`trap stop_server EXIT; `
	lines := strings.Split(strings.TrimSuffix(markdown, "\n"), "\n")
	script := make([]string, len(lines))
	var fence, kind string // of the block that the line is in
	for i, line := range lines {
		text := strings.TrimLeft(line, " ")
		switch {
		case fence == "" && (strings.HasPrefix(text, "```") || strings.HasPrefix(text, "~~~")):
			fence = text[:len(text)-len(strings.TrimLeft(text, text[:1]))]
			language, words, _ := strings.Cut(strings.TrimSpace(text[len(fence):]), " ")
			switch kind = words; {
			case words == "":
			case language == "sh" && words == "run":
				s.foreground++
			case language == "sh" && words == "run background":
				s.background++
				script[i] = "stop_server; set -m; ("
			case strings.HasPrefix(words, "run") || slices.Contains([]string{"sh", "bash", "shell", "console"}, language):
				return s, fmt.Errorf("line %d: unknown info string %q", i+1, language+" "+words)
			default:
				kind = "" // words for other tests
			}
		case fence != "" && strings.HasPrefix(text, fence) && strings.Trim(text, " "+fence[:1]) == "":
			if kind == "run background" {
				script[i] = ") & set +m; await_server $!"
			}
			fence, kind = "", ""
		case kind != "":
			script[i] = line
		}
	}
	if fence != "" {
		return s, errors.New("the last block has no end")
	}
	script[0] = prelude + "health_url='" + healthURL + "'; " + script[0]
	// A block that exits would leave out those after it.
	s.text = strings.Join(script, "\n") + "\n: >\"$DOC_DONE\"\n"
	return s, nil
}

// runDoc runs the blocks of a document in a folder, and returns what they printed.
func runDoc(ctx context.Context, t *testing.T, name string, doc docScript, dir string, env []string) (output string, err error) {
	t.Helper()
	scratch := t.TempDir()
	script, done := filepath.Join(scratch, filepath.FromSlash(name)), filepath.Join(scratch, "done")
	if err := errors.Join(os.MkdirAll(filepath.Dir(script), 0o755), os.WriteFile(script, []byte(doc.text), 0o644)); err != nil {
		t.Fatal(err)
	}
	run := exec.CommandContext(ctx, "bash", "-c", `source "$1"`, name, script)
	run.Dir = dir
	run.Env = append(slices.Clone(env), "DOC_DONE="+done)
	run.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	run.Cancel = func() error { return syscall.Kill(-run.Process.Pid, syscall.SIGTERM) } // then its trap ends the server
	run.WaitDelay = 30 * time.Second
	out, err := run.CombinedOutput()
	if _, missing := os.Stat(done); err == nil && missing != nil {
		err = fmt.Errorf("%s: it ended before its last block", name)
	}
	return string(out), err
}

func TestDocBlocks(t *testing.T) {
	t.Parallel()
	for _, name := range runnableDocs(t) {
		markdown, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := parseDoc(string(markdown), docHealthURL)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		syntax := exec.CommandContext(t.Context(), "bash", "-n", "/dev/stdin")
		syntax.Stdin = strings.NewReader(doc.text)
		if out, err := syntax.CombinedOutput(); err != nil {
			t.Errorf("%s is not what bash understands: %s", name, bytes.ReplaceAll(out, []byte("/dev/stdin"), []byte(name)))
		}
	}
}

// docHealthURL is where the documents say that a server is.
const docHealthURL = "http://localhost:1234/healthz"

func TestDocRunner(t *testing.T) {
	t.Parallel()
	fences := strings.NewReplacer("'''", "```")
	address := freeAddress(t)
	host, port, _ := net.SplitHostPort(address)
	health, server := "http://"+address, "HOST="+host+" PORT="+port+" "+testkit.BuildBinary(t)
	for _, c := range []struct {
		name, markdown string
		want           string // printed; with fails, beside an error
		fails          bool
	}{
		{"variables survive", "# Title\n'''sh run\na=1\n'''\n'''js\nbroken(\n'''\n~~~ sh run\necho \"a is $a\"\n~~~\n", "a is 1\n", false},
		{"not what is not to be run", "'''sh\nfalse\n'''\n'''console\n$ false\n'''\n", "", false},
		{"words for other tests", "'''json answer 200\n{}\n'''\n", "", false},
		{"in a list", "- so:\n  '''sh run\n  echo in\n  '''\n", "in\n", false},
		{"a document without a block", "text", "", false},
		{"the command that fails", "text\n\n'''sh run\ntrue\nfalse | cat\necho not this\n'''\n", "docs/x.md: line 5: exit status 1: ", true},
		{"an unset variable", "'''sh run\n: $nothing\n'''\n", "line 2: nothing: unbound variable", true},
		{"exit", "'''sh run\nexit 0\n'''\n'''sh run\nfalse\n'''\n", "", true},
		{"a server", "'''sh run background\n" + server + "\n'''\n'''sh run\ncurl -fsS " + health + "/healthz\n'''\n", "listens on", false},
		{"a server in place of another",
			"'''sh run background\n" + server + "\n'''\n'''sh run background\nROOMS=open " + server + "\n'''\n'''sh run\ncurl -fsS -X POST " + health + "/api/rooms\n'''\n", "ownerToken", false},
		{"a server that does not start", "'''sh run background\nPORT=x " + testkit.BuildBinary(t) + "\n'''\n'''sh run\necho not this\n'''\n", "the server ended", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			doc, err := parseDoc(fences.Replace(c.markdown), health+"/healthz")
			if err != nil {
				t.Fatal(err)
			}
			out, err := runDoc(t.Context(), t, "docs/x.md", doc, t.TempDir(), os.Environ())
			if (err != nil) != c.fails || !strings.Contains(out, c.want) || strings.Contains(out, "not this\n") {
				t.Errorf("%v, and printed\n%s\nwant error %v and %q", err, out, c.fails, c.want)
			}
		})
	}

	t.Run("info strings", func(t *testing.T) {
		for _, markdown := range []string{"'''sh runs\n'''", "'''sh run foreground\n'''", "'''js run\n'''", "'''bash run\n'''", "'''console runs\n'''", "'''sh run\nopen"} {
			if _, err := parseDoc(fences.Replace(markdown), health); err == nil {
				t.Errorf("%q is taken", markdown)
			}
		}
	})
}

// freeAddress returns an address where nothing listens, now or soon: where there is
// such a one, on a loopback address that no other test connects from.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.77:0")
	if err != nil {
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestDocLinks looks for what the Markdown files refer to in the repository.
func TestDocLinks(t *testing.T) {
	t.Parallel()
	files := os.DirFS(".")
	err := fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".git") {
			return fs.SkipDir
		}
		if path.Ext(name) != ".md" {
			return nil
		}
		for _, problem := range brokenLinks(files, name) {
			t.Errorf("%s: %s", name, problem)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestDocLinksFound(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a.md": "# A b\n## The `x_y` call: [so](d/b.md)!\n## A b\n[1](#a-b) [2](#a-b-1) [3](#the-x_y-call-so) [4](d/b.md#ä) ![5](d/) [6](https://x.example/y)\n" +
			"```\n[x](nothing)\n```\n`[x](nothing)` <a href=\"d/b.md\">x</a>\n[ref]: d/b.md\n",
		"d/b.md": "Ä\n===\n## Ä\n",
		"c.md":   "[1](nothing) ![2](d/nothing.png) [3](#nothing) [4](a.md#a-b-2) <img src=\"nothing.svg\">\n[ref]: nothing.md\n[5](../../outside.md)\n",
	} {
		file := filepath.Join(dir, filepath.FromSlash(name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if got := brokenLinks(os.DirFS(dir), "a.md"); len(got) != 0 {
		t.Errorf("broken in a.md: %q, want none", got)
	}
	if got := brokenLinks(os.DirFS(dir), "c.md"); len(got) != 7 {
		t.Errorf("broken in c.md: %q, want all 7", got)
	}
}

// brokenLinks returns the relative links of a document whose file, or heading, is missing.
func brokenLinks(files fs.FS, name string) (problems []string) {
	inline := regexp.MustCompile(`\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\s{0,3}\[[^\]]+\]:\s*(\S+)|(?:href|src)="([^"]+)"`)
	for _, line := range prose(files, name) {
		for _, m := range inline.FindAllStringSubmatch(regexp.MustCompile("`[^`]*`").ReplaceAllString(line, ""), -1) {
			link := m[1] + m[2] + m[3]
			target, anchor, hasAnchor := strings.Cut(link, "#")
			if regexp.MustCompile(`^[a-z+]+:|^//`).MatchString(link) {
				continue
			}
			file := name
			if target != "" {
				file = path.Join(path.Dir(name), target)
			}
			if _, err := fs.Stat(files, file); err != nil {
				problems = append(problems, fmt.Sprintf("%s: there is no %s", link, file))
			} else if hasAnchor && path.Ext(file) == ".md" && !slices.Contains(headingAnchors(files, file), anchor) {
				problems = append(problems, fmt.Sprintf("%s: %s has no such heading", link, file))
			}
		}
	}
	return problems
}

// prose returns the lines of a document outside of fenced blocks.
func prose(files fs.FS, name string) (lines []string) {
	text, _ := fs.ReadFile(files, name)
	fence := ""
	for line := range strings.Lines(string(text)) {
		mark := regexp.MustCompile("^ *(```+|~~~+)").FindStringSubmatch(line)
		switch {
		case mark == nil && fence == "":
			lines = append(lines, strings.TrimRight(line, "\r\n"))
		case mark != nil && fence == "":
			fence = mark[1]
		case mark != nil && strings.HasPrefix(mark[1], fence):
			fence = ""
		}
	}
	return lines
}

// headingAnchors returns the names that GitHub gives the headings of a document: in lower
// case, without punctuation, with hyphens for spaces; a repeated one is numbered.
func headingAnchors(files fs.FS, name string) (names []string) {
	heading := regexp.MustCompile(`^ {0,3}#{1,6}\s+(.*?)\s*#*$`)
	explicit := regexp.MustCompile(`<a (?:id|name)="([^"]+)"`)
	seen := make(map[string]int)
	add := func(text string) {
		text = regexp.MustCompile(`!?\[([^\]]*)\]\([^)]*\)`).ReplaceAllString(text, "$1")
		slug := strings.Map(func(r rune) rune {
			switch {
			case unicode.IsLetter(r) || unicode.IsNumber(r) || r == '-' || r == '_' || unicode.IsMark(r):
				return unicode.ToLower(r)
			case r == ' ':
				return '-'
			}
			return -1
		}, text)
		seen[slug]++
		if n := seen[slug]; n > 1 {
			slug = fmt.Sprintf("%s-%d", slug, n-1)
		}
		names = append(names, slug)
	}
	lines := prose(files, name)
	for i, line := range lines {
		if m := heading.FindStringSubmatch(line); m != nil {
			add(m[1])
		} else if regexp.MustCompile(`^(=+|-+)\s*$`).MatchString(line) && i > 0 && strings.TrimSpace(lines[i-1]) != "" {
			add(lines[i-1])
		}
		for _, m := range explicit.FindAllStringSubmatch(line, -1) {
			names = append(names, m[1])
		}
	}
	return names
}
