package test

import (
	"encoding/json"
	"maps"
	"parley/test/testkit"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The alerts and the dashboard in deploy/ ask for what the server has.

// servedMetrics returns, of a server that has every metric, the values of each
// label of each series name.
func servedMetrics(t *testing.T) map[string]map[string][]string {
	t.Helper()
	server := testkit.StartBinary(t, "REDIS_URL=redis://"+testkit.StartRedis(t).Addr, "ROOMS=open")
	served := map[string]map[string][]string{
		"up": {}, // by Prometheus itself
	}
	series := regexp.MustCompile(`^(\w+)(?:\{(.*)\})? `)
	label := regexp.MustCompile(`(\w+)="([^"]*)"`)
	for line := range strings.Lines(get(t, server.URL("/metrics"))) {
		m := series.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if served[m[1]] == nil {
			served[m[1]] = map[string][]string{}
		}
		for _, pair := range label.FindAllStringSubmatch(m[2], -1) {
			served[m[1]][pair[1]] = append(served[m[1]][pair[1]], pair[2])
		}
	}
	return served
}

// checkQuery fails unless every series that a query asks for is served with the
// labels that it asks for; where it asks for one value, with that.
func checkQuery(t *testing.T, where, query string, served map[string]map[string][]string) {
	t.Helper()
	labels := []string{"job", "instance"} // which Prometheus adds
	selector := regexp.MustCompile(`\b((?:parley|process|go|promhttp)_\w+|up)\b(?:\{([^}]*)\})?`)
	matcher := regexp.MustCompile(`(\w+)(=~|=|!=|!~)"([^"]*)"`)
	found := selector.FindAllStringSubmatch(query, -1)
	if len(found) == 0 {
		t.Errorf("%s asks for nothing that parley has: %s", where, query)
	}
	for _, m := range found {
		has, ok := served[m[1]]
		if !ok {
			t.Errorf("%s asks for %s, which is not served", where, m[1])
			continue
		}
		labels = slices.AppendSeq(labels, maps.Keys(has))
		for _, match := range matcher.FindAllStringSubmatch(m[2], -1) {
			name, operator, value := match[1], match[2], match[3]
			if name == "job" || name == "instance" {
				continue
			}
			if values, ok := has[name]; !ok || operator == "=" && !slices.Contains(values, value) {
				t.Errorf("%s asks for %s with %s, which has %s=%q", where, m[1], match[0], name, values)
			}
		}
	}
	for _, by := range regexp.MustCompile(`\bby \(([^)]*)\)`).FindAllStringSubmatch(query, -1) {
		for _, name := range strings.Split(by[1], ", ") {
			if !slices.Contains(labels, name) {
				t.Errorf("%s groups by %s, which nothing it asks for has: %s", where, name, query)
			}
		}
	}
}

type alertRules struct {
	Groups []alertGroup
}

type alertGroup struct {
	Name  string
	Rules []alertRule
}

type alertRule struct {
	Alert  string `yaml:",omitempty"`
	Record string `yaml:",omitempty"`
	Expr   string
}

func TestAlerts(t *testing.T) {
	const file, tests = "deploy/prometheus/alerts.yaml", "deploy/prometheus/alerts_test.yaml"
	var rules alertRules
	readYAML(t, file, &rules)
	served := servedMetrics(t)
	for _, rule := range rules.Groups[0].Rules {
		checkQuery(t, rule.Alert, rule.Expr, served)
		if !strings.Contains(readFile(t, tests), `alertname="`+rule.Alert+`"`) {
			t.Errorf("%s does not see %s fire", tests, rule.Alert)
		}
	}
	// What those tests feed the rules with is as it is served, too.
	for _, m := range regexp.MustCompile(`series: '([^']+)'`).FindAllStringSubmatch(readFile(t, tests), -1) {
		checkQuery(t, tests, m[1], served)
	}
}

func TestScrapeConfig(t *testing.T) {
	const scrape = "deploy/prometheus/scrape.yaml"
	if addr := readEnvFile(t, "deploy/systemd/parley.env")["METRICS_ADDR"]; !strings.Contains(readFile(t, scrape), `targets: [`+addr+`]`) {
		t.Errorf("the unit serves metrics at %s, and Prometheus asks elsewhere", addr)
	}
}

// A grafanaDashboard is what is looked at of one.
type grafanaDashboard struct {
	Panels []struct {
		ID      int
		Title   string
		Type    string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr, LegendFormat string }
	}
	Annotations struct{ List []struct{ Expr string } }
	Templating  struct {
		List []struct{ Name, Type, Query string }
	}
}

func readDashboard(t *testing.T) (d grafanaDashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(readFile(t, "deploy/grafana/parley.json")), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDashboard(t *testing.T) {
	dashboard, served := readDashboard(t), servedMetrics(t)
	for _, v := range dashboard.Templating.List {
		if v.Type == "query" {
			checkQuery(t, "variable "+v.Name, v.Query, served)
		}
	}
	for _, a := range dashboard.Annotations.List {
		checkQuery(t, "annotation", a.Expr, served)
	}
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q: its ID is another's, or it is off the grid", p.Title)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, q := range p.Targets {
			checkQuery(t, p.Title, q.Expr, served)
			// A legend names labels that are left of the query's.
			for _, name := range regexp.MustCompile(`\{\{(\w+)\}\}`).FindAllStringSubmatch(q.LegendFormat, -1) {
				grouped := strings.Contains(q.Expr, " by (")
				if grouped && !regexp.MustCompile(`by \([^)]*\b`+name[1]+`\b`).MatchString(q.Expr) || !grouped && name[1] != "instance" {
					t.Errorf("panel %q: the legend names %s, which is not in %s", p.Title, name[1], q.Expr)
				}
			}
		}
	}
}
