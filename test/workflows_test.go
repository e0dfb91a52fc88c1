package test

import (
	"cmp"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// A workflow is a file of .github/workflows, as far as it is looked at.
type workflow struct {
	Permissions permissions
	Jobs        map[string]struct {
		Permissions permissions
		Timeout     int `yaml:"timeout-minutes"`
		Uses        string
		Steps       []struct {
			Uses string
			With map[string]string
			Run  string
		}
	}
}

type permissions map[string]string

// Workflows cannot be run here; what can be wrong in them unnoticed is looked for.
func TestWorkflows(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob(".github/workflows/*.yml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no workflows: %v", err)
	}
	makefile, gomod := readText(t, "Makefile"), readText(t, "go.mod")
	pins := make(map[string]string) // of actions
	for _, file := range files {
		text := readText(t, file)
		var w workflow
		if err := yaml.Unmarshal([]byte(text), &w); err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if len(w.Permissions) != 1 || w.Permissions["contents"] != "read" {
			t.Errorf("%s: permissions are %v; the workflow should only read, a job may need more", file, w.Permissions)
		}

		// A tag can be moved to other code, a commit cannot.
		pinned := regexp.MustCompile(`^\s*(?:- )?uses: ([\w.-]+/[\w./-]+)@([0-9a-f]{40} # v\d+\.\d+\.\d+)$`)
		for line := range strings.Lines(text) {
			line = strings.TrimRight(line, "\n")
			if m := pinned.FindStringSubmatch(line); m != nil {
				if pin := cmp.Or(pins[m[1]], m[2]); pin != m[2] {
					t.Errorf("%s: %s is both %s and %s", file, m[1], m[2], pin)
				}
				pins[m[1]] = m[2]
			} else if _, name, ok := strings.Cut(line, "uses: "); ok {
				if _, err := os.Stat(name); err != nil || !strings.HasPrefix(name, "./") {
					t.Errorf("%s: %q is not pinned as ACTION@COMMIT # vX.Y.Z", file, name)
				}
			}
		}

		for name, job := range w.Jobs {
			if job.Uses == "" && job.Timeout == 0 {
				t.Errorf("%s: job %s has no timeout-minutes", file, name)
			}
			var needsGo, hasGo bool
			for _, step := range job.Steps {
				action, _, _ := strings.Cut(step.Uses, "@")
				switch {
				case action == "actions/checkout" && step.With["persist-credentials"] != "false":
					t.Errorf("%s: job %s leaves the token in the clone; set persist-credentials: false", file, name)
				case action == "actions/setup-go":
					hasGo = step.With["go-version-file"] == "go.mod" && step.With["go-version"] == ""
				}
				for _, m := range regexp.MustCompile(`(?m)(?:^|[|&;] *)(make|go tool|\.[\w./]*/[\w./-]+) *([\w-]*)`).FindAllStringSubmatch(step.Run, -1) {
					needsGo = true
					switch command := m[1]; command {
					case "make":
						if !regexp.MustCompile(`(?m)^` + m[2] + `:`).MatchString(makefile) {
							t.Errorf("%s: the Makefile has no %q", file, m[2])
						}
					case "go tool":
						if !regexp.MustCompile(`(?m)^\t\S+/` + m[2] + `$`).MatchString(gomod) {
							t.Errorf("%s: go.mod has no tool %q", file, m[2])
						}
					default:
						if info, err := os.Stat(command); err != nil || info.Mode()&0o111 == 0 {
							t.Errorf("%s: %s cannot be run", file, command)
						}
					}
				}
			}
			if needsGo && !hasGo {
				t.Errorf("%s: job %s needs the Go of go.mod: actions/setup-go with go-version-file: go.mod", file, name)
			}
		}
	}
}

// Dependabot looks for new versions wherever there are any.
func TestDependabot(t *testing.T) {
	t.Parallel()
	var config struct {
		Updates []struct {
			Ecosystem   string `yaml:"package-ecosystem"`
			Directory   string
			Directories []string
		}
	}
	if err := yaml.Unmarshal([]byte(readText(t, ".github/dependabot.yml")), &config); err != nil {
		t.Fatal(err)
	}
	got := make(map[string][]string)
	for _, u := range config.Updates {
		dirs := u.Directories
		if u.Directory != "" {
			dirs = append(dirs, u.Directory)
		}
		got[u.Ecosystem] = dirs
	}
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "node_modules" {
			return fs.SkipDir
		}
		kind := map[string]string{"go.mod": "gomod", "package-lock.json": "npm"}[filepath.Base(name)]
		if dir := filepath.Join("/", filepath.Dir(name)); kind != "" && !slices.Contains(got[kind], dir) {
			t.Errorf("%s is updated in %v, and not in %s", kind, got[kind], dir)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func readText(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
